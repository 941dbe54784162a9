"""Weights and checkpoints that come from someone else: hostile ones are refused by name."""

import importlib.util
import json
import os
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from saying import one_line

from mmtrain import log
from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, WeightEntry
from mmtrain.cli import main
from mmtrain.convert.pickles import load_frame
from mmtrain.convert.sources import open_source
from mmtrain.errors import ContentError
from mmtrain.layout.dims import ParallelDims

ROOT = Path(__file__).resolve().parent.parent
Main = Callable[[list[str]], int]


class Wicked:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def convert() -> Main:
    """`tools/convert_checkpoint.py` as a function."""
    spec = importlib.util.spec_from_file_location("converter", ROOT / "tools/convert_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Main, module.main)


def unconverted(convert: Main, capsys: pytest.CaptureFixture[str], source: Path) -> str:
    """Import weights, which must be refused with one line and nothing written."""
    log.start(0, 1)  # to the stream that is captured now
    out = source.parent / "out"
    before = sorted(source.parent.rglob("*"))
    assert convert(["import", "emu", str(source), str(out)]) == 65
    said = one_line(capsys.readouterr().err)
    assert sorted(source.parent.rglob("*")) == before
    return said


def test_a_malicious_pickle_runs_nothing(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, canary = tmp_path / "wicked.pt", tmp_path / "canary"
    for legacy in (False, True):
        content = {"w": torch.ones(2), "hook": Wicked(canary)}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        said = unconverted(convert, capsys, path)
        assert str(path) in said and "system" in said and "refused" in said
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have worked


def test_an_archive_that_unpacks_to_more_than_itself(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    path = tmp_path / "bomb.pt"
    plain = zipfile.ZipFile(tmp_path / "plain.pt")
    with plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    said = unconverted(convert, capsys, path)
    assert str(path) in said and "unpack to 4,19" in said


def _header(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "where sizes belong"),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "where sizes belong"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "where sizes belong"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "gap at byte 4"),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}, "has 8 bytes"),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, "asks for"),
        ({"dtype": "os.system", "shape": [2], "data_offsets": [0, 8]}, "cannot be read"),
        ([[]] * 3, "cannot be read"),
    ],
)
def test_headers_that_lie(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path, entry: object, says: str
) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(_header(len(text), text) + bytes(8))
    said = unconverted(convert, capsys, path)
    assert str(path) in said and says in said


def test_tensors_that_share_bytes(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        }
    ).encode()
    path.write_bytes(_header(len(text), text) + bytes(16))
    assert "overlap or leave a gap at byte 8" in unconverted(convert, capsys, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_are_content_errors(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever Python raises at the damaged place."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    sound, chance = path.read_bytes(), random.Random(0)
    path.write_bytes(sound[:-30])
    assert str(path) in unconverted(convert, capsys, path)
    refused = 0
    for _ in range(150):
        spoilt = bytearray(sound)
        for _ in range(3):
            spoilt[chance.randrange(len(spoilt) - 24)] = chance.randrange(256)
        path.write_bytes(spoilt)
        try:
            load_frame(path)
        except ContentError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 40


def test_huge_and_bottomless_headers(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_header(1 << 62, b"{}"))
    assert "header of 4,611,686,018,427,387,904 bytes" in unconverted(convert, capsys, path)
    with path.open("wb") as file:  # a hole of 200 MB, which no disk holds
        file.write(_header(200_000_000, b"{"))
        file.truncate(200_000_100)
    start = time.perf_counter()
    said = unconverted(convert, capsys, path)
    assert "claims 200,000,000 bytes, the format allows 100,000,000" in said
    assert time.perf_counter() - start < 1
    path.write_bytes(_header(200_000, b"[" * 200_000))
    assert "cannot be read" in unconverted(convert, capsys, path)


# names of files

NAMES = ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "", "..\\x", "a\0b"]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_of_weights_that_names_files_elsewhere(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    said = unconverted(convert, capsys, folder)
    assert str(index) in said and repr(name) in said and "forged" in said
    assert convert(["export", "emu", str(folder), str(tmp_path / "out.pt")]) == 65
    said = one_line(capsys.readouterr().err)
    assert str(index) in said and repr(name) in said and not (tmp_path / "out.pt").exists()


def test_links_of_an_export_stay_inside_and_those_of_a_hub_s_cache_may_not(
    convert: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "blob")
    (folder / "model-1.safetensors").symlink_to("../blob")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert convert(["export", "emu", str(folder), str(tmp_path / "out.pt")]) == 65
    said = one_line(capsys.readouterr().err)
    assert "is a symbolic link to" in said and str(tmp_path / "blob") in said
    assert open_source(folder).get("w").tolist() == [1, 1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A committed checkpoint of a run, without weights."""
    root = tmp_path / "run/checkpoints"
    partial = store.begin(root, 1)
    name, entry = store.write_part(partial, 0, {"weight/w": torch.ones(2)})
    manifest = Manifest(
        step=1,
        dims=ParallelDims(),
        state={},
        recipe_hash="",
        code_version="",
        weights={"w": WeightEntry((2,), None, 0)},
        files={name: entry},
    )
    return store.commit(root, manifest)


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_names_files_elsewhere(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    assert main(["check", str(run)]) == 0
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    content["files"] = {name: next(iter(content["files"].values()))}
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["check", str(run)]) == 65
    seen = capsys.readouterr()
    assert f"{path}: names the file {name!r}" in seen.out
    assert len(seen.err.strip().splitlines()) == 1
    assert main(["convert", str(run), "--out", str(tmp_path / "out")]) == 65
    assert repr(name) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_manifest_whose_file_is_a_link_that_leads_out(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    part = checkpoint / "rank-00000.safetensors"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    assert main(["check", str(tmp_path / "run")]) == 65
    assert "is a symbolic link to" in capsys.readouterr().out
