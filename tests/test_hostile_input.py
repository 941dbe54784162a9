"""What comes from someone else is data: hostile files are refused by name, through the commands.

Each test runs the command line in this process, and then looks at what was written.
"""

import ast
import base64
import importlib.util
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from mmtrain import log
from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, WeightEntry
from mmtrain.cli import main
from mmtrain.convert.sources import open_source
from mmtrain.layout.dims import ParallelDims

ROOT = Path(__file__).resolve().parent.parent
Main = Callable[[list[str]], int]

RECIPE = """
name: test
output: {runs}
model:
  vision: {{image_size: 28, layers: 1, width: 32, heads: 4, mlp_width: 64}}
  causal: {{queries: 4, layers: 1, width: 32, heads: 4, head_width: 8, mlp_width: 64}}
  language: {{vocabulary: 256, layers: 2, width: 32, heads: 4, mlp_width: 64, context: 64}}
data:
  tokenizer: {data}/tokenizer
  sources:
    captions: {{path: {data}/captions, rule: pair, max_images: 1, max_tokens: 32}}
  pack_tokens: 128
  pack_images: 4
schedule: {{warmup_steps: 2}}
train: {{steps: 10, global_batch_packs: 8, precision: fp32}}
"""

TALK = [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "Red."}]


@pytest.fixture
def recipe(tmp_path: Path, shapes: Path) -> Path:
    """A recipe without a fault."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=shapes, runs=tmp_path / "runs"))
    return path


def refused(capsys: pytest.CaptureFixture[str], code: int, *command: object) -> str:
    """Run a command that must end with a code; returns the one line that it says."""
    assert main([str(word) for word in command]) == code
    said = capsys.readouterr().err
    if code == 2:  # one fault a line below a headline
        assert said.startswith("mmtrain: 1 fault; nothing was written\n")
        said = said.partition("\n")[2]
    return one_line(said)


def one_line(said: str) -> str:
    """The only line of a message; what is logged begins with the time, or with W."""
    (line,) = [x for x in said.strip().splitlines() if not re.match(r"W?\d\d+[: ]", x)]
    return line


# recipes


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:MMTRAIN_SECRET}",
        "runs/${oc.env:MMTRAIN_SECRET,none}",
        "${oc.${name}:MMTRAIN_SECRET}",
        "${data.${oc.env:MMTRAIN_SECRET}}",
        "${oc.decode:'${oc.env:MMTRAIN_SECRET}'}",
        "${oc.create:{a: 1}}",
        "${planted:}",
    ],
)
@pytest.mark.parametrize("by", ["file", "override"])
def test_resolvers_are_refused(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    value: str,
    by: str,
) -> None:
    monkeypatch.setenv("MMTRAIN_SECRET", "s3cr3t")
    canary = tmp_path / "canary"
    OmegaConf.register_resolver("planted", canary.touch, replace=True)
    try:
        if by == "file":
            recipe.write_text(recipe.read_text() + f'\nseed: "{value}"\n')
            said = refused(capsys, 2, "check", recipe)
            assert said.strip().startswith(f"{recipe} seed: ")
        else:
            said = refused(capsys, 2, "check", recipe, f'seed="{value}"')
            assert said.strip().startswith("override seed: ")
        assert value in said and "refused" in said and "s3cr3t" not in said
        assert not canary.exists()
        assert OmegaConf.has_resolver("oc.env")  # other users of OmegaConf keep theirs
    finally:
        OmegaConf.clear_resolver("planted")


def test_a_resolver_in_a_base_names_the_base(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(f"base: {recipe.name}\n")
    recipe.write_text(recipe.read_text() + "\nlog: {every_steps: '${oc.env:HOME}'}\n")
    said = refused(capsys, 2, "check", top)
    assert said.strip().startswith(f"{recipe} log.every_steps: ")


def test_keys_can_still_be_copied(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recipe.read_text().replace("name: test\n", "name: run-${train.steps}\n")
    recipe.write_text(text + "\nseed: ${data.pack_tokens}\n")
    assert main(["check", str(recipe)]) == 0, capsys.readouterr().err


def _doubling(first: str, rest: str) -> str:
    return first + "".join(
        "\n" + rest.replace("NEXT", f"a{i + 1}").replace("LAST", f"a{i}") for i in range(40)
    )


BOMBS = {
    "aliases": (_doubling("a0: &a0 [1, 1]", "NEXT: &NEXT [*LAST, *LAST]"), "expansion"),
    "copied lists": (_doubling("a0: [1, 1]", "NEXT: ['${LAST}', '${LAST}']"), "copy"),
    "copied texts": (_doubling("a0: xx", "NEXT: '${LAST}${LAST}'"), "a2: found '${a1}${a1}'"),
    "relative copies": (_doubling("a0: xx", "NEXT: '${.LAST}${.LAST}'"), "a1: found"),
    "nesting": ("a: " + "[" * 900 + "]" * 900, "nested"),
    "itself": ("a: &a [*a]", "recursive"),
    "a long text": ("a: " + "x" * 5000, "5,000 characters"),
    "a long file": ("# " + "x" * 300_000, "bytes"),
    "a long number": ("seed: " + "9" * 5000, "5000 digits"),
    "a key twice": ("seed: 1\nseed: 2", "duplicate key"),
    "no date": ("seed: !!timestamp 2020-99-99", "month"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, says = BOMBS[name]
    recipe.write_text(recipe.read_text() + "\n" + text + "\n")
    start = time.perf_counter()
    said = refused(capsys, 2, "check", recipe)
    assert says in said and len(said) < 600
    assert time.perf_counter() - start < 8  # about 1 s; without limits it never ends


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "name:os.system"]
)
def test_tags_of_python_make_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, tag: str
) -> None:
    canary = tmp_path / "canary"
    recipe.write_text(recipe.read_text() + f"\nseed: !!python/{tag} ['touch {canary}']\n")
    said = refused(capsys, 2, "check", recipe)
    assert str(recipe) in said and "os.system" in said and not canary.exists()


# pictures


@pytest.mark.parametrize("place", ["a file", "inline"])
def test_a_huge_picture_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    huge_png: bytes,
    place: str,
) -> None:
    (tmp_path / "huge.png").write_bytes(huge_png)
    inline = "data:image/png;base64," + base64.b64encode(huge_png).decode()
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A wall."}]
    image = "huge.png" if place == "a file" else inline
    records = [{"id": "bad", "image": image, "conversations": said}]
    records += [{"id": str(i), "conversations": talk} for i, talk in enumerate([TALK] * 3)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    start = time.perf_counter()
    assert main(["data", "chat", str(tmp_path / "chat.json"), str(out)]) == 65
    left_out, verdict = capsys.readouterr().err.strip().splitlines()
    assert time.perf_counter() - start < 3
    assert "record 1 (id bad)" in left_out and "more than 67,108,864 pixels" in left_out
    assert "1 of 4" in verdict and not out.exists()
    command = ["data", "chat", str(tmp_path / "chat.json"), str(out), "--max-failures", "0.5"]
    assert main(command) == 0
    assert "3 conversations" in capsys.readouterr().out


# weights


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
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "negative"),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "negative"),
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


# the code itself


def test_loaders_of_pickles_are_told_not_to_run_them() -> None:
    """What ruff's S rules do not look at: torch.load and numpy.load."""
    wanted = {"torch": ("weights_only", True), "np": ("allow_pickle", False)}
    faults, seen = [], 0
    for path in [
        *ROOT.glob("mmtrain/**/*.py"),
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("kernels/**/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            module, function = node.func.value, node.func.attr
            if not (isinstance(module, ast.Name) and module.id in wanted and function == "load"):
                continue
            name, value = wanted[module.id]
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            seen += 1
            if given.get(name) is not value:
                faults.append(f"{path}:{node.lineno}: {module.id}.load without {name}={value}")
    assert not faults and seen >= 4
