"""SIGKILL to a rank that reads with workers: nothing locked, no shared memory, no orphan left."""

import fcntl
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mmtrain.data.assemble import Assembler
from mmtrain.data.batch import Batch
from mmtrain.data.loader import Loader, Workers
from mmtrain.data.mixture import Mixture
from mmtrain.data.pack import Plan
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.sources import open_source
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary

TOKENS = 96


def loader_of(
    world: Path, cache: Path, vocabulary: Vocabulary, layout: SequenceFormat, workers: int
) -> Loader[Batch]:
    """Two sources whose shards are fetched into `cache` when they are needed."""
    sources = [
        open_source(
            name,
            cache / name,
            vocabulary,
            RuleOptions(rule=rule, max_images=4, max_positions=64),
            remote=str(world / name),
        )
        for name, rule in (("captions", Rule.pair), ("pages", Rule.document))
    ]
    plan = Plan(
        Mixture(sources, seed=1),
        group_length=layout.group_length,
        pack_tokens=TOKENS,
        pack_images=6,
        window_documents=64,
        seed=0,
    )
    assembler = Assembler(sources=sources, vocabulary=vocabulary, layout=layout, pack_tokens=TOKENS)
    return Loader(
        plan, assembler, global_batch_packs=8, micro_batch_packs=2, workers=Workers(count=workers)
    )


def read_for_ever(loader: Loader[Batch], began: Connection) -> None:
    """A rank: leads a session of its own, so that its workers can be found."""
    os.setsid()
    began.send(os.getpid())
    for _ in loader.steps():
        pass


def members(session: int) -> set[int]:
    """Living processes of a session (proc(5): field 6), zombies not counted."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


def shared_memory(owners: set[int]) -> list[str]:
    """Segments that torch named after a process."""
    names = os.listdir("/dev/shm")
    return [name for name in names for owner in owners if f"_{owner}_" in name]


def kill_amid(loader: Loader[Batch], moment: float) -> None:
    """Start a rank, kill it a moment after it began, and look at what it leaves."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    rank = fork.Process(target=read_for_ever, args=(loader, there))
    rank.start()
    assert rank.pid is not None
    assert here.recv() == rank.pid
    time.sleep(moment)
    seen = members(rank.pid)
    assert rank.pid in seen, "it ended by itself"
    os.kill(rank.pid, signal.SIGKILL)
    rank.join(10)
    assert rank.exitcode == -signal.SIGKILL
    patience = time.monotonic() + 10
    while left := members(rank.pid):
        assert time.monotonic() < patience, f"{left} of {seen} still live"
        time.sleep(0.01)
    assert shared_memory(seen) == []


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_rank_leaves_nothing_behind(
    world: Path, tmp_path: Path, vocabulary: Vocabulary, layout: SequenceFormat, kills: int
) -> None:
    moments = random.Random(kills)
    for number in range(kills):
        cache = tmp_path / f"cache-{number % 3}"  # some are there already
        loader = loader_of(world, cache, vocabulary, layout, workers=2)
        kill_amid(loader, moments.uniform(0.0, 0.4))
    expected = loader_of(world, tmp_path / "untouched", vocabulary, layout, workers=0).step(0)
    for number in range(min(kills, 3)):
        cache = tmp_path / f"cache-{number}"
        for path in cache.rglob(".*.lock"):
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = loader_of(world, cache, vocabulary, layout, workers=0).step(0)
        assert [batch.info for batch in found] == [batch.info for batch in expected]
        assert all(
            one.inputs.hidden.equal(other.inputs.hidden)
            for one, other in zip(found, expected, strict=True)
        )
