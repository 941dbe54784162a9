"""Optimizer steps of one data rank: lists of micro-batches, a pure function of the step number.

Step s takes packs [s * G, (s + 1) * G) of the plan; data rank r of R the r-th contiguous share,
cut into micro-batches. So the set of samples of a step, and with weights normalised globally its
loss, does not depend on R, on accumulation or on workers, and a resumed run starts at its step
without replay. Worker processes only read and decode; the plan lives in the rank.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmtrain.data import parcels
from mmtrain.data.assemble import Failure, Item, Made
from mmtrain.data.pack import Mark, PackPlan, Plan
from mmtrain.errors import ContentError, MmtrainError, Problem, RecipeError, StorageError
from mmtrain.process import become_worker, kill_workers_at_exit

log = logging.getLogger(__name__)

_JUDGED_DOCUMENTS = 1000  # the share of failures is judged over at least so many documents
_Work = tuple[PackPlan, ...]


class Assembles(Protocol[Item]):
    """What makes micro-batches; copied into worker processes."""

    def batch(self, plans: Sequence[PackPlan]) -> Made[Item]:
        """A micro-batch of some packs, what failed, and what was planned."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How a rank's micro-batches are made.

    Attributes:
        count: processes that read and decode; 0 = in the rank itself.
        prefetch: micro-batches that each process makes ahead.
        pinned: hand tensors over in memory that a GPU copies from by itself.
        timeout_seconds: how long a process may take for one micro-batch.
    """

    count: int = 0
    prefetch: int = 2
    pinned: bool = False
    timeout_seconds: float = 120.0


_Outcome = Made[Item] | MmtrainError


class _Bench(Dataset[Any], Generic[Item]):
    """What a worker process does: packs in, micro-batch out, or why there is none.

    Tensors that torch hands over itself lie in named shared memory for a moment, which stays for
    ever when a worker is killed in it (torch 2.14.1, about 1 of 20 kills); a pipe leaves nothing.
    """

    def __init__(self, assembler: Assembles[Item]) -> None:
        self._assembler = assembler

    def __getitem__(self, work: _Work) -> Any:
        outcome: _Outcome[Item]
        try:
            outcome = self._assembler.batch(work)
        except MmtrainError as error:
            outcome = error  # raised in the rank: torch would make its message a traceback
        if get_worker_info() is None:
            return _Kept(outcome)
        return _Parcel(parcels.packed(outcome))


@dataclass(frozen=True)
class _Kept(Generic[Item]):
    """A result in the rank; a DataLoader would look into a bare tuple."""

    outcome: _Outcome[Item]

    def pin_memory(self) -> "_Kept[Item]":
        """The same with tensors in pinned memory (torch's DataLoader asks for this)."""
        if isinstance(self.outcome, MmtrainError) or not hasattr(self.outcome.batch, "pin_memory"):
            return self
        return _Kept(self.outcome._replace(batch=self.outcome.batch.pin_memory()))


@dataclass(frozen=True)
class _Parcel:
    """A result on its way from a worker."""

    content: bytes

    def unpacked(self) -> _Kept[Any]:
        """What the worker made."""
        return _Kept(parcels.unpacked(self.content))

    def pin_memory(self) -> _Kept[Any]:
        """The same, unpacked in the thread that pins."""
        return self.unpacked().pin_memory()


class Loader(Generic[Item]):
    """Micro-batches of one data rank, step by step."""

    def __init__(
        self,
        plan: Plan,
        assembler: Assembles[Item],
        *,
        global_batch_packs: int,
        micro_batch_packs: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        workers: Workers = Workers(),
        start_step: int = 0,
        decode_failures: float | Mapping[str, float] = 0.01,
    ) -> None:
        """Check the numbers; nothing is read yet.

        Args:
            plan: the run's packs, the same on every rank.
            assembler: reads and lays out packs.
            global_batch_packs: G, packs of one optimizer step over all data ranks.
            micro_batch_packs: packs of one forward pass.
            data_rank: r; tensor and pipeline ranks of one data rank pass the same.
            data_ranks: R.
            workers: processes that read and decode.
            start_step: the first step `steps` yields.
            decode_failures: share of documents that may fail, of every source or of each by name.

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
        self.documents: Counter[str] = Counter()  # planned so far, by source
        self._global = global_batch_packs
        self._micro = micro_batch_packs
        self._rank, self._share = data_rank, global_batch_packs // data_ranks
        self._workers = workers
        limits = decode_failures
        if not isinstance(limits, Mapping):
            limits = dict.fromkeys(plan.source_names, limits)
        self._limits = limits
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

    def step(self, number: int) -> list[Item]:
        """The micro-batches of step `number`; cheap when steps follow each other.

        Raises:
            ContentError: too many documents of a source failed, a shard is damaged, or all sources
                ran dry before the step was full.
            MissingError, StorageError, ServiceError: a shard cannot be had, or a worker died or
                hangs.
        """
        if self._results is None or number != self.next_step:
            self.close()
            self._results = self._start(number)
        batches = [self._next() for _ in range(self.micro_batches)]
        self.next_step = number + 1
        return batches

    def steps(self) -> Iterator[list[Item]]:
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
        return _results(self.assembler, self._work(step), self._workers)

    def _work(self, step: int) -> Iterator[_Work]:
        while self.plan.pack((step + 1) * self._global - 1).documents:  # a step is whole
            for numbers in self.pack_numbers(step):
                yield tuple(self.plan.pack(number) for number in numbers)
            step += 1

    def _next(self) -> Item:
        assert self._results is not None
        made: Made[Item]
        try:
            made = _take(self._results)
        except StopIteration as end:
            raise ContentError(
                f"data.sources: {', '.join(self.plan.source_names)} have used up their epochs, and "
                f"step {self.next_step + 1} cannot be filled; set train.steps={self.next_step}, or "
                "allow more epochs (data.sources.NAME.epochs)"
            ) from end
        self.documents.update(made.planned)
        for failure in made.failures:
            self._count(failure)
        batch: Item = made.batch
        return batch

    def _count(self, failure: Failure) -> None:
        name, kind = failure.source, (failure.source, failure.reason)
        if not self.failures[kind]:
            log.warning(
                "source %s sample %s left out: %s (logged once a kind)",
                name,
                failure.sample_id,
                failure.reason,
            )
        self.failures[kind] += 1
        found = {reason: n for (source, reason), n in self.failures.items() if source == name}
        bad, documents, limit = sum(found.values()), self.documents[name], self._limits[name]
        if bad > limit * max(documents, _JUDGED_DOCUMENTS):
            counts = ", ".join(f"{reason} {n}" for reason, n in sorted(found.items()))
            raise ContentError(
                f"source {name}: {bad} of {documents} documents cannot be used ({counts}; the last "
                f"one: {failure.sample_id}); allowed is a share of {limit:g}: repair the source, "
                f"or raise data.sources.{name}.decode_failures"
            )


def heldout_batches(
    plan: Plan,
    assembler: Assembles[Item],
    *,
    packs: int,
    micro_batch_packs: int,
    data_rank: int = 0,
    data_ranks: int = 1,
    workers: Workers = Workers(),
) -> Iterator[Item]:
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
    """
    count = min(packs, plan.packs())
    rounds = math.ceil(count / (data_ranks * micro_batch_packs))
    first = data_rank * rounds * micro_batch_packs

    def work() -> Iterator[_Work]:
        for start in range(first, first + rounds * micro_batch_packs, micro_batch_packs):
            numbers = range(start, start + micro_batch_packs)
            yield tuple(plan.pack(n) if n < count else PackPlan(n, ()) for n in numbers)

    results = _results(assembler, work(), workers)
    for _ in range(rounds):
        made = _take(results)
        if made.failures:
            first_failure = made.failures[0]
            raise ContentError(
                f"held-out source {first_failure.source} sample {first_failure.sample_id} cannot "
                f"be decoded: {first_failure.reason}; held-out data must be whole"
            )
        yield made.batch


def _take(results: Iterator[Any]) -> Made[Any]:
    """The next result; a worker that died or hangs is a fault of the machine, worth a retry."""
    try:
        found = next(results)
        kept = found.unpacked() if isinstance(found, _Parcel) else found
        result: _Outcome[Any] = kept.outcome
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # torch 2.15: both messages begin so
            raise
        raise StorageError(f"a data worker is gone or hangs: {error}") from error
    except (OSError, EOFError) as error:  # it died while its batch was being handed over
        raise StorageError(
            f"a data worker is gone, or a file cannot be read: {type(error).__name__}: {error}"
        ) from error
    if isinstance(result, MmtrainError):
        raise result
    return result


def _results(assembler: Assembles[Item], work: Iterator[_Work], workers: Workers) -> Iterator[Any]:
    if workers.count:
        kill_workers_at_exit()
    loader: DataLoader[Any] = DataLoader(
        _Bench(assembler),
        sampler=_Once(work),
        batch_size=None,
        num_workers=workers.count,
        timeout=workers.timeout_seconds if workers.count else 0,
        # an iterator draws a base seed; from the global generator it would shift the model's
        # random numbers and break bitwise resume
        generator=torch.Generator().manual_seed(0),
        prefetch_factor=workers.prefetch if workers.count else None,
        pin_memory=workers.pinned,
        worker_init_fn=become_worker,
    )
    return iter(loader)


class _Once:
    """A sampler over work that is already in order."""

    def __init__(self, work: Iterator[_Work]) -> None:
        self._work = work

    def __iter__(self) -> Iterator[_Work]:
        return self._work
