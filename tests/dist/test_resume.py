"""Ten steps equal five, a save, new processes and five more: to the last bit."""

from pathlib import Path

import pytest
import torch
from world import TINY, World

from mmtrain.checkpoint.portable import open_tensors

LAYOUTS = {
    "one-rank": (1,),
    "two-workers": (1, "data.workers=2"),
    "tp2-dp2": (4, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2-zero3": (2, "parallel.zero_stage=3"),
    "dp2-zero0-bf16": (2, "parallel.zero_stage=0", "train.precision=bf16"),
    "pp2-bf16": (2, "parallel.pipeline=2", "train.precision=bf16"),
}
MEASURED = {
    "tokens_per_second",
    "images_per_second",
    "step_seconds",
    "data_seconds",
    "mfu",
    "peak_tflops",
}
SHORT = ("train.steps=10", "save.every_steps=5", "schedule.warmup_steps=2")


def numbers(world: World, name: str) -> list[dict[str, float]]:
    """Metrics without what a clock measured."""
    return [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in world.metrics(name)
    ]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name == "pp2-bf16" else ()) for name in LAYOUTS],
)
def test_a_resumed_run_continues_bit_for_bit(world: World, layout: str) -> None:
    ranks, *overrides = LAYOUTS[layout]
    whole, cut = f"whole-{layout}", f"cut-{layout}"
    world.train(whole, ranks, *SHORT, *overrides)
    world.train(cut, ranks, *SHORT, *overrides)
    folder = world.folder / "runs" / cut / "checkpoints"
    _forget(folder / "step-00000010")  # as if the processes had died after step 5
    world.train(cut, ranks, *SHORT, *overrides)
    assert numbers(world, cut) == numbers(world, whole)
    assert "goes on from runs" in (world.folder / "runs" / cut / "log.txt").read_text()
    left, right = (open_tensors(world.folder / "runs" / name) for name in (whole, cut))
    assert left.names() == right.names()
    assert all(torch.equal(left.get(name), right.get(name)) for name in left.names())


def _forget(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("recipe", ["tiny", "tiny_instruct"])  # the latter with dropout
def test_training_draws_from_no_generator_that_a_checkpoint_lacks(
    world: World, recipe: str
) -> None:
    words = ("train", str(TINY.with_name(f"{recipe}.yaml")), f"name=draws-{recipe}")
    short = ("train.steps=3", "schedule.warmup_steps=1", "train.initialize_from=null")
    assert world.run(1, *words, *short, patch="failing:watch_generators:") == [0], world.last_log


def test_full_tensors_of_every_layout_are_the_same(world: World) -> None:
    """Slices, stages and partitions are merged by name; only rounding differs."""
    layouts = {
        "merge-1": (1,),
        "merge-tp2": (2, "parallel.tensor=2"),
        "merge-pp2": (2, "parallel.pipeline=2"),
        "merge-zero3": (2, "parallel.zero_stage=3"),
    }
    opened = []
    for name, (ranks, *overrides) in layouts.items():
        world.train(name, ranks, "train.steps=1", "schedule.warmup_steps=1", *overrides)
        opened.append(open_tensors(world.folder / "runs" / name))
    first, *others = opened
    for other in others:
        assert other.names() == first.names()
        for name in first.names():
            assert other.shape(name) == first.shape(name)
            torch.testing.assert_close(other.get(name), first.get(name), rtol=1e-4, atol=2e-5)


def test_a_run_can_begin_from_the_weights_of_another(world: World) -> None:
    world.train("teacher", 1, "train.steps=3", "schedule.warmup_steps=1")
    begin = f"train.initialize_from={world.folder / 'runs' / 'teacher'}"
    frozen = ("train.steps=1", "schedule.warmup_steps=1", "optimizer.learning_rate=0")
    still = ("optimizer.learning_rates.vision=0", "optimizer.learning_rates.causal=0")
    world.train("pupil", 2, begin, *frozen, *still, "parallel.tensor=2")
    teacher, pupil = (open_tensors(world.folder / "runs" / n) for n in ("teacher", "pupil"))
    assert all(torch.equal(teacher.get(name), pupil.get(name)) for name in teacher.names())


def test_frozen_parts_do_not_move_and_the_others_do(world: World) -> None:
    world.train(
        "start",
        1,
        "train.steps=1",
        "schedule.warmup_steps=1",
        "optimizer.learning_rate=0",
        "optimizer.learning_rates.vision=0",
        "optimizer.learning_rates.causal=0",
    )
    frozen = "train.freeze=[vision,vision_norm]"
    for name, ranks, layout in (("f1", 1, ()), ("f2", 2, ("parallel.pipeline=2",))):
        world.train(name, ranks, "train.steps=3", "schedule.warmup_steps=1", frozen, *layout)
        before, after = (open_tensors(world.folder / "runs" / n) for n in ("start", name))
        moved = {n for n in before.names() if not torch.equal(before.get(n), after.get(n))}
        assert not [n for n in moved if n.startswith("vision")]
        assert {"embed.tokens.weight", "causal.queries", "head.regress.weight"} <= moved
    assert world.metrics("f1")[-1]["loss"] == pytest.approx(
        world.metrics("f2")[-1]["loss"], rel=1e-5
    )
