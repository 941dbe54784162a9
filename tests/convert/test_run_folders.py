"""`mmtrain convert` of a run, and of full tensors: other people's files straight from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from converted import ROOT, assert_equal, tensors_of
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, WeightEntry
from mmtrain.checkpoint.pieces import WEIGHT, key_of
from mmtrain.cli import main
from mmtrain.layout.dims import ParallelDims
from mmtrain.models.census import take_census
from mmtrain.models.emu.names import LLAMA, RELEASE
from mmtrain.models.families import spec_of
from mmtrain.nn.init import draw_by_name
from mmtrain.nn.lora import is_adapter, merged
from mmtrain.recipe import examine


def weights(recipe: Path) -> dict[str, Tensor]:
    """Weights of a recipe's model, drawn; the halves B of adapters are not zero."""
    read = examine(recipe).recipe
    assert read is not None
    spec, model = spec_of(read.family, read.phase), read.model
    shapes = {n: s for layer in take_census(spec, model) for n, s in layer.shapes.items()}
    out = {n: draw_by_name(n, s, spec.initial(model), 1) for n, s in shapes.items()}
    return {n: torch.ones_like(t) if n.endswith("_lora.b.weight") else t for n, t in out.items()}


def make_run(folder: Path, lora: dict[str, object] | None = None) -> dict[str, Tensor]:
    """A run of the tiny recipe with grouped queries."""
    recipe = yaml.safe_load((ROOT / "configs/emu/tiny.yaml").read_text())
    recipe["model"]["language"]["kv_heads"] = 2
    if lora is not None:
        recipe["model"]["lora"] = lora
    return make_run_of(folder, recipe)


def make_run_of(folder: Path, recipe: dict[str, Any]) -> dict[str, Tensor]:
    """A run folder with a committed checkpoint of step 10; returns its weights."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tensors = weights(folder / "recipe.yaml")
    partial = store.begin(folder / "checkpoints", 10)
    dims = ParallelDims(data=1, tensor=1, pipeline=1, zero_stage=1)
    file = store.write_part(partial, 0, {key_of(WEIGHT, n): t for n, t in tensors.items()})
    manifest = Manifest(
        step=10,
        dims=dims,
        state={},
        recipe_hash="",
        code_version="",
        weights={n: WeightEntry(tuple(t.shape), None, 0) for n, t in tensors.items()},
        files=dict([file]),
    )
    store.commit(folder / "checkpoints", manifest)
    return tensors


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def test_full_tensors_of_a_run_say_what_they_are(tmp_path: Path) -> None:
    tensors = make_run(tmp_path / "run")
    assert run(tmp_path / "run", "--out", tmp_path / "full") == 0
    assert_equal(tensors_of(tmp_path / "full"), tensors)
    described = json.loads((tmp_path / "full/mmtrain.json").read_text())
    assert described["kind"] == "emu" and described["model"]["language"]["kv_heads"] == 2
    assert described["model"]["vision"]["heads"] == 4


@pytest.mark.parametrize("through", ["run", "checkpoint", "full tensors"])
def test_a_run_goes_out_as_a_llama_that_transformers_reads(tmp_path: Path, through: str) -> None:
    tensors = make_run(tmp_path / "run")
    source: list[object] = [tmp_path / "run"]
    if through == "checkpoint":
        source += ["--checkpoint", "step-00000010"]
    if through == "full tensors":
        assert run(*source, "--out", tmp_path / "full") == 0
        source = [tmp_path / "full"]
    assert run(*source, "--as", "llama", "--out", tmp_path / "hf") == 0
    trunk = {n: t for n, t in tensors.items() if LLAMA.foreign_name(n)}
    assert_equal(tensors_of(tmp_path / "hf"), LLAMA.to_foreign(trunk))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.max_position_embeddings == 64


def test_a_run_goes_out_as_the_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = make_run(tmp_path / "run")
    assert run(tmp_path / "run", "--as", "emu", "--out", tmp_path / "emu.pt") == 0
    assert "made again" in capsys.readouterr().out
    released = tensors_of(tmp_path / "emu.pt")
    dead = RELEASE.dropped(released)
    alive = {n: t for n, t in released.items() if n not in dead}
    assert_equal(alive, RELEASE.to_foreign(tensors))
    # 3 layers, 5 dead tensors; heads of 8 channels are known from the recipe
    assert len(dead) == 8 and released[next(n for n in dead if "inv_freq" in n)].shape == (4,)


def test_adapters_of_a_run_go_out_alone_or_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"rank": 2, "alpha": 6.0, "targets": ["q", "down"]}
    tensors = make_run(tmp_path / "run", lora)
    assert run(tmp_path / "run", "--as", "peft", "--out", tmp_path / "adapter") == 0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    assert config["target_modules"] == ["q_proj", "down_proj"]
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(found) == sum(map(is_adapter, tensors)) == 2 * 2 * 3
    assert run(tmp_path / "run", "--as", "llama", "--out", tmp_path / "hf") == 65
    assert "--merge-lora" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    assert run(tmp_path / "run", "--as", "llama", "--out", tmp_path / "hf", "--merge-lora") == 0
    trunk = {n: t for n, t in merged(tensors, 3.0).items() if LLAMA.foreign_name(n)}
    assert_equal(tensors_of(tmp_path / "hf"), LLAMA.to_foreign(trunk))


def test_a_decoder_run_goes_out_as_a_unet_that_diffusers_reads(tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "configs/emu/tiny_decoder.yaml").read_text())
    tensors = make_run_of(tmp_path / "run", recipe)
    assert run(tmp_path / "run", "--as", "unet", "--out", tmp_path / "unet") == 0
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert_equal({f"unet.{name}": t for name, t in unet.state_dict().items()}, tensors)
    assert unet.config.cross_attention_dim == 32 and unet.config.sample_size == 8


def test_a_wrong_kind_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    assert run(tmp_path / "run", "--as", "unet", "--out", tmp_path / "x") == 65
    assert "its kind is emu, expected unet" in capsys.readouterr().err
    assert run(tmp_path / "run", "--as", "peft", "--out", tmp_path / "x") == 65
    assert "holds no adapters" in capsys.readouterr().err and not (tmp_path / "x").exists()
