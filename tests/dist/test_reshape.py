"""A checkpoint of any layout goes on under any other, in the run and cut beforehand."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from world import World, kept

LAYOUTS = {
    "one": (1,),
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "tp2-pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "dp2-zero1": (2, "parallel.zero_stage=1"),
    "dp2-zero3": (2, "parallel.zero_stage=3"),
    "tp2-zero3": (4, "parallel.tensor=2", "parallel.zero_stage=3"),
}
SHORT = ("train.steps=10", "save.every_steps=5", "schedule.warmup_steps=2", "data.workers=0")
PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]
# the others are slow; here every way of cutting is once a source and once a target
CIRCLE = list(pairwise(["one", "tp2-pp2", "dp2-zero3", "tp2", "one"]))


@pytest.fixture(scope="module")
def whole(world: World) -> Callable[[str], str]:
    """Name of an uninterrupted run of ten steps on a layout, with a checkpoint of step 5."""
    made: dict[str, str] = {}

    def run(layout: str) -> str:
        if layout not in made:
            ranks, *overrides = LAYOUTS[layout]
            world.train(f"whole-{layout}", ranks, *SHORT, *overrides)
            made[layout] = f"whole-{layout}"
        return made[layout]

    return run


def losses(world: World, name: str) -> list[float]:
    return [line["loss"] for line in world.metrics(name) if line["step"] > 5]


def begin_from_step_5(world: World, source: str, name: str) -> None:
    """A run folder that holds only the checkpoint of step 5 of another."""
    step = "checkpoints/step-00000005"
    shutil.copytree(world.folder / "runs" / source / step, world.folder / "runs" / name / step)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(*pair, id="->".join(pair), marks=() if pair in CIRCLE else pytest.mark.slow)
        for pair in PAIRS
    ],
)
def test_a_run_goes_on_under_another_layout(
    world: World, whole: Callable[[str], str], source: str, target: str
) -> None:
    name = f"{source}-to-{target}"
    ranks, *overrides = LAYOUTS[target]
    begin_from_step_5(world, whole(source), name)
    world.train(name, ranks, *SHORT, *overrides)
    assert len(losses(world, name)) == 5
    assert losses(world, name) == pytest.approx(losses(world, whole(source)), rel=1e-6)


def test_a_checkpoint_is_cut_there_and_back_to_the_last_bit(
    world: World, whole: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through other layouts; at the end it is what it was, byte for byte of every tensor."""
    start = whole("one")
    first = world.folder / "runs" / start / "checkpoints/step-00000010"
    before = kept(first)
    assert {kind for kind, _ in before} == {"weight", "moment.exp_avg", "moment.exp_avg_sq"}
    run = f"runs/{start}"
    for layout in ("tp2-pp2", "tp2-zero3", "dp2-zero1", "one"):
        ranks, *overrides = LAYOUTS[layout]
        out = f"runs/cut-{layout}"
        plain = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.zero_stage=1")
        words = ("--ranks", str(ranks), *plain, *overrides)
        assert world.tool_here(monkeypatch, "reshape_checkpoint.py", run, out, *words) == 0
        folder = world.folder / out / "checkpoints/step-00000010"
        dims = json.loads((folder / "manifest.json").read_text())["dims"]
        assert dims["tensor"] * dims["pipeline"] * dims["data"] == ranks
        after = kept(folder)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before), layout
        run = out


def test_a_checkpoint_that_was_cut_beforehand_goes_on_too(
    world: World, whole: Callable[[str], str]
) -> None:
    begin_from_step_5(world, whole("tp2"), "to-cut")
    recipe = (world.folder / "runs" / whole("tp2") / "recipe.yaml").read_text()
    (world.folder / "runs/to-cut/recipe.yaml").write_text(recipe)
    done = world.tool(
        "reshape_checkpoint.py", "runs/to-cut", "runs/was-cut", "--ranks", "2",
        "parallel.tensor=1", "parallel.zero_stage=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert world.run(2, "train", "runs/was-cut/recipe.yaml") == [0, 0], world.last_log
    assert losses(world, "was-cut") == pytest.approx(losses(world, whole("tp2")), rel=1e-6)
    log = (world.folder / "runs/was-cut/log.txt").read_text()
    assert "goes on from" in log and "cut for" not in log
