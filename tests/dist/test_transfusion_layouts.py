"""Transfusion gives the same losses on any parallel layout: noise and times belong to samples."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_layouts import KEYS, check_equal
from world import REPOSITORY, World

from mmtrain.errors import ExitCode
from mmtrain.feed import open_sources, read_setting
from mmtrain.generation.sketches import draw_pairs, find_pairs
from mmtrain.recipe import read
from mmtrain.trained import load_run

TINY = REPOSITORY / "configs/transfusion/tiny.yaml"
STEPS = "train.steps=6"

# both halves of a U-Net, skips and all, with the trunk between them
UNET = (
    "model.image.edge=unet",
    "model.image.unet_channels=[8,8,16]",
    "model.image.unet_blocks=1",
    "model.image.unet_head_width=4",
    "model.image.norm_groups=4",
)

LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "pp2-after-the-edge": (2, "parallel.pipeline=2", "parallel.bounds=[1]"),
    "tp2-pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "dp2-zero0": (2, "parallel.zero_stage=0"),
    "dp2-zero1": (2, "parallel.zero_stage=1"),
    "dp2-zero2": (2, "parallel.zero_stage=2"),
    "dp2-zero3": (2, "parallel.zero_stage=3"),
    "tp2-zero3": (2, "parallel.tensor=2", "parallel.zero_stage=3"),
    "tp2-sequence": (2, "parallel.tensor=2", "parallel.sequence=true"),
    "tp2-pp2-sequence": (
        4,
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=true",
    ),
    "recompute": (1, "parallel.recompute=full"),
    "two-workers": (1, "data.workers=2"),
    "accumulation-1": (1, "train.micro_batch_packs=8"),
}
# what they combine is checked in another combination
SLOW = {
    "pp2",
    "tp2-zero3",
    "dp2-zero0",
    "dp2-zero1",
    "dp2-zero2",
    "tp2",
    "tp2-pp2",
    "tp2-sequence",
    "recompute",
}


def trained(world: World, name: str, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return world.train(name, ranks, STEPS, *overrides, recipe=TINY)


@pytest.fixture(scope="module")
def reference(world: World) -> list[dict[str, Any]]:
    """One rank."""
    return trained(world, "one-rank", 1)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def test_training_does_not_depend_on_the_layout(
    world: World, reference: list[dict[str, Any]], layout: str
) -> None:
    ranks, *overrides = LAYOUTS[layout]
    check_equal(trained(world, layout, ranks, *overrides), reference)
    assert reference[0]["images"] > 0 and reference[0]["loss_image"] > 0.5


@pytest.mark.parametrize(
    "layout",
    [
        "pp2-after-the-edge",
        pytest.param("tp2-pp2-sequence", marks=pytest.mark.slow),
        pytest.param("dp2-zero3", marks=pytest.mark.slow),
        pytest.param("tp2-zero3", marks=pytest.mark.slow),
    ],
)
def test_a_unet_edge_does_not_depend_on_the_layout(world: World, layout: str) -> None:
    ranks, *overrides = LAYOUTS[layout]
    steps = "train.steps=3"
    one = trained(world, f"unet-one-{layout}", 1, *UNET, steps, "schedule.warmup_steps=1")
    many = trained(
        world, f"unet-{layout}", ranks, *UNET, *overrides, steps, "schedule.warmup_steps=1"
    )
    check_equal(many, one)


# one position an image; clean copies, whose noised ones nothing behind them sees
SHARED_COPIES = ("model.image.positions=shared", "model.noise.context=copies")


@pytest.mark.parametrize(
    "layout",
    [
        "pp2-after-the-edge",
        pytest.param("tp2-pp2-sequence", marks=pytest.mark.slow),
        pytest.param("dp2-zero3", marks=pytest.mark.slow),
        pytest.param("tp2-zero3", marks=pytest.mark.slow),
        pytest.param("accumulation-1", marks=pytest.mark.slow),
        pytest.param("two-workers", marks=pytest.mark.slow),
    ],
)
def test_copies_with_shared_positions_do_not_depend_on_the_layout(
    world: World, layout: str
) -> None:
    ranks, *overrides = LAYOUTS[layout]
    switches = (*SHARED_COPIES, "train.steps=3", "schedule.warmup_steps=1")
    one = trained(world, f"copies-one-{layout}", 1, *switches)
    check_equal(trained(world, f"copies-{layout}", ranks, *switches, *overrides), one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2-pp2-sequence", "dp2-zero2", "two-workers"])
def test_clean_prefixes_do_not_depend_on_the_layout(world: World, layout: str) -> None:
    ranks, *overrides = LAYOUTS[layout]
    switches = ("model.noise.context=prefix_clean", *UNET, "train.steps=3")
    one = trained(world, f"clean-one-{layout}", 1, *switches, "schedule.warmup_steps=1")
    many = (*switches, *overrides, "schedule.warmup_steps=1")
    check_equal(trained(world, f"clean-{layout}", ranks, *many), one)


@pytest.mark.slow
def test_switches_of_the_family_do_not_depend_on_the_layout(world: World) -> None:
    switches = (
        "model.language.qk_norm=rms",
        "model.language.kv_heads=2",
        "model.noise.path=linear",
        "model.noise.answer=velocity",
        "model.noise.times=logit_normal",
        "model.image.attention=causal",
        "model.image.position_std=0.3",
    )
    one = trained(world, "switches-one", 1, *switches)
    ranks, *overrides = LAYOUTS["tp2-pp2-sequence"]
    check_equal(trained(world, "switches-four", ranks, *switches, *overrides), one)


@pytest.mark.parametrize(
    "ranks, layout",
    [
        pytest.param(1, (), id="one-rank", marks=pytest.mark.slow),
        pytest.param(4, LAYOUTS["tp2-pp2"][1:], id="tp2-pp2", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_to_the_last_bit(world: World, ranks: int, layout: tuple[str, ...]) -> None:
    asked = ("save.every_steps=3", "save.keep=9", "save.background=false", *layout)
    name = f"resumed-{ranks}"
    whole = trained(world, name, ranks, *asked)
    shutil.rmtree(world.folder / "runs" / name / "checkpoints/step-00000006")
    again = trained(world, name, ranks, *asked)
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6]
    for line, wanted in zip(again, whole, strict=True):
        assert all(line[key] == wanted[key] for key in KEYS), line["step"]


@pytest.mark.parametrize(
    "kept, asked, fault",
    [
        ("shared", "raster", "image.grid.columns: not in the model"),
        pytest.param(
            "raster",
            "shared",
            "image.grid.columns: not in the checkpoint",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_of_other_positions_is_refused(
    world: World, kept: str, asked: str, fault: str
) -> None:
    name, key = f"positions-{kept}", "model.image.positions"
    steps = ("train.steps=1", "schedule.warmup_steps=0", "save.every_steps=1")
    world.train(name, 1, f"{key}={kept}", *steps, recipe=TINY)
    argv = ("train", str(TINY), f"name={name}", f"{key}={asked}", *steps, "train.steps=2")
    assert world.run(1, *argv) == [ExitCode.CONTENT]
    assert "another model wrote it" in world.last_log and fault in world.last_log
    start = (f"train.initialize_from=runs/{name}", f"name={name}-next", *argv[3:])
    assert world.run(1, "train", str(TINY), *start) == [ExitCode.CONTENT]
    assert "does not fit the model" in world.last_log


DRAWS = ("log.images_every_steps=3", "train.ema=0.9")


def test_pictures_drawn_while_training_change_nothing_and_are_those_of_the_running_means(
    world: World, reference: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = trained(world, "drawn", 1, *DRAWS)
    for line, wanted in zip(drawn, reference, strict=True):
        assert all(line[key] == wanted[key] for key in KEYS), line["step"]
    check_equal(trained(world, "drawn-zero3", 2, *DRAWS, "parallel.zero_stage=3"), reference)
    monkeypatch.chdir(world.folder)
    pages = [page_of(Path("runs", name), 6) for name in ("drawn", "drawn-zero3")]
    assert np.abs(pages[0] - pages[1]).max() <= 2  # sums of two ranks round otherwise
    assert not np.array_equal(pages[0], page_of(Path("runs/drawn"), 3))  # weights have moved on
    setting = read_setting(read(Path("runs/drawn/recipe.yaml")))
    pairs = find_pairs(open_sources(setting, setting.recipe.data.sources))
    assert len(pairs) == 8
    again = np.asarray(draw_pairs(load_run(Path("runs/drawn")), pairs), np.int64)
    np.testing.assert_array_equal(again, pages[0])


def test_tensor_ranks_say_that_they_draw_nothing(world: World) -> None:
    asked = ("parallel.tensor=2", "train.steps=3", "schedule.warmup_steps=1")
    trained(world, "drawn-tp2", 2, *DRAWS, *asked)
    assert "step 3 draws no pictures" in (world.folder / "runs/drawn-tp2/log.txt").read_text()
    assert not (world.folder / "runs/drawn-tp2/samples").exists()


def page_of(run: Path, step: int) -> Any:
    return np.asarray(Image.open(run / f"samples/step-{step:08d}.png"), np.int64)
