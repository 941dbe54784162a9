"""Whatever happens to a save or to a checkpoint, the run goes on from the last whole one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from world import TINY, World

from mmtrain.checkpoint import store
from mmtrain.cli import main

SHORT = ("train.steps=8", "save.every_steps=2", "schedule.warmup_steps=2", "save.keep=2")
QUIET = ("data.workers=0", "validate.every_steps=0", "log.images_every_steps=0")
RANKS = 2


def losses(world: World, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in world.metrics(name)]


def steps(world: World, name: str) -> list[int]:
    root = world.folder / "runs" / name / "checkpoints"
    return [store.step_of(folder) for folder in store.committed(root)]


def text(world: World, name: str) -> str:
    return (world.folder / "runs" / name / "log.txt").read_text()


@pytest.fixture(scope="module")
def whole(world: World) -> str:
    """An uninterrupted run."""
    world.train("whole", RANKS, *SHORT, *QUIET)
    return "whole"


@pytest.fixture
def copied(world: World, whole: str) -> Callable[[str], Path]:
    """A run as after eight steps, under another name; returns its checkpoints."""

    def copy(name: str) -> Path:
        shutil.copytree(world.folder / "runs" / whole, world.folder / "runs" / name)
        return world.folder / "runs" / name / "checkpoints"

    return copy


def test_saves_in_the_background_and_at_once_leave_the_same_run(world: World, whole: str) -> None:
    world.train("at-once", RANKS, *SHORT, *QUIET, "save.background=false")
    assert losses(world, "at-once") == losses(world, whole)
    assert steps(world, "at-once") == steps(world, whole) == [6, 8]
    files = [
        {
            path.name: path.read_bytes()
            for path in (world.folder / f"runs/{name}/checkpoints/step-00000008").iterdir()
            if path.suffix == ".safetensors"
        }
        for name in (whole, "at-once")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == RANKS


def test_multiples_of_a_step_are_kept_for_ever(world: World) -> None:
    world.train("kept", 1, *SHORT, *QUIET, "save.keep=1", "save.keep_every_steps=4")
    assert steps(world, "kept") == [4, 8]


KILLS = [
    ("begin", 0, 3),
    ("write", 0, 40),  # in the middle of the first or second file
    ("write", 1, 40),
    ("hash", 1, 3),
    ("commit", 0, 3),
    ("manifest", 0, 3),
    ("rename", 0, 3),
    ("retention", 0, 3),
    ("removal", 0, 1),
]
QUICK = {("write", 1, "true"), ("write", 0, "false"), ("manifest", 0, "true"),
         ("rename", 0, "true"), ("removal", 0, "true")}  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "rank", "number", "background"),
    [
        pytest.param(*kill, how, marks=() if (*kill[:2], how) in QUICK else pytest.mark.slow)
        for kill in KILLS
        for how in ("true", "false")
    ],
)
def test_a_rank_killed_while_saving_loses_no_checkpoint(
    world: World, whole: str, phase: str, rank: int, number: int, background: str
) -> None:
    name = f"killed-{phase}-{rank}-{background}"
    words = ("train", str(TINY), f"name={name}", *SHORT, *QUIET, f"save.background={background}")
    codes = world.run(RANKS, *words, patch=f"failing:kill_in_save:{rank} {phase} {number}")
    assert codes[rank] == -9, world.last_log
    assert codes[1 - rank] != 0
    before = steps(world, name)
    root = world.folder / "runs" / name / "checkpoints"
    for folder in store.committed(root):
        assert list(store.faults(folder)) == []
    assert world.run(RANKS, *words) == [0, 0], world.last_log
    assert losses(world, name) == losses(world, whole)
    assert steps(world, name) == [6, 8]
    assert (f"goes on from runs/{name}" in text(world, name)) == bool(before)
    assert not [path for path in root.iterdir() if path.suffix]  # nothing half is left


def damage_weights(folder: Path) -> str:
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    return "sha256"


def truncate_weights(folder: Path) -> str:
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return "bytes, the manifest says"


def remove_weights(folder: Path) -> str:
    (folder / "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors: missing"


def cut_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:200])
    return "manifest.json: not JSON"


def empty_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{}")
    return "format version None"


def remove_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json: not found"


@pytest.mark.parametrize(
    "damage",
    [
        damage_weights,
        pytest.param(truncate_weights, marks=pytest.mark.slow),
        remove_weights,
        cut_manifest,
        pytest.param(empty_manifest, marks=pytest.mark.slow),
        pytest.param(remove_manifest, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    world: World,
    whole: str,
    copied: Callable[[str], Path],
    damage: Callable[[Path], str],
) -> None:
    name = f"one-{damage.__name__}"
    root = copied(name)
    reason = damage(root / "step-00000008")
    (root / "latest").write_text("step-000")  # nothing reads such a file
    world.train(name, RANKS, *SHORT, *QUIET)
    assert losses(world, name) == losses(world, whole)
    said = next(line for line in text(world, name).splitlines() if "step-00000006 is used" in line)
    assert reason in said
    assert (root / "step-00000008.damaged").is_dir()
    assert list(store.faults(root / "step-00000008")) == []


def test_check_looks_at_every_byte_of_a_run(
    world: World, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied("checked")
    assert main(["check", str(root.parent)]) == 0
    assert capsys.readouterr().out.count("sound") == 2
    damage_weights(root / "step-00000006")
    assert main(["check", str(root.parent)]) == 65
    said = capsys.readouterr()
    assert "step-00000006" in said.out.splitlines()[0] and "damaged" in said.out.splitlines()[0]
    assert "rank-00001.safetensors" in said.out
    assert "1 of 2 checkpoint(s) damaged" in said.err
    shutil.rmtree(root)
    assert main(["check", str(root.parent)]) == 66


def test_with_every_checkpoint_damaged_nothing_is_begun_and_nothing_touched(
    world: World, copied: Callable[[str], Path]
) -> None:
    root = copied("all-damaged")
    for folder in store.committed(root):
        damage_weights(folder)
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    for _ in range(2):  # the second start says the same
        codes = world.run(RANKS, "train", str(TINY), "name=all-damaged", *SHORT, *QUIET)
        assert codes == [65] * RANKS
        assert "no sound checkpoint to go back to" in world.last_log
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before


def test_a_checkpoint_of_an_older_format_says_what_to_do(
    world: World, copied: Callable[[str], Path]
) -> None:
    root = copied("older")
    for folder in store.committed(root):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    codes = world.run(RANKS, "train", str(TINY), "name=older", *SHORT, *QUIET)
    assert codes == [65] * RANKS
    assert "format version 1, this code reads 2" in world.last_log


def test_a_renamed_parameter_is_named(world: World, copied: Callable[[str], Path]) -> None:
    root = copied("renamed")
    for folder in store.committed(root):
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace('"causal.queries"', '"causal.query"'))
    codes = world.run(RANKS, "train", str(TINY), "name=renamed", *SHORT, *QUIET)
    assert codes == [65] * RANKS
    assert "causal.queries: not in the checkpoint, which has causal.query" in world.last_log


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk_costs_a_checkpoint_not_the_run(
    world: World, whole: str, background: str
) -> None:
    name = f"full-{background}"
    words = ("train", str(TINY), f"name={name}", *SHORT, *QUIET, f"save.background={background}")
    codes = world.run(RANKS, *words, patch="failing:fill_disk:1 2 2")  # saves of steps 4 and 6
    assert codes == [0, 0], world.last_log
    assert losses(world, name) == losses(world, whole)
    assert steps(world, name) == [2, 8]
    told = [line for line in text(world, name).splitlines() if "not saved" in line]
    assert len(told) == 2
    assert "step 4 not saved (1 in a row, 3 end the run): rank 1: " in told[0]
    assert "rank-00001.safetensors: cannot be written: [Errno 28] No space left" in told[0]


def test_a_disk_that_stays_full_ends_the_run_with_its_last_checkpoint(world: World) -> None:
    words = ("train", str(TINY), "name=stays-full", *SHORT, *QUIET)
    codes = world.run(RANKS, *words, patch="failing:fill_disk:1 2 99")
    assert codes == [74, 74], world.last_log
    assert steps(world, "stays-full") == [2]
    assert "3 saves in a row have failed" in world.last_log


def test_a_last_save_that_fails_is_no_success(world: World) -> None:
    words = ("train", str(TINY), "name=last", *SHORT, *QUIET)
    codes = world.run(RANKS, *words, patch="failing:fill_disk:0 4 1")
    assert codes == [74, 74], world.last_log
    assert steps(world, "last") == [4, 6]
    assert "step-00000008: not saved" in world.last_log


def test_a_folder_that_cannot_be_written_is_told_before_training(world: World) -> None:
    (world.folder / "blocked").write_text("a file")
    codes = world.run(RANKS, "train", str(TINY), "name=x", "output=blocked", *SHORT, *QUIET)
    assert codes == [74] * RANKS
    assert "blocked/x: cannot be written" in world.last_log


DAY = 86_400


@pytest.mark.parametrize("days", [-1, 365])
def test_a_clock_that_jumps_changes_nothing(
    world: World, whole: str, copied: Callable[[str], Path], days: int
) -> None:
    """On one rank, back between two saves, or far ahead after a new start."""
    name = f"jumped{days}"
    if days > 0:
        shutil.rmtree(copied(name) / "step-00000008")
    patch = f"failing:jump_clock:0 {2 if days > 0 else 5} {days * DAY}"
    codes = world.run(RANKS, "train", str(TINY), f"name={name}", *SHORT, *QUIET, patch=patch)
    assert codes == [0] * RANKS, world.last_log
    assert losses(world, name) == losses(world, whole)
    assert steps(world, name) == steps(world, whole)
