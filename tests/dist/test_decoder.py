"""The decoder phase through the front door: layouts, resuming, conditions made before, drawings."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from world import REPOSITORY, World

from mmtrain.checkpoint.portable import open_averaged, open_tensors
from mmtrain.decoder.drawers import load_drawer

RECIPE = REPOSITORY / "configs/emu/tiny_decoder.yaml"
KEYS = ("loss", "loss_noise", "grad_norm", "tokens", "images", "documents")
MEASURED = {"tokens_per_second", "images_per_second", "step_seconds", "data_seconds", "mfu"}
# ranks, then overrides
LAYOUTS = {
    "one-rank": (1,),
    "dp2-zero1": (2, "parallel.zero_stage=1"),
    "dp2-zero2": (2, "parallel.zero_stage=2"),
    "dp2-zero3": (2, "parallel.zero_stage=3"),
}


def decode(world: World, name: str, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    """Train the tiny decoder; returns the lines of `metrics.jsonl`."""
    found = world.run(ranks, "train", str(RECIPE), f"name={name}", *overrides)
    assert found == [0] * ranks, f"{name}: exit codes {found}\n{world.last_log}"
    return world.metrics(name)


@pytest.fixture(scope="module")
def language(world: World) -> Path:
    """The frozen model: a few steps of the tiny recipe."""
    world.train("tiny", 1, "train.steps=2", "schedule.warmup_steps=1")
    return world.folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def trained(world: World, language: Path) -> dict[str, list[dict[str, Any]]]:
    """20 steps on every layout, saved at 10 and 20."""
    return {
        name: decode(world, name, ranks, "save.every_steps=10", *overrides)
        for name, (ranks, *overrides) in LAYOUTS.items()
    }


def check_equal(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 1e-5
) -> None:
    """Every step's loss, norm and counts agree."""
    assert len(found) == len(expected) == 20
    for line, wanted in zip(found, expected, strict=True):
        for key in KEYS:
            assert line[key] == pytest.approx(wanted[key], rel=tolerance), (line["step"], key)


def test_the_decoder_learns_and_follows_its_schedule(
    trained: dict[str, list[dict[str, Any]]],
) -> None:
    lines = trained["one-rank"]
    assert sum(line["loss"] for line in lines[-4:]) < 0.8 * sum(line["loss"] for line in lines[:4])
    rates = [line["learning_rate"] for line in lines]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3])
    assert rates[11:13] == pytest.approx([2e-3, 1e-3]) and rates[16] == pytest.approx(2e-4)
    assert {line["images"] for line in lines} == {8} and lines[0]["tokens"] == 8 * 4


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one-rank"])
def test_training_does_not_depend_on_the_layout(
    world: World, trained: dict[str, list[dict[str, Any]]], layout: str
) -> None:
    check_equal(trained[layout], trained["one-rank"])
    runs = [world.folder / "runs" / name for name in (layout, "one-rank")]
    for opener in (open_tensors, open_averaged):
        found, wanted = (opener(run) for run in runs)
        assert found.names() == wanted.names()
        for name in wanted.names():
            torch.testing.assert_close(found.get(name), wanted.get(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["one-rank", "dp2-zero1", "dp2-zero3"])
def test_a_resumed_run_continues_bit_for_bit(
    world: World, trained: dict[str, list[dict[str, Any]]], layout: str
) -> None:
    ranks, *overrides = LAYOUTS[layout]
    runs = world.folder / "runs"
    cut = runs / f"cut-{layout}"
    shutil.copytree(runs / layout, cut)
    shutil.rmtree(cut / "checkpoints/step-00000020")  # as if the processes had died after step 10
    resumed = decode(world, cut.name, ranks, "save.every_steps=10", *overrides)
    assert "goes on from runs" in (cut / "log.txt").read_text()
    for line, wanted in zip(resumed, trained[layout], strict=True):
        assert {k: v for k, v in line.items() if k not in MEASURED | {"peak_tflops"}} == {
            k: v for k, v in wanted.items() if k not in MEASURED | {"peak_tflops"}
        }
    for opener in (open_tensors, open_averaged):
        left, right = opener(runs / layout), opener(cut)
        assert all(torch.equal(left.get(name), right.get(name)) for name in left.names())


def test_running_means_are_what_their_formula_says(world: World, language: Path) -> None:
    """Weights of every step are saved; each mean is computed again from the one before."""
    decode(world, "steps", 1, "train.steps=4", "save.every_steps=1", "save.keep=9")
    folders = sorted((world.folder / "runs/steps/checkpoints").iterdir())
    name = "unet.conv_in.weight"
    mean = open_averaged(folders[0]).get(name)
    for step, folder in enumerate(folders[1:], 2):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * open_tensors(folder).get(name)
        torch.testing.assert_close(open_averaged(folder).get(name), mean)
    assert not torch.equal(mean, open_tensors(folders[-1]).get(name))


def test_conditions_made_before_give_the_losses_of_those_made_in_the_loop(
    world: World, trained: dict[str, list[dict[str, Any]]]
) -> None:
    made = world.tool("encode_latents.py", str(RECIPE), "latents", "--part-documents", "100")
    assert made.returncode == 0, made.stderr
    assert "270 documents encoded, 0 left out" in made.stdout
    # other micro-batches round otherwise: 1e-7 of a loss
    cached = decode(world, "cached", 2, "decoder.cached=latents")
    check_equal(cached, trained["one-rank"])
    # a frozen model that was trained on is another one
    other = world.folder / "runs/tiny-longer"
    world.train(other.name, 1, "train.steps=1", "schedule.warmup_steps=1")
    stale = ("train", str(RECIPE), "name=stale", "decoder.cached=latents")
    assert world.run(1, *stale, f"decoder.language={other}") == [65]
    assert "latents is stale: language: made with" in world.last_log
    shutil.rmtree(next((world.folder / "latents").glob("captions-*/000000000100-000000000200")))
    assert world.run(1, *stale) == [66]
    assert "documents from 100 on are not there" in world.last_log


def test_an_autoencoder_on_latents_of_a_vae(world: World, language: Path) -> None:
    """Emu2's variant: the encoder's own rows as conditions; latents drawn or their mode."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.save_pretrained(world.folder / "vae")
    asked = (
        "decoder.condition=encoder",
        "decoder.unconditional=zeros",
        f"decoder.vae={world.folder / 'vae'}",
        "decoder.snr_limit=20",
        "model.sample_channels=4",
        "train.steps=2",
        "schedule.warmup_steps=1",
        "log.images_every_steps=2",
    )
    drawn = decode(world, "drawn", 1, *asked)
    mode = decode(world, "mode", 1, *asked, "decoder.latent=mode")
    assert drawn[0]["loss"] != mode[0]["loss"]
    picture = Image.open(world.folder / "runs/drawn/samples/step-00000002.png")
    assert picture.width == 520
    (image,) = load_drawer(world.folder / "runs/drawn").draw(
        torch.zeros(1, 4, 32), null_QD=None, scheduler="ddim", steps=2, guidance=2.0, seeds=[0]
    )
    assert image.size == (16, 16)


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "dpm"])
def test_neither_batch_nor_order_changes_a_picture(
    world: World, trained: dict[str, list[dict[str, Any]]], scheduler: str
) -> None:
    drawer = load_drawer(world.folder / "runs/dp2-zero3")
    rows_BQD = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))

    def draw(which: list[int], guidance: float = 3.0) -> list[Image.Image]:
        return drawer.draw(
            rows_BQD[which],
            null_QD=torch.ones(4, 32),
            scheduler=scheduler,
            steps=5,
            guidance=guidance,
            seeds=[7 + k for k in which],
        )

    first, second, third = draw([0, 1, 2])
    back = draw([2, 0])
    assert _distance(back[0], third) <= 1 and _distance(back[1], first) <= 1  # rounding
    assert _distance(first, second) > 8
    assert _distance(draw([0], guidance=1.0)[0], first) > 0


def _distance(one: Image.Image, other: Image.Image) -> int:
    left, right = (
        torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in (one, other)
    )
    return int((left.int() - right.int()).abs().max())


def test_every_fault_of_the_phase_is_told_at_once(world: World, language: Path) -> None:
    codes = world.run(
        1,
        "train",
        str(RECIPE),
        "parallel.tensor=2",
        "parallel.recompute=full",
        "data.pack_images=2",
        "data.sources.captions.rule=document",
        "decoder.condition=encoder",
        "decoder.drop=1.5",
        "decoder.draw.steps=2000",
        "train.ema=1",
        "schedule.decay=cosine",
        "model.condition_width=48",
        "decoder.vae=nowhere",
        "train.loss_weights.text=1",
    )
    assert codes == [2]
    wanted = (
        "parallel.tensor: found 2; the UNet is one layer",
        "parallel.recompute: found full",
        "data.pack_images: found 2; in the decoder phase a pack is one picture",
        "data.sources.captions.rule: found document",
        "decoder.unconditional: prompt is written after a text",
        "decoder.drop: found 1.5",
        "decoder.draw.steps: found 2000",
        "train.ema: found 1.0",
        "schedule.steps: found 2 steps with schedule.decay = cosine",
        "model.condition_width: found 48, but the rows of decoder.language are 32 wide",
        "decoder.vae: nowhere is no VAE folder",
        "train.loss_weights.text: the family emu has no such loss",
    )
    assert [text for text in wanted if text not in world.last_log] == []


def test_a_run_of_another_phase_draws_nothing(language: Path) -> None:
    with pytest.raises(Exception, match="is a run of the phase pretrain"):
        load_drawer(language)
