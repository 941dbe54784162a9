"""What is wrong is named before anything is written: file or tensor, found, expected, way out."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from converted import GOLDEN, ROOT, Convert
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmtrain.convert import writing

PRETRAIN = GOLDEN / "weights.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a conversion would write; nothing may be there in the end, whole or in part."""
    place = tmp_path / "written"
    place.mkdir()
    yield place / "out"
    assert list(place.iterdir()) == []


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "llama"
    model = LlamaForCausalLM(LlamaConfig(48, 32, 40, 3, 4))
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("left", [0, 5, 700, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_cut_off_files(
    convert: Convert, tmp_path: Path, out: Path, suffix: str, left: float
) -> None:
    whole = tmp_path / f"whole.{suffix}"
    state = load_file(PRETRAIN)
    if suffix == "bin":
        torch.save(state, whole)
    else:
        save_file(state, whole)
    content = whole.read_bytes()
    size = left if isinstance(left, int) else int(len(content) * left)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[:size])
    said = convert("import", "emu", path, out, code=65)
    assert str(path) in said and f"{size:,} bytes" in said and "copy it again" in said


class Wicked:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "old", "plain pickle"])
def test_a_pickle_that_wants_code_is_refused(
    convert: Convert, tmp_path: Path, out: Path, form: str
) -> None:
    state: dict[str, object] = dict(load_file(PRETRAIN))
    state["hook"] = Wicked(f"touch {tmp_path / 'run'}")
    path = tmp_path / "wicked.pt"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state["hook"], protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    said = convert("import", "emu", path, out, code=65)
    assert str(path) in said and "system" in said and "refused" in said
    assert "safetensors" in said and not (tmp_path / "run").exists()


def test_a_state_dict_with_other_things_in_it(convert: Convert, tmp_path: Path, out: Path) -> None:
    torch.save({"epoch": 3, "config": {"a": 1}}, tmp_path / "x.pt")
    assert "epoch (int)" in convert("import", "emu", tmp_path / "x.pt", out, code=65)
    torch.save([1, 2], tmp_path / "x.pt")
    assert "holds a list" in convert("import", "emu", tmp_path / "x.pt", out, code=65)


def test_a_wrong_architecture_says_what_it_looks_like(
    convert: Convert, tmp_path: Path, out: Path, llama: Path
) -> None:
    said = convert("import", "eva", llama, out, code=65)
    assert "none of its 30 tensors has a name of EVA-CLIP" in said
    assert "looks like a Hugging Face LLaMA (kind llama)" in said
    said = convert("import", "eva", PRETRAIN, out, code=65)
    assert "look like an Emu pretrain release (kind emu)" in said
    towers = {n: t for n, t in load_file(PRETRAIN).items() if n.startswith("visual.")}
    save_file(towers, tmp_path / "eva.safetensors")
    said = convert("import", "emu", tmp_path / "eva.safetensors", out, code=65)
    assert "missing" in said
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/params.json").write_text('{"dim": 32, "n_heads": 4, "norm_eps": 1e-6}')
    state = LlamaForCausalLM.from_pretrained(llama).state_dict()
    torch.save(dict(state), tmp_path / "meta/consolidated.00.pth")
    said = convert("import", "meta-llama", tmp_path / "meta", out, code=65)
    assert "looks like a Hugging Face LLaMA" in said


def test_a_missing_shard_is_named(convert: Convert, tmp_path: Path, out: Path, llama: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)
    gone = sorted(folder.glob("model-*"))[1]
    gone.unlink()
    said = convert("import", "llama", folder, out, code=66)
    assert gone.name in said and "1 of" in said and "model.safetensors.index.json" in said


def test_an_index_that_promises_too_much(
    convert: Convert, tmp_path: Path, out: Path, llama: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.more.weight": first}}))
    assert "model.more.weight" in convert("import", "llama", folder, out, code=65)
    fewer = dict(index["weight_map"])
    del fewer["model.norm.weight"]
    path.write_text(json.dumps({"weight_map": fewer}))
    said = convert("import", "llama", folder, out, code=65)
    assert "hold tensors it does not name: model.norm.weight" in said
    path.write_text("{")
    assert "not a weight index" in convert("import", "llama", folder, out, code=65)


def test_every_fault_of_names_and_shapes_at_once(
    convert: Convert, tmp_path: Path, out: Path
) -> None:
    state: dict[str, Tensor] = load_file(PRETRAIN)
    for name in (
        "decoder.lm.model.embed_tokens.weight",
        "decoder.lm.model.layers.1.mlp.down_proj.weight",
        "visual.blocks.0.mlp.fc1.weight",
    ):
        state[name] = state[name].T.contiguous()
    a, b = "ln_visual.bias", "cformer.projection.bias"
    state[a], state[b] = state[b], state[a]
    del state["decoder.lm.model.layers.0.self_attn.o_proj.weight"]
    state["decoder.lm.model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(state, tmp_path / "bad.safetensors")
    said = convert("import", "emu", tmp_path / "bad.safetensors", out, code=65)
    for words in (
        "7 faults",
        "decoder.lm.model.embed_tokens.weight: gives embed.tokens.weight the shape 64x94, expected "
        "94x64 (swapped dims?)",
        "decoder.lm.model.layers.1.mlp.down_proj.weight: gives blocks.1.mlp.down.weight the shape "
        "104x64, expected 64x104 (swapped dims?)",
        "visual.blocks.0.mlp.fc1.weight: gives",
        "ln_visual.bias: gives vision_norm.bias the shape 64, expected 52",
        "cformer.projection.bias: gives causal.projection.bias the shape 52, expected 64",
        "decoder.lm.model.layers.0.self_attn.o_proj.weight: missing",
        "decoder.lm.model.layers.1.self_attn.q_norm.weight (16 f32): unknown name",
    ):
        assert words in said, words


def test_a_block_in_the_middle_that_is_not_there(
    convert: Convert, tmp_path: Path, out: Path
) -> None:
    state = load_file(PRETRAIN)
    left = {n: t for n, t in state.items() if not n.startswith("visual.blocks.0.")}
    save_file(left, tmp_path / "bad.safetensors")
    said = convert("import", "emu", tmp_path / "bad.safetensors", out, code=65)
    assert "visual.blocks.0.attn.qkv.weight: missing" in said


def test_sizes_are_those_of_the_recipe_when_one_is_named(
    convert: Convert, tmp_path: Path, out: Path
) -> None:
    recipe = ROOT / "configs/emu/14b_pretrain.yaml"
    said = convert("import", "emu", PRETRAIN, out, "--recipe", recipe, code=65)
    assert "expected 1408x1408" in said and "... and" in said


def test_full_tensors_that_are_not_whole_are_not_exported(
    convert: Convert, tmp_path: Path, out: Path
) -> None:
    convert("import", "emu", PRETRAIN, tmp_path / "full")
    (shard,) = (tmp_path / "full").glob("model-*.safetensors")
    index = tmp_path / "full/model.safetensors.index.json"
    known = json.loads(index.read_text())
    del known["weight_map"]["causal.queries"]
    index.write_text(json.dumps(known))
    said = convert("export", "emu", tmp_path / "full", out.with_suffix(".pt"), code=65)
    assert "causal.queries" in said
    shard.unlink()
    said = convert("export", "emu", tmp_path / "full", out.with_suffix(".pt"), code=66)
    assert shard.name in said


def test_nothing_is_overwritten(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    said = convert("import", "emu", PRETRAIN, tmp_path / "full", code=74)
    assert "is there already" in said
    convert("import", "emu", PRETRAIN, tmp_path / "whole")
    (tmp_path / "x.pt").write_text("mine")
    said = convert("export", "emu", tmp_path / "whole", tmp_path / "x.pt", code=74)
    assert (tmp_path / "x.pt").read_text() == "mine" and "is there already" in said
    said = convert("export", "emu", tmp_path / "whole", tmp_path / "x", code=2)
    assert ".safetensors" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "whole", "x.pt"]


def test_a_full_disk_is_told_before_it_is_full(
    convert: Convert, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    said = convert("import", "emu", PRETRAIN, out, code=74)
    assert "has 1,000 left" in said and "nothing was written" in said


def test_a_source_that_is_not_there(convert: Convert, tmp_path: Path, out: Path) -> None:
    assert "not found" in convert("import", "emu", tmp_path / "nowhere.pt", out, code=66)
    (tmp_path / "empty").mkdir()
    assert "no weights" in convert("import", "emu", tmp_path / "empty", out, code=66)
    (tmp_path / "x.gguf").write_text("GGUF")
    assert "unknown kind" in convert("import", "emu", tmp_path / "x.gguf", out, code=65)
    assert "holds no weights" in convert("export", "emu", tmp_path / "empty", out, code=66)


def test_the_command_itself(tmp_path: Path) -> None:
    """As a user types it: exit code and the stream of the message."""
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py")]
    done = subprocess.run(
        [*command, "import", "emu", str(tmp_path / "no.pt"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 66 and done.stdout == ""
    assert done.stderr.startswith("convert_checkpoint: ") and "Traceback" not in done.stderr
