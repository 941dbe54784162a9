"""The same recipe gives the same losses on any parallel layout, through the front door."""

from typing import Any

import pytest
from world import World

KEYS = ("loss", "loss_text", "loss_image", "grad_norm", "tokens", "images")

# ranks, then overrides
LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "pp3": (3, "parallel.pipeline=3"),
    "pp2-inside-vision": (2, "parallel.pipeline=2", "parallel.bounds=[2]"),
    "tp2-pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "dp2-zero0": (2, "parallel.zero_stage=0"),
    "dp2-zero1": (2, "parallel.zero_stage=1"),
    "dp2-zero2": (2, "parallel.zero_stage=2"),
    "dp2-zero3": (2, "parallel.zero_stage=3"),
    "tp2-zero3": (2, "parallel.tensor=2", "parallel.zero_stage=3"),
    "tp2-pp2-dp2": (8, "parallel.tensor=2", "parallel.pipeline=2"),
    "tp2-sequence": (2, "parallel.tensor=2", "parallel.sequence=true"),
    "tp2-pp2-sequence": (
        4,
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=true",
    ),
    "recompute": (1, "parallel.recompute=full"),
    "tp2-recompute-zero3": (
        2,
        "parallel.tensor=2",
        "parallel.zero_stage=3",
        "parallel.recompute=full",
    ),
    "accumulation-2": (1, "train.micro_batch_packs=4"),
    "accumulation-1": (1, "train.micro_batch_packs=8"),
}


@pytest.fixture(scope="module")
def reference(world: World) -> list[dict[str, Any]]:
    """20 steps on one rank, 8 micro-batches each."""
    return world.train("one-rank", 1)


def check_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every step's losses, norm and counts agree to 1e-5."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for key in KEYS:
            assert line[key] == pytest.approx(wanted[key], rel=1e-5), (line["step"], key)


def test_the_reference_run_learns_and_sees_every_kind_of_pack(
    reference: list[dict[str, Any]],
) -> None:
    assert len(reference) == 20
    assert reference[-1]["loss_text"] < 0.95 * reference[0]["loss_text"]
    assert reference[-1]["loss_image"] < 0.5 * reference[0]["loss_image"]
    sources = {key.partition("/")[2] for line in reference for key in line if "/" in key}
    assert sources == {"captions", "pages", "clips", "boards", "text"}


# what they combine is always checked in another combination
SLOW = {"tp2-pp2", "tp2-sequence", "tp2-recompute-zero3"}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def test_training_does_not_depend_on_the_layout(
    world: World, reference: list[dict[str, Any]], layout: str
) -> None:
    ranks, *overrides = LAYOUTS[layout]
    check_equal(world.train(layout, ranks, *overrides), reference)


@pytest.mark.parametrize("switches", [("layer", "cosine"), ("rms", "dot")])
def test_trunk_switches_do_not_depend_on_the_layout(
    world: World, switches: tuple[str, str]
) -> None:
    norm, attention = switches
    chosen = [f"model.language.qk_norm={norm}", f"model.language.attention={attention}"]
    one = world.train(f"{norm}-{attention}-1", 1, *chosen)
    two = world.train(
        f"{norm}-{attention}-2", 2, *chosen, "parallel.tensor=2", "parallel.sequence=true"
    )
    check_equal(two, one)


def test_grouped_queries_do_not_depend_on_the_layout(world: World) -> None:
    grouped = "model.language.kv_heads=2"
    one = world.train("grouped-1", 1, grouped)
    four = world.train("grouped-4", 4, grouped, "parallel.tensor=2", "parallel.pipeline=2")
    check_equal(four, one)


# one document fits a pack, and a document is either one picture with its caption or text alone
SPLIT = (
    "data.pack_tokens=24",
    "data.pack_images=1",
    "data.sources.pages=null",
    "data.sources.clips=null",
    "data.sources.boards=null",
    "data.sources.captions.max_tokens=24",
    "data.sources.captions.weight=1",
    "data.sources.text.max_tokens=24",
    "train.global_batch_packs=2",
)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_rank_with_text_alone_trains_beside_one_with_images(world: World, zero: int) -> None:
    """Ranks without images must enter the same collectives, and change nothing."""
    one = world.train(f"split-{zero}-1", 1, *SPLIT)
    two = world.train(f"split-{zero}-2", 2, *SPLIT, f"parallel.zero_stage={zero}")
    check_equal(two, one)
    mixed = [line for line in one if "loss_text/text" in line and "loss_image/captions" in line]
    text_alone = [line for line in one if line["images"] == 0]
    assert len(mixed) >= 5 and text_alone, "the data must put text and images on different ranks"
    assert all(line["loss_image"] == 0.0 for line in text_alone)
