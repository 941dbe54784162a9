"""A VAE trains on any number of data ranks, becomes a diffusers folder, serves a Transfusion."""

import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from test_transfusion_latents import OVERRIDES, TINY
from world import REPOSITORY, World

from mmtrain.checkpoint.portable import open_averaged, open_tensors
from mmtrain.models.families import spec_of
from mmtrain.models.vae.model import LOSSES
from mmtrain.recipe import read
from mmtrain.trained import load_layers

RECIPE = REPOSITORY / "configs/transfusion/shapes_vae.yaml"
SMALL = (
    "model.size=16",
    "model.latent_channels=4",
    "model.channels=[8,8]",
    "model.encoder_attends=[false,true]",
    "model.decoder_attends=[false,false]",
    "model.norm_groups=4",
    "model.critic={channels: 8, layers: 1, norm_groups: 4, from_step: 2}",
    "data.pack_tokens=32",
    "data.pack_images=4",
    "train.global_batch_packs=4",
    "train.micro_batch_packs=1",
    "train.steps=5",
    "train.ema=0.5",
    "train.loss_weights.adversarial=0.5",
    "schedule.warmup_steps=1",
    "validate.every_steps=5",
)
KEYS = ("loss", "grad_norm", "images", *(f"loss_{name}" for name in LOSSES))


def trained(world: World, name: str, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return world.train(name, ranks, *SMALL, *overrides, recipe=RECIPE)


@pytest.fixture(scope="module")
def one(world: World) -> list[dict[str, Any]]:
    """One rank."""
    return trained(world, "one", 1)


def check_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) == 5
    for line, wanted in zip(found, expected, strict=True):
        for key in KEYS:
            assert line[key] == pytest.approx(wanted[key], rel=1e-5), (line["step"], key)


@pytest.mark.parametrize(
    "zero",
    [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))],
)
def test_two_data_ranks_give_the_losses_of_one(
    world: World, one: list[dict[str, Any]], zero: int
) -> None:
    check_equal(trained(world, f"zero-{zero}", 2, f"parallel.zero_stage={zero}"), one)
    # the critic comes in at its step, and what has no network stays out
    assert [line["loss_critic"] > 0 for line in one] == [False, False, True, True, True]
    assert all(line["loss_perceptual"] == line["loss_identity"] == 0 for line in one)
    assert one[-1]["loss_l1"] < one[0]["loss_l1"] and one[0]["images"] > 8


@pytest.mark.slow
@pytest.mark.parametrize("ranks, zero", [(1, 1), (2, 3)])
def test_a_run_goes_on_to_the_last_bit(world: World, ranks: int, zero: int) -> None:
    asked = ("save.every_steps=3", "save.keep=9", f"parallel.zero_stage={zero}")
    name = f"resumed-{zero}"
    whole = trained(world, name, ranks, *asked)
    shutil.rmtree(world.folder / "runs" / name / "checkpoints/step-00000005")
    again = trained(world, name, ranks, *asked)
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5]
    for line, wanted in zip(again, whole, strict=True):
        assert all(line[key] == wanted[key] for key in KEYS), line["step"]


def test_a_trained_vae_becomes_a_diffusers_folder_that_a_transfusion_reads(
    world: World, one: list[dict[str, Any]]
) -> None:
    assert world.run(1, "convert", "runs/one", "--as", "vae", "--out", "vae") == [0]
    run = world.folder / "runs/one"
    written = load_file(world.folder / "vae/diffusion_pytorch_model.safetensors")
    means, last = open_averaged(run), open_tensors(run)
    names = [name for name in means.names() if name.startswith("vae.autoencoder.")]
    assert {name.removeprefix("vae.autoencoder.") for name in names} == written.keys()
    for name in names:
        assert torch.equal(written[name.removeprefix("vae.autoencoder.")], means.get(name))
    moved = [not torch.equal(means.get(name), last.get(name)) for name in names]
    assert sum(moved) > len(moved) // 2  # it is the running means that are written
    recipe = read(run / "recipe.yaml")
    spec = spec_of(recipe.family, recipe.phase)
    layer: Any = load_layers(spec, recipe.model, means, torch.device("cpu"))["vae"]
    theirs: Any = AutoencoderKL.from_pretrained(world.folder / "vae")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = layer.moments(pixels).chunk(2, 1)[0]
        torch.testing.assert_close(theirs.encode(pixels).latent_dist.mean, mean)
        torch.testing.assert_close(theirs.decode(mean).sample, layer.decode(mean))
    assert theirs.config.scaling_factor == 1.0
    lines = world.train("by-it", 1, *OVERRIDES, recipe=TINY)
    assert len(lines) == 3 and lines[-1]["loss_image"] > 0
    again = ("convert", "runs/one", "--as", "vae", "--out", "vae")
    assert world.run(1, *again) == [74] and "nothing was overwritten" in world.last_log
    for form in ("emu", "llama"):
        asked = ("convert", "runs/by-it", "--as", form, "--out", "nothing.bin")
        assert world.run(1, *asked) == [65]
        (said,) = [line for line in world.last_log.splitlines() if line.startswith("mmtrain: ")]
        assert f"weights of the kind transfusion cannot be written as {form}" in said
        assert "Traceback" not in world.last_log and not (world.folder / "nothing.bin").exists()
    assert world.run(1, "convert", "runs/by-it", "--as", "vae", "--out", "nothing") == [65]
    assert world.run(1, "convert", "runs/one", "--as", "llama", "--out", "nothing") == [65]
    assert "weights of the kind vae cannot be written as llama; their forms: vae" in world.last_log
    assert world.run(1, "convert", "runs/one", "--out", "full") == [0]
    assert json.loads((world.folder / "full/mmtrain.json").read_text())["kind"] == "vae"
    assert world.run(1, "sample", "runs/one", "--prompt", "a red circle") == [65]
    assert "trains no model that writes" in world.last_log
