"""Signals, stalls and dead ranks, from the front door: exit codes, what is said, what is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forge import free_port
from world import TINY, Ranks, World

from mmtrain.checkpoint import store

BIN = Path(sys.executable).parent
STEPS = 8
SHORT = ("train.steps=8", "save.every_steps=3", "schedule.warmup_steps=2")
ENDLESS = ("train.steps=100000", "schedule.warmup_steps=2")
EVALUATION = (
    "data.heldout.captions={path: demo_data/heldout/captions, rule: pair, max_images: 1,"
    " max_tokens: 32}",
    "evaluate.tasks.ranks={kind: rank, candidates: 4}",
    "evaluate.every_steps=3",
)
MEASURED = ("tokens_per_second", "images_per_second", "step_seconds", "data_seconds", "mfu")
STARTED: list[Ranks] = []


@pytest.fixture(autouse=True)
def nothing_is_left(world: World) -> Iterator[None]:
    """Whatever a test has started ends with it."""
    yield
    for ranks in STARTED:
        ranks.kill()
    STARTED.clear()
    for mark in world.folder.glob("begun-*"):
        mark.unlink()


def start(world: World, name: str, *overrides: str, ranks: int = 2, patch: str = "") -> Ranks:
    started = world.start(ranks, "train", str(TINY), f"name={name}", *overrides, patch=patch)
    STARTED.append(started)
    return started


def numbers(world: World, name: str) -> list[dict[str, Any]]:
    """Metrics without what a clock measured."""
    drop = (*MEASURED, "peak_tflops")
    return [{k: v for k, v in line.items() if k not in drop} for line in world.metrics(name)]


def folder(world: World, name: str) -> Path:
    return world.folder / "runs" / name


def verdict(world: World, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder(world, name) / "verdict.json").read_text())
    return content


def saved(world: World, name: str) -> list[int]:
    return [store.step_of(path) for path in store.committed(folder(world, name) / "checkpoints")]


def steps_done(world: World, name: str) -> int:
    path = folder(world, name) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def begun(world: World, phase: str, rank: int) -> Callable[[], bool]:
    return (world.folder / f"begun-{phase}.{rank}").exists


@pytest.fixture(scope="module")
def whole(world: World) -> list[dict[str, Any]]:
    """An uninterrupted run."""
    world.train("whole", 2, *SHORT)
    return numbers(world, "whole")


# phase -> (which call of it is slow, the rank that hears the signal, the signal, last step)
INTERRUPTED = {
    "setup": (1, 1, signal.SIGTERM, 0),
    "data": (5, 1, signal.SIGUSR1, 5),
    "forward": (5, 0, signal.SIGTERM, 5),
    "save": (1, 1, signal.SIGINT, None),
    "evaluate": (1, 0, signal.SIGTERM, 3),
}


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(phase, marks=pytest.mark.slow if phase in ("setup", "forward") else ())
        for phase in INTERRUPTED
    ],
)
def test_a_signal_to_one_rank_ends_all_after_the_step_and_the_run_goes_on(
    world: World, whole: list[dict[str, Any]], phase: str
) -> None:
    call, rank, number, last = INTERRUPTED[phase]
    name, options = f"stopped-{phase}", (*SHORT, *(EVALUATION if phase == "evaluate" else ()))
    seconds = 600 if phase == "evaluate" else 2  # an evaluation is broken off
    slow = f"slow:phase:{phase} {call} {seconds} sleep"
    ranks = start(world, name, *options, patch=slow)
    ranks.wait_until(begun(world, phase, rank))
    ranks.signal(rank, number)
    assert ranks.wait(60) == [85, 85], ranks.text()
    told = verdict(world, name)
    assert told["exit_code"] == 85 and f"{number.name} on rank {rank}" in told["reason"]
    if last is not None:
        assert told["step"] == last
    assert saved(world, name)[-1:] == ([told["step"]] if told["step"] else [])
    assert steps_done(world, name) == told["step"] < STEPS
    if phase == "evaluate":
        assert "mmtrain evaluate runs/stopped-evaluate --checkpoint step-00000003" in ranks.text(0)
    assert world.run(2, "train", str(TINY), f"name={name}", *options) == [0, 0]
    assert numbers(world, name) == whole
    assert not (folder(world, name) / "verdict.json").exists()


def test_data_workers_hear_nothing_of_a_stop(world: World, whole: list[dict[str, Any]]) -> None:
    options = (*SHORT, "data.workers=2")
    ranks = start(world, "workers", *options, patch="slow:phase:forward 4 3 sleep")
    ranks.wait_until(begun(world, "forward", 0))
    for rank in range(2):
        workers = children(ranks.pids[rank])
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        ranks.signal(rank, signal.SIGTERM)
    assert ranks.wait(60) == [85, 85], ranks.text()
    assert world.run(2, "train", str(TINY), "name=workers", *options) == [0, 0]
    assert numbers(world, "workers") == whole


def test_the_third_signal_ends_a_rank_at_once(world: World) -> None:
    ranks = start(world, "third", *ENDLESS, ranks=1, patch="slow:phase:forward 2 600 sleep")
    ranks.wait_until(begun(world, "forward", 0))
    for number in (signal.SIGTERM, signal.SIGINT):
        ranks.signal(0, number)
        time.sleep(0.7)
    assert ranks.codes() == [None]
    asked = time.monotonic()
    ranks.signal(0, signal.SIGTERM)
    assert ranks.wait(10) == [130]
    assert time.monotonic() - asked < 2


def test_a_burst_of_signals_counts_once(world: World) -> None:
    """The deepspeed launcher makes several of one Ctrl-C."""
    ranks = start(world, "burst", *ENDLESS, ranks=1)
    ranks.wait_until(lambda: steps_done(world, "burst") >= 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
        ranks.signal(0, number)
    assert ranks.wait(30) == [85]


def test_usr2_writes_the_stacks_and_the_run_goes_on(world: World) -> None:
    ranks = start(world, "looked-at", *ENDLESS)
    ranks.wait_until(lambda: steps_done(world, "looked-at") >= 2)
    ranks.signal(1, signal.SIGUSR2)
    stacks = folder(world, "looked-at") / "stacks/rank-00001.txt"
    ranks.wait_until(lambda: stacks.exists() and "Thread 0x" in stacks.read_text())
    assert "SIGUSR2 in section" in stacks.read_text() and "train/loop.py" in stacks.read_text()
    done = steps_done(world, "looked-at")
    ranks.wait_until(lambda: steps_done(world, "looked-at") > done)


def test_the_time_limit_of_a_job_stops_the_run_before(world: World) -> None:
    ends = str(int(time.time()) + 66)
    ranks = world.start(
        2,
        *("train", str(TINY), "name=limited", *ENDLESS, "watch.stop_before_limit_seconds=60"),
        env={"SLURM_JOB_END_TIME": ends},
    )
    STARTED.append(ranks)
    assert ranks.wait(60) == [85, 85], ranks.text()
    assert time.time() < int(ends) - 50
    assert "the time limit of the job" in verdict(world, "limited")["reason"]
    assert saved(world, "limited") == [verdict(world, "limited")["step"]]


def test_a_stopped_rank_is_a_stall_and_the_others_say_where_they_wait(world: World) -> None:
    ranks = start(world, "stalled", *ENDLESS, "watch.stall_seconds=4")
    ranks.wait_until(lambda: steps_done(world, "stalled") >= 3)
    stopped = time.monotonic()
    ranks.signal(1, signal.SIGSTOP)
    assert ranks.wait(30, ranks=[0]) == [86], ranks.text(0)
    assert 3.5 < time.monotonic() - stopped < 15
    told = verdict(world, "stalled")
    assert (told["exit_code"], told["rank"], told["section"]) == (86, 0, "step")
    assert "in all_reduce (distributed_c10d.py) called from " in told["reason"]
    stacks = (folder(world, "stalled") / "stacks/rank-00000.txt").read_text()
    assert told["reason"] in stacks and "train/loop.py" in stacks
    assert told["reason"] in (folder(world, "stalled") / "log.txt").read_text()


@pytest.mark.parametrize("how", ["sleep", pytest.param("lock", marks=pytest.mark.slow)])
def test_a_phase_that_hangs_ends_with_86(world: World, how: str) -> None:
    """Also where Python cannot run, because a thread keeps the interpreter lock."""
    name = f"hangs-{how}"
    patch = f"slow:phase:data 3 600 {how}"
    ranks = start(world, name, *ENDLESS, "watch.stall_seconds=2", ranks=1, patch=patch)
    assert ranks.wait(60) == [86]
    if how == "lock":
        assert "Timeout (" in ranks.text(0) and "tests/dist/slow.py" in ranks.text(0)
        return
    told = verdict(world, name)
    assert (told["section"], told["step"]) == ("data", 2)
    assert "no progress for" in told["reason"] and "slow.py" in told["reason"]


@pytest.mark.slow
def test_a_collective_that_times_out_is_a_hang(world: World) -> None:
    """Megatron-core's groups take whole minutes."""
    ranks = start(world, "timeout", *ENDLESS, "parallel.timeout_seconds=4")
    ranks.wait_until(lambda: steps_done(world, "timeout") >= 3)
    ranks.signal(1, signal.SIGSTOP)
    assert ranks.wait(90, ranks=[0]) == [86], ranks.text(0)
    assert "no answer from a peer in section step" in verdict(world, "timeout")["reason"]
    assert (folder(world, "timeout") / "stacks/rank-00000.txt").exists()


LAYOUTS = {"data": (), "tensor": ("parallel.tensor=2",), "stages": ("parallel.pipeline=2",)}


@pytest.mark.parametrize(
    "layout", ["data", "stages", pytest.param("tensor", marks=pytest.mark.slow)]
)
def test_a_dead_rank_ends_the_others_in_seconds(world: World, layout: str) -> None:
    name = f"dead-{layout}"
    ranks = start(world, name, *ENDLESS, *LAYOUTS[layout])
    ranks.wait_until(lambda: steps_done(world, name) >= 3)
    killed = time.monotonic()
    ranks.signal(1, signal.SIGKILL)
    assert ranks.wait(10) == [75, -signal.SIGKILL], ranks.text(0)
    assert time.monotonic() - killed < 10
    assert "mmtrain: rank 0: lost its peer in section step" in ranks.text(0)
    assert "Traceback" not in ranks.text(0)
    told = verdict(world, name)
    assert (told["exit_code"], told["rank"], told["attempt"]) == (75, 0, 1)
    assert "Traceback" in (folder(world, name) / "log.txt").read_text()


def test_a_killed_data_worker_is_a_fault_of_storage(world: World) -> None:
    ranks = start(world, "worker", *ENDLESS, "data.workers=1")
    ranks.wait_until(lambda: steps_done(world, "worker") >= 3)
    os.kill(children(ranks.pids[1])[0], signal.SIGKILL)
    assert ranks.wait(20) == [75, 74], ranks.text()
    told = verdict(world, "worker")
    assert (told["exit_code"], told["rank"]) == (74, 1)
    assert "a data worker is gone" in told["reason"]


def test_an_unforeseen_error_is_70_with_its_traceback_in_the_log(world: World) -> None:
    patch = "slow:phase_on:1 forward 3 0 raise"
    ranks = start(world, "bug", *ENDLESS, patch=patch)
    assert ranks.wait(20) == [75, 70], ranks.text()
    told = verdict(world, "bug")
    assert (told["exit_code"], told["rank"], told["step"]) == (70, 1, 2)
    assert "ZeroDivisionError: made to fail" in told["reason"]
    log = (folder(world, "bug") / "log.txt").read_text()
    assert "rank 1 in section step after step 2" in log and "Traceback" in log
    assert "rank 0 lost its peer" in log


def test_a_second_run_in_a_folder_is_turned_away_and_touches_nothing(world: World) -> None:
    first = start(world, "shared", *ENDLESS)
    first.wait_until(lambda: steps_done(world, "shared") >= 2)
    began = time.monotonic()
    second = start(world, "shared", *ENDLESS, "seed=5")
    assert second.wait(20) == [75, 75], second.text()
    assert time.monotonic() - began < 20
    said = second.text(1)
    assert "another run works in this folder" in said and f"pid {first.pids[0]}" in said
    assert "choose another folder by name=" in said
    assert not (folder(world, "shared") / "verdict.json").exists()
    recipe = (folder(world, "shared") / "recipe.yaml").read_text()
    assert "seed: 1\n" in recipe and not list(folder(world, "shared").glob("recipe.until*"))
    assert first.codes() == [None, None]
    first.kill()
    first.wait(10)
    assert world.run(2, "train", str(TINY), "name=shared", *SHORT) == [0, 0]  # the lock is free


def test_three_attempts_without_progress_are_enough(world: World) -> None:
    options = ("train.steps=4", "schedule.warmup_steps=1")
    for _ in range(3):
        ranks = start(world, "stuck", *options, patch="slow:phase_on:0 forward 1 600 sleep")
        ranks.wait_until(begun(world, "forward", 0))
        (world.folder / "begun-forward.0").unlink()
        ranks.signal(0, signal.SIGKILL)
        assert ranks.wait(20) == [-signal.SIGKILL, 75]
    command = ("train", str(TINY), "name=stuck")
    for _ in range(2):  # it stays so
        assert world.run(2, *command, *options) == [93, 93]
        assert "3 attempts in a row saved nothing after step 0" in world.last_log
    assert verdict(world, "stuck")["exit_code"] == 93
    assert world.run(2, *command, "train.steps=5", "schedule.warmup_steps=1") == [0, 0]


# --- launchers -----------------------------------------------------------------------------

LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus=2", "--module"],
}


def children(pid: int) -> list[int]:
    """Processes that a process has started and that live."""
    return [
        int(number)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for number in task.read_text().split()
    ]


def descendants(pid: int) -> list[int]:
    return [pid for child in children(pid) for pid in (child, *descendants(child))]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_launcher_leaves_no_orphan(world: World, launcher: str) -> None:
    command, name = list(LAUNCHERS[launcher]), f"orphan-{launcher}"
    command.insert(3 if launcher == "torchrun" else 1, f"--master_port={free_port()}")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with (world.folder / f"{name}.log").open("w") as out:
        process = subprocess.Popen(
            [*command, "mmtrain", "train", str(TINY), f"name={name}", *ENDLESS, "data.workers=1"],
            cwd=world.folder,
            env=env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=out,
            stderr=out,
        )
    try:
        patience = time.monotonic() + 180
        while steps_done(world, name) < 3 and time.monotonic() < patience:
            time.sleep(0.1)
        family = descendants(process.pid)
        assert len(family) >= 4, (world.folder / f"{name}.log").read_text()[-3000:]
    finally:
        process.kill()
    process.wait()
    # torchrun's ranks are killed; those of the deepspeed command have it one further up, and save
    patience = time.monotonic() + (5 if launcher == "torchrun" else 30)
    while any(map(lives, family)) and time.monotonic() < patience:
        time.sleep(0.05)
    left = [(pid, command_of(pid)) for pid in family if lives(pid)]
    for pid, _ in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    if launcher == "deepspeed":
        assert "the death of the launcher" in verdict(world, name)["reason"]
        assert saved(world, name) == [verdict(world, name)["step"]]
