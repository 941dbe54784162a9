"""Saving a running engine: every rank writes what it holds and no other rank writes.

A reader puts its own part together from the pieces (`train.restore`). No random state is kept,
because none is used: batches and initial weights are pure functions of the recipe, dropout and
noise of the document and the position (`nn.noise`); a test holds that a step leaves torch's,
numpy's and Python's generators alone.

A save that fails (disk full, permission, quota) is dropped on all ranks and the run goes on;
`FAILURES` in a row end it. In the background a save costs the run a copy to the host: one thread of
each rank writes, at most one save is in flight, and it is committed at the next end of a step.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmtrain import __version__
from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import FileEntry, Manifest, WeightEntry
from mmtrain.checkpoint.pieces import MASTER, key_of
from mmtrain.errors import StorageError
from mmtrain.layout.plan import TensorPlan
from mmtrain.parallel.build import canonical_parameters
from mmtrain.parallel.mesh import Mesh
from mmtrain.train.ema import Ema
from mmtrain.train.engine import Engine
from mmtrain.train.held import held, optimizer_steps
from mmtrain.train.state import TrainState

log = logging.getLogger(__name__)

FAILURES = 3  # saves that may fail in a row


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where checkpoints go and what their manifests say.

    Attributes:
        root: the run's `checkpoints` folder.
        keep: newest checkpoints kept.
        keep_every_steps: checkpoints of multiples of this step are kept for ever; 0 = none.
        plan: the family's tensor plan.
        shapes: full shape of every parameter of the model.
        recipe_hash: of the resolved recipe.
    """

    root: Path
    keep: int
    keep_every_steps: int
    plan: TensorPlan
    shapes: dict[str, tuple[int, ...]]
    recipe_hash: str


@dataclass(frozen=True)
class Saved:
    """One save, as it is reported.

    Attributes:
        step: of the checkpoint.
        stall_seconds: that training waited for.
        write_seconds: from its begin to its commit.
        bytes: of all files.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    bytes: int


class _Writer:
    """Writes one rank's part, now or in a thread."""

    def __init__(self, write: Callable[[], tuple[str, FileEntry]]) -> None:
        self._write = write
        self._thread: threading.Thread | None = None
        self.entry: tuple[str, FileEntry] | None = None
        self.error = ""

    def start(self) -> None:
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self._thread.start()

    def run(self) -> None:
        try:
            self.entry = self._write()
        except StorageError as error:
            self.error = str(error)
        except Exception as error:  # raised in a thread it would be lost
            log.exception("writing a checkpoint")
            self.error = f"{type(error).__name__}: {error}"

    @property
    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()


@dataclass(frozen=True)
class _Flight:
    """A save that is being written."""

    state: TrainState  # as it was
    optimizer_steps: int
    entries: dict[str, WeightEntry]
    averaged: tuple[str, ...]
    writer: _Writer
    began: float
    stalled: float


class Saver:
    """Commits checkpoints of one engine; every method is a collective over all ranks."""

    def __init__(
        self,
        engine: Engine,
        ema: Ema | None,
        target: Target,
        background: bool,
        report: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        """Nothing is written yet.

        Args:
            engine: what is saved.
            ema: running means of its weights, saved too; None = there are none.
            target: where to.
            background: whether files are written while training goes on.
            report: told of every committed save, on rank 0.
        """
        self.engine, self.ema, self.target, self.background = engine, ema, target, background
        self.report = report
        self.failures = 0  # in a row
        self._flight: _Flight | None = None

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint of the current step; without `background` also commit it.

        Raises:
            StorageError: too many saves in a row have failed.
        """
        began = time.perf_counter()
        self.settle()
        mesh, root = self.engine.mesh, self.target.root
        reason = _attempt(mesh, lambda: store.begin(root, state.step))
        if reason:
            self._fail(state.step, reason)
            return
        partial = store.partial_of(root, state.step)
        tensors = dict(self._written())
        writer = _Writer(lambda: store.write_part(partial, mesh.rank, tensors))
        flight = _Flight(
            state=TrainState(**asdict(state)),
            optimizer_steps=optimizer_steps(self.engine),
            entries=self._entries(),
            averaged=tuple(self.ema.means) if self.ema is not None else (),
            writer=writer,
            began=began,
            stalled=time.perf_counter() - began,
        )
        self._flight = flight
        if self.background:
            writer.start()
        else:
            writer.run()
            self.settle()

    def poll(self) -> None:
        """Commit what all ranks have written; called after every step.

        Raises:
            StorageError: too many saves in a row have failed.
        """
        if self._flight is None:
            return
        waiting = torch.tensor([0.0 if self._flight.writer.is_done else 1.0])
        if self.engine.mesh.sum_over_world(waiting).item() == 0:
            self.settle()

    def settle(self) -> None:
        """Wait for the save in flight and commit it.

        Raises:
            StorageError: too many saves in a row have failed.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        waited = time.perf_counter()
        mesh, step = self.engine.mesh, flight.state.step
        flight.writer.join()
        seen = mesh.gather((flight.writer.entry, flight.entries, flight.writer.error))
        reason = next((f"rank {r}: {error}" for r, (_, _, error) in enumerate(seen) if error), "")
        if not reason:
            files = dict(entry for entry, _, _ in seen if entry is not None)
            manifest = self._manifest(flight, files, [entries for _, entries, _ in seen])
            reason = _attempt(mesh, lambda: self._commit(manifest))
        if reason:
            self._fail(step, reason)
            return
        self.failures = 0
        now = time.perf_counter()
        if mesh.rank == 0:
            total = sum(file.bytes for file in files.values())
            stalled = now - flight.began if not self.background else flight.stalled + now - waited
            self.report(Saved(step, stalled, now - flight.began, total))

    def finish(self, step: int) -> Path:
        """Wait for the save of `step`, without which the run must not end.

        Raises:
            StorageError: it was not committed.
        """
        self.settle()
        if self.failures:
            raise StorageError(
                f"{store.folder_of(self.target.root, step)}: not saved; free space or mend the "
                "folder's permissions and start again: the run goes on from its last checkpoint"
            )
        return store.folder_of(self.target.root, step)

    def _written(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes, on the host: no number is written by two ranks.

        What data ranks share is dealt out among them, in the order of names.
        """
        mesh = self.engine.mesh
        turn = {name: n % mesh.dims.data for n, name in enumerate(sorted(self.target.shapes))}
        single = {
            name
            for name, parameter in canonical_parameters(self.engine.named_layers())
            if parameter.dtype == torch.float32
        }
        for part in held(self.engine, self.ema):
            if part.kind == MASTER and part.name in single:  # equal to the weight
                continue
            if part.shared and turn[part.name] != mesh.data:
                continue
            if mesh.tensor and self.target.plan.slice_of(part.name) is None:
                continue
            if part.numbers.numel():
                copy = part.numbers.to("cpu", copy=True)
                yield key_of(part.kind, part.name, part.start), copy

    def _entries(self) -> dict[str, WeightEntry]:
        """Shape, cut and stage of this stage's parameters."""
        entries = {}
        for name, _ in canonical_parameters(self.engine.named_layers()):
            cut = self.target.plan.slice_of(name)
            stage = self.engine.mesh.pipeline
            entries[name] = WeightEntry(self.target.shapes[name], cut.dim if cut else None, stage)
        return entries

    def _manifest(
        self, flight: _Flight, files: dict[str, FileEntry], entries: list[dict[str, WeightEntry]]
    ) -> Manifest:
        return Manifest(
            step=flight.state.step,
            dims=self.engine.mesh.dims,
            state=asdict(flight.state),
            recipe_hash=self.target.recipe_hash,
            code_version=__version__,
            weights={name: entry for part in entries for name, entry in part.items()},
            files=files,
            optimizer_steps=flight.optimizer_steps,
            averaged=flight.averaged,
        )

    def _commit(self, manifest: Manifest) -> None:
        target = self.target
        store.commit(target.root, manifest)
        try:
            store.retain(target.root, target.keep, target.keep_every_steps)
        except StorageError as error:  # the new one is safe: not a failed save
            log.warning("%s", error)

    def _fail(self, step: int, reason: str) -> None:
        """Drop a save on all ranks; they agree on the reason."""
        self.failures += 1
        mesh = self.engine.mesh
        if mesh.rank == 0:
            store.discard(self.target.root, step)
            log.error(
                "step %d not saved (%d in a row, %d end the run): %s",
                step,
                self.failures,
                FAILURES,
                reason,
            )
        if self.failures >= FAILURES:
            raise StorageError(
                f"{self.failures} saves in a row have failed; the last one: {reason}; free space "
                "or mend the folder's permissions, then start again"
            )


def _attempt(mesh: Mesh, act: Callable[[], object]) -> str:
    """Let rank 0 do something with files; every rank gets the reason why it failed, or ''."""
    reason = ""
    if mesh.rank == 0:
        try:
            act()
        except StorageError as error:
            reason = str(error)
    return str(mesh.gather(reason)[0])
