"""Ways to make a rank fail where it does not by itself; called in the rank before its command."""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtrain.checkpoint import manifest, store, tensorfile
from mmtrain.train import loop
from mmtrain.train.engine import FoldEngine


def _before(owner: Any, name: str, act: Callable[[], None], number: int) -> None:
    """Act before the `number`-th call of a function, counted from 1."""
    plain, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return plain(*args, **kwargs)

    setattr(owner, name, counted)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# where a save of one rank passes through, in this order; every save passes each once
PHASES: dict[str, tuple[Any, str]] = {
    "begin": (store, "begin"),
    "write": (tensorfile, "write_bytes"),
    "hash": (store, "describe_file"),
    "commit": (store, "commit"),
    "manifest": (manifest.Manifest, "write"),
    "rename": (Path, "rename"),
    "retention": (store, "retain"),
    "removal": (shutil, "rmtree"),
}


def kill_in_save(rank: int, word: str) -> None:
    """Kill rank R at the N-th time a save passes a phase: `R phase N`."""
    killed, phase, number = word.split()
    if rank == int(killed):
        owner, name = PHASES[phase]
        _before(owner, name, _die, int(number))


def fill_disk(rank: int, word: str) -> None:
    """Let writes of tensors fail as on a full disk, on rank R from the N-th save on, M times."""
    failing, first, times = map(int, word.split())
    saves, plain = 0, store.write_part

    def full(handle: Any, tensor: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_part(*args: Any) -> Any:
        nonlocal saves
        saves += 1
        write_bytes = tensorfile.write_bytes
        if first <= saves < first + times:
            tensorfile.write_bytes = full
        try:
            return plain(*args)
        finally:
            tensorfile.write_bytes = write_bytes

    if rank == failing:
        store.write_part = write_part


def jump_clock(rank: int, word: str) -> None:
    """Set the clock of rank R by so many seconds, from its N-th step on: `R N seconds`."""
    moved, number, seconds = map(int, word.split())
    if rank != moved:
        return
    plain, ahead = time.time, 0

    def jump() -> None:
        nonlocal ahead
        ahead = seconds

    time.time = lambda: plain() + ahead
    time.time_ns = lambda: int(1e9 * (plain() + ahead))
    _before(FoldEngine, "train_step", jump, number)


def watch_generators(rank: int, word: str) -> None:
    """Let the run fail when a step draws from a generator that nobody saves."""
    plain = loop.run

    def states() -> list[Any]:
        legacy = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in legacy]]

    def run(*args: Any) -> Any:
        before = states()
        out = plain(*args)
        assert states() == before, "a step has drawn from a global generator"
        return out

    loop.run = run
