"""Optimizer steps of one data rank: lists of micro-batches, a pure function of the step number.

Step s takes packs [s * G, (s + 1) * G) of the plan; data rank r of R the r-th contiguous share,
cut into micro-batches. So the set of samples of a step, and with weights normalised globally its
loss, does not depend on R, on accumulation or on workers, and a resumed run starts at its step
without replay. Worker processes only read and decode; the plan lives in the rank.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmtrain.data import parcels
from mmtrain.data.assemble import Failure
from mmtrain.data.pack import Mark, PackPlan, Plan
from mmtrain.errors import ContentError, Problem, RecipeError, StorageError
from mmtrain.process import become_worker, kill_workers_at_exit

log = logging.getLogger(__name__)

_JUDGED_DOCUMENTS = 1000  # the share of failures is judged over at least so many documents
_Work = tuple[PackPlan, ...]
Made = TypeVar("Made")  # a micro-batch: `Batch`, or what becomes one in the rank
Made_co = TypeVar("Made_co", covariant=True)
_Result = tuple[Made, tuple[Failure, ...], int]


class Assembles(Protocol[Made_co]):
    """What makes micro-batches; copied into worker processes."""

    def batch(self, plans: Sequence[PackPlan]) -> tuple[Made_co, tuple[Failure, ...], int]:
        """A micro-batch of some packs, what failed, and how many documents were planned."""


class _Bench(Dataset[Any], Generic[Made]):
    """What a worker process does: packs in, micro-batch out, as bytes.

    Tensors that torch hands over itself lie in named shared memory for a moment, which stays for
    ever when a worker is killed in it (torch 2.14.1, about 1 of 20 kills); a pipe leaves nothing.
    """

    def __init__(self, assembler: Assembles[Made]) -> None:
        self._assembler = assembler

    def __getitem__(self, work: _Work) -> Any:
        result = self._assembler.batch(work)
        return parcels.packed(result) if get_worker_info() is not None else _Kept(result)


@dataclass(frozen=True)
class _Kept(Generic[Made]):
    """A result made in the rank itself; a DataLoader would look into a bare tuple."""

    result: _Result[Made]


class Loader(Generic[Made]):
    """Micro-batches of one data rank, step by step."""

    def __init__(
        self,
        plan: Plan,
        assembler: Assembles[Made],
        *,
        global_batch_packs: int,
        micro_batch_packs: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        workers: int = 0,
        start_step: int = 0,
        decode_failures: float = 0.01,
        timeout_seconds: float = 120.0,
    ) -> None:
        """Check the numbers; nothing is read yet.

        Args:
            plan: the run's packs, the same on every rank.
            assembler: reads and lays out packs.
            global_batch_packs: G, packs of one optimizer step over all data ranks.
            micro_batch_packs: packs of one forward pass.
            data_rank: r; tensor and pipeline ranks of one data rank pass the same.
            data_ranks: R.
            workers: processes that read and decode; 0 = in this one.
            start_step: the first step `steps` yields.
            decode_failures: share of documents that may fail to decode.
            timeout_seconds: how long a worker may take for one micro-batch.

        Raises:
            RecipeError: G is no multiple of R * micro_batch_packs.
        """
        if global_batch_packs % (data_ranks * micro_batch_packs):
            text = (
                f"{global_batch_packs} is no multiple of {data_ranks} data ranks * "
                f"{micro_batch_packs} packs a micro-batch; use a multiple of "
                f"{data_ranks * micro_batch_packs}"
            )
            raise RecipeError([Problem("train.global_batch_packs", text)])
        assert 0 <= data_rank < data_ranks, (data_rank, data_ranks)
        self.plan = plan
        self.assembler = assembler
        self.next_step = start_step
        self.failures: Counter[tuple[str, str]] = Counter()  # by source and reason
        self.documents = 0
        self._global = global_batch_packs
        self._micro = micro_batch_packs
        self._rank, self._share = data_rank, global_batch_packs // data_ranks
        self._workers, self._timeout_seconds = workers, timeout_seconds
        self._decode_failures = decode_failures
        self._results: Iterator[Any] | None = None

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on this rank (accumulation)."""
        return self._share // self._micro

    def pack_numbers(self, step: int) -> list[tuple[int, ...]]:
        """Pack numbers of each micro-batch of `step` on this rank."""
        first = step * self._global + self._rank * self._share
        return [
            tuple(range(start, start + self._micro))
            for start in range(first, first + self._share, self._micro)
        ]

    def step(self, number: int) -> list[Made]:
        """The micro-batches of step `number`; cheap when steps follow each other.

        Raises:
            ContentError: too many documents failed to decode, a shard is damaged, or all sources
                ran dry before the step was full.
            MissingError, StorageError: a shard cannot be had, or a worker died or hangs.
        """
        if self._results is None or number != self.next_step:
            self.close()
            self._results = self._start(number)
        batches = [self._next() for _ in range(self.micro_batches)]
        self.next_step = number + 1
        return batches

    def steps(self) -> Iterator[list[Made]]:
        """Steps from `start_step` (or the one after the last `step`) on, without end."""
        while True:
            yield self.step(self.next_step)

    def mark(self, step: int) -> Mark:
        """Where `step` begins in the plan; `plan.seek` of a later process then costs nothing."""
        return self.plan.mark(step * self._global)

    def close(self) -> None:
        """End the worker processes."""
        self._results = None

    def _start(self, step: int) -> Iterator[Any]:
        return _results(self.assembler, self._work(step), self._workers, self._timeout_seconds)

    def _work(self, step: int) -> Iterator[_Work]:
        while self.plan.pack((step + 1) * self._global - 1).documents:  # a step is whole
            for numbers in self.pack_numbers(step):
                yield tuple(self.plan.pack(number) for number in numbers)
            step += 1

    def _next(self) -> Made:
        assert self._results is not None
        batch: Made
        try:
            batch, failures, documents = _take(self._results)
        except StopIteration as end:
            raise ContentError(
                f"data.sources: {', '.join(self.plan.source_names)} have used up their epochs, and "
                f"step {self.next_step + 1} cannot be filled; set train.steps={self.next_step}, or "
                "allow more epochs (data.sources.NAME.epochs)"
            ) from end
        self.documents += documents
        for failure in failures:
            kind = (failure.source, failure.reason)
            if not self.failures[kind]:
                log.warning(
                    "source %s sample %s left out: %s (logged once a kind)",
                    failure.source,
                    failure.sample_id,
                    failure.reason,
                )
            self.failures[kind] += 1
        bad = self.failures.total()
        if bad > self._decode_failures * max(self.documents, _JUDGED_DOCUMENTS):
            counts = ", ".join(f"{s} {r} {n}" for (s, r), n in sorted(self.failures.items()))
            raise ContentError(
                f"{bad} of {self.documents} documents cannot be decoded ({counts}); allowed is a "
                f"share of {self._decode_failures}: repair the source or raise data.decode_failures"
            )
        return batch


def heldout_batches(
    plan: Plan,
    assembler: Assembles[Made],
    *,
    packs: int,
    micro_batch_packs: int,
    data_rank: int = 0,
    data_ranks: int = 1,
    workers: int = 0,
    timeout_seconds: float = 120.0,
) -> Iterator[Made]:
    """Packs 0 .. n - 1 of a held-out plan, n = min(packs, what the plan has).

    Every data rank yields the same number of micro-batches; those past the end hold padding
    alone, with weight 0.

    Args:
        plan: a plan over `OnePass` draws.
        assembler: reads and lays out packs.
        packs: packs over all ranks at most.
        micro_batch_packs: packs of one forward pass.
        data_rank: this data rank.
        data_ranks: data ranks.
        workers: processes that read and decode.
        timeout_seconds: how long a worker may take for one micro-batch.
    """
    count = min(packs, plan.packs())
    rounds = math.ceil(count / (data_ranks * micro_batch_packs))
    first = data_rank * rounds * micro_batch_packs

    def work() -> Iterator[_Work]:
        for start in range(first, first + rounds * micro_batch_packs, micro_batch_packs):
            numbers = range(start, start + micro_batch_packs)
            yield tuple(plan.pack(n) if n < count else PackPlan(n, ()) for n in numbers)

    results = _results(assembler, work(), workers, timeout_seconds)
    for _ in range(rounds):
        batch, failures, _ = _take(results)
        if failures:
            first_failure = failures[0]
            raise ContentError(
                f"held-out source {first_failure.source} sample {first_failure.sample_id} cannot "
                f"be decoded: {first_failure.reason}; held-out data must be whole"
            )
        yield batch


def _take(results: Iterator[Any]) -> Any:
    """The next result; a worker that died or hangs is a fault of the machine, worth a retry."""
    try:
        found = next(results)
        return found.result if isinstance(found, _Kept) else parcels.unpacked(found)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # torch 2.15: both messages begin so
            raise
        raise StorageError(f"a data worker is gone or hangs: {error}") from error
    except (OSError, EOFError) as error:  # it died while its batch was being handed over
        raise StorageError(
            f"a data worker is gone, or a file cannot be read: {type(error).__name__}: {error}"
        ) from error


def _results(
    assembler: Assembles[Made], work: Iterator[_Work], workers: int, timeout_seconds: float
) -> Iterator[Any]:
    if workers:
        kill_workers_at_exit()
    loader: DataLoader[Any] = DataLoader(
        _Bench(assembler),
        sampler=_Once(work),
        batch_size=None,
        num_workers=workers,
        timeout=timeout_seconds if workers else 0,
        # an iterator draws a base seed; from the global generator it would shift the model's
        # random numbers and break bitwise resume
        generator=torch.Generator().manual_seed(0),
        prefetch_factor=2 if workers else None,
        worker_init_fn=become_worker,
    )
    return iter(loader)


class _Once:
    """A sampler over work that is already in order."""

    def __init__(self, work: Iterator[_Work]) -> None:
        self._work = work

    def __iter__(self) -> Iterator[_Work]:
        return self._work
