"""Shards that come from someone else: hostile ones are refused by name, and run nothing."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from saying import refused
from streaming.base.format.mds.writer import MDSWriter
from streaming.base.hashing import get_hash

from mmtrain.cli import main
from mmtrain.data.document import COLUMNS
from mmtrain.data.fetch import HASH


@pytest.fixture
def shards(tmp_path: Path, shapes: Path) -> Path:
    """A dataset of its own, to be spoilt."""
    return Path(shutil.copytree(shapes / "captions", tmp_path / "remote"))


def _spoil(folder: Path, **changes: object) -> Path:
    path = folder / "index.json"
    content = json.loads(path.read_text())
    content["shards"][0].update(changes)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", ["../../planted.mds", "/tmp/planted.mds", "..\\x", "a\0b"])
def test_an_index_of_shards_that_names_files_elsewhere(
    capsys: pytest.CaptureFixture[str], shards: Path, shapes: Path, tmp_path: Path, name: str
) -> None:
    index = _spoil(shards, raw_data={"basename": name, "bytes": 1, "hashes": {}})
    (tmp_path / "planted.mds").write_text("x")
    command = ("data", "index", shards, "--tokenizer", shapes / "tokenizer")
    said = refused(capsys, 65, *command)
    assert str(index) in said and repr(name) in said and "forged" in said


def test_a_remote_index_writes_nothing_outside_its_cache(
    recipe: Path, capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "far").mkdir()
    shards = shards.rename(tmp_path / "far/remote")
    (tmp_path / "far/planted.mds").write_text("x")
    _spoil(shards, raw_data={"basename": "../planted.mds", "bytes": 1, "hashes": {}})
    cache = tmp_path / "near/cache"
    override = f"data.sources.captions={{path: {cache}, remote: {shards}, rule: pair}}"
    before = {p for p in tmp_path.rglob("*") if cache not in p.parents}
    said = refused(
        capsys, 65, "data", "look", recipe, override, "--packs", 1, "--out", tmp_path / "look"
    )
    assert "'../planted.mds'" in said
    assert not (tmp_path / "near/planted.mds").exists()
    new = {p for p in tmp_path.rglob("*") if cache not in p.parents} - before
    assert new <= {tmp_path / "near", cache, tmp_path / "look"}


def test_pickled_columns_are_refused(
    capsys: pytest.CaptureFixture[str], shards: Path, shapes: Path
) -> None:
    content = json.loads((shards / "index.json").read_text())["shards"][0]
    encodings = ["pkl", *content["column_encodings"][1:]]
    index = _spoil(shards, column_encodings=encodings)
    said = refused(capsys, 65, "data", "index", shards, "--tokenizer", shapes / "tokenizer")
    assert str(index) in said and repr(content["column_names"][0]) in said and "pickles" in said


@pytest.mark.parametrize("samples", [10**18, -1])
def test_an_index_cannot_claim_rows_without_bytes(
    capsys: pytest.CaptureFixture[str], shards: Path, shapes: Path, samples: int
) -> None:
    index = _spoil(shards, samples=samples)
    said = refused(capsys, 65, "data", "index", shards, "--tokenizer", shapes / "tokenizer")
    assert str(index) in said and f"{samples:,} rows" in said


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 400, bytes(400), struct.pack("<III", 1, 0, 2**32 - 1) + b"\xff" * 388],
    ids=["ones", "zeros", "a row of 4 GB"],
)
def test_a_shard_of_nonsense(
    capsys: pytest.CaptureFixture[str], shards: Path, shapes: Path, content: bytes
) -> None:
    (shard,) = shards.glob("*.mds")
    shard.write_bytes(content)
    raw = {"basename": shard.name, "bytes": len(content), "hashes": {}}
    _spoil(shards, raw_data=raw, samples=1)
    said = refused(capsys, 65, "data", "index", shards, "--tokenizer", shapes / "tokenizer")
    assert f"{shard} is damaged: its table of rows is none of 1 rows" in said


def test_a_row_of_a_hundred_thousand_brackets_is_left_out(
    capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "deep"
    with MDSWriter(columns=COLUMNS, out=str(folder), hashes=[HASH]) as out:
        out.write({"id": "a", "kind": "b", "parts": "[" * 100_000, "media": b"", "meta": "{}"})
    assert main(["data", "index", str(folder), "--tokenizer", str(shapes / "tokenizer")]) == 0
    said = capsys.readouterr()
    assert "document 'a': the row is not a document (RecursionError" in said.err
    assert "1 documents left out: row is no document" in said.out


def test_pickles_in_the_index_of_lengths(
    recipe: Path, capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    (lengths,) = shards.glob("lengths-*")
    np.save(lengths / "sizes.npy", np.array([{"a": 1}], object), allow_pickle=True)
    content = (lengths / "sizes.npy").read_bytes()
    manifest = json.loads((lengths / "manifest.json").read_text())
    manifest["files"]["sizes.npy"] = {"bytes": len(content), HASH: get_hash(HASH, content)}
    (lengths / "manifest.json").write_text(json.dumps(manifest))
    path = f"data.sources.captions.path={shards}"
    said = refused(capsys, 65, "data", "look", recipe, path, "--out", tmp_path / "look")
    assert str(lengths / "sizes.npy") in said and "no array of numbers" in said


def test_a_password_stays_out_of_recipes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = "data.sources.captions.remote=sftp://me:s3cr3t@host/shards"
    said = refused(capsys, 2, "check", recipe, remote)
    assert "data.sources.captions.remote: holds a password" in said and "s3cr3t" not in said


def test_a_tokenizer_that_brings_code_is_not_run(
    capsys: pytest.CaptureFixture[str], shards: Path, shapes: Path, tmp_path: Path
) -> None:
    folder, canary = tmp_path / "tokenizer", tmp_path / "canary"
    shutil.copytree(shapes / "tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    said = refused(capsys, 65, "data", "index", shards, "--tokenizer", folder)
    assert not canary.exists()
    assert str(folder) in said and "brings code of its own" in said and "=True" not in said
