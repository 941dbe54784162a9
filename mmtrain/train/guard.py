"""What a run looks after by itself in its numbers: bad steps, spikes, replicas, slow ranks.

A step with a loss or gradient that is not finite is not made (`train.norms`). After some in a row
the weights are those of the newest checkpoint again, and the data goes on behind the bad batches:
`TrainState.batches_skipped` grows by what was left out, so the loader just goes on reading. No
checkpoint is begun amid bad steps, so the newest one is from before them. A checkpoint that was
gone back to `watch.rollbacks` times is not tried again: exit 87.

Every rank decides by numbers that were summed over all ranks, so all decide alike.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmtrain.data.batch import Batch
from mmtrain.errors import NumbersError
from mmtrain.settings import Spike, WatchConfig
from mmtrain.train.metrics import Reporter
from mmtrain.train.pace import Pace
from mmtrain.train.replicas import Replicas
from mmtrain.train.restore import newest_sound
from mmtrain.train.save import Saver
from mmtrain.train.spikes import SpikeJudge
from mmtrain.train.state import StepReport, TrainState

log = logging.getLogger(__name__)

_NAMED_SAMPLES = 8  # in the log; events.jsonl has them all


class Guard:
    """Every method is a collective over all ranks."""

    def __init__(
        self,
        config: WatchConfig,
        saver: Saver,
        reporter: Reporter | None,
        restore: Callable[[Path], TrainState],
    ) -> None:
        """Look after the engine of `saver`.

        Args:
            config: the recipe's section.
            saver: knows engine, checkpoints and tensor plan.
            reporter: on rank 0.
            restore: loads a checkpoint into the engine.
        """
        self._config, self._saver, self._reporter = config, saver, reporter
        self._engine, self._restore = saver.engine, restore
        self._replicas = Replicas(saver.engine, saver.target.plan)
        self._pace = Pace(saver.engine, config.slow_rank) if config.slow_rank else None
        self._spikes = SpikeJudge(config.spike_window, config.spike_score, config.nonfinite_steps)
        self._bad_row = 0  # steps without finite numbers, up to here
        self._bad = 0  # in this process
        self._compared = -1  # step after which replicas were last compared
        self._used: tuple[Path | None, int] = (None, 0)  # checkpoint gone back to, how often
        if config.spike is Spike.skip:
            self._engine.norms.admits = self._admits

    @property
    def is_settled(self) -> bool:
        """Whether the last step was a good one; a checkpoint waits for that."""
        return self._bad_row == 0

    def compare(self, step: int) -> None:
        """Compare the weights of replicas, unless that is switched off.

        Raises:
            DivergedError: they differ.
        """
        if self._config.replicas_every_steps and step != self._compared:
            self._compared = step
            self._replicas.compare(step)

    def look(
        self, state: TrainState, report: StepReport, batches: Sequence[Batch] | None
    ) -> TrainState | None:
        """Judge a finished step.

        Args:
            state: after the step.
            report: of the step.
            batches: that this rank read for it.

        Returns:
            Where the run goes on, when it went back to a checkpoint; else None.

        Raises:
            NumbersError: there is nothing to go back to, or going back did not help.
            DivergedError: replicas differ.
        """
        step = state.step
        if self._pace is not None:
            ratio = self._pace.step(step, report.data_seconds)
            if ratio is not None and self._reporter is not None:
                self._reporter.board.add_scalar("throughput/slowest_rank", ratio, step)
        if report.skipped is not None:
            self._tell(state, report, batches)
        self._bad_row = self._bad_row + 1 if _is_bad(report) else 0
        if self._bad_row >= self._config.nonfinite_steps:
            return self._roll_back(state)
        if self._config.spike is Spike.rewind and self._spikes.is_spike(report.loss):
            return self._rewind(state, report)
        every = self._config.replicas_every_steps
        if every and step % every == 0:
            self.compare(step)
        return None

    def _admits(self) -> bool:
        return not self._spikes.is_spike(self._engine.global_loss())

    def _event(self, step: int, kind: str, **facts: Any) -> None:
        if self._reporter is not None:
            self._reporter.event(step, kind, **facts)

    # --- bad steps -----------------------------------------------------------------------------

    def _tell(self, state: TrainState, report: StepReport, batches: Sequence[Batch] | None) -> None:
        """Log a step that was not made, with its samples."""
        assert report.skipped is not None
        self._bad += 1
        samples = self._samples(batches)
        shown = ", ".join(samples[:_NAMED_SAMPLES])
        more = len(samples) - _NAMED_SAMPLES
        log.warning(
            "step %d not made (batch %d of the data; %d so far): %s; loss %.6g; samples %s%s",
            state.step,
            state.data_step - 1,
            self._bad,
            report.skipped,
            report.loss,
            shown,
            f" and {more} more in events.jsonl" if more > 0 else "",
        )
        self._event(
            state.step,
            "skipped",
            reason=report.skipped.reason,
            batch=state.data_step - 1,
            loss=report.loss,
            layers=list(report.skipped.layers),
            samples=samples,
        )

    def _samples(self, batches: Sequence[Batch] | None) -> list[str]:
        """Samples of the micro-batches whose losses are not finite; all when there are none."""
        mesh, spoilt = self._engine.mesh, self._engine.tally.spoilt
        own: list[tuple[bool, tuple[str, ...]]] = []
        if batches is not None and mesh.is_last_stage and mesh.tensor == 0:
            own = [(bad, batch.info.sample_ids) for bad, batch in zip(spoilt, batches, strict=True)]
        seen = [entry for part in mesh.gather(own) for entry in part]
        some = any(bad for bad, _ in seen)
        return [name for bad, names in seen if bad or not some for name in names]

    # --- back ----------------------------------------------------------------------------------

    def _roll_back(self, state: TrainState) -> TrainState:
        row = f"{self._bad_row} steps in a row, up to step {state.step}, gave no finite numbers"
        advice = (
            "; events.jsonl names their samples; lower optimizer.learning_rate or clip closer "
            "(optimizer.clip_norm), or take the samples out"
        )
        folder = self._newest()
        if folder is None:
            raise NumbersError(f"{row}, and there is no checkpoint yet to go back to{advice}")
        if not self._may_use(folder):
            raise NumbersError(
                f"{row}, again after {self._used[1]} rollback(s) to {folder} "
                f"(watch.rollbacks = {self._config.rollbacks}), which is whole{advice}"
            )
        self._bad_row = 0
        return self._go_back(state, folder, row)

    def _rewind(self, state: TrainState, report: StepReport) -> TrainState | None:
        spike = f"spike at step {state.step}: loss {report.loss:.6g}"
        folder = self._newest()
        if folder is None or not self._may_use(folder):
            reason = "no checkpoint yet" if folder is None else f"{folder} was used for one before"
            log.warning("%s; not rewound: %s", spike, reason)
            self._event(state.step, "spike", batch=state.data_step - 1, loss=report.loss)
            return None
        return self._go_back(state, folder, spike)

    def _newest(self) -> Path | None:
        self._saver.settle()
        return newest_sound(self._saver.target.root, self._engine.mesh)

    def _may_use(self, folder: Path) -> bool:
        """Whether a checkpoint was not gone back to too often; a newer one is progress."""
        return self._config.rollbacks > (self._used[1] if self._used[0] == folder else 0)

    def _go_back(self, state: TrainState, folder: Path, reason: str) -> TrainState:
        """Load a checkpoint; the data goes on where it is."""
        self._used = (folder, self._used[1] + 1 if self._used[0] == folder else 1)
        self._engine.release()
        back = self._restore(folder)
        left_out = state.data_step - back.data_step
        back.batches_skipped = state.data_step - back.step
        log.warning(
            "%s; back to %s, batches %d to %d of the data are left out",
            reason,
            folder,
            back.data_step - left_out,
            back.data_step - 1,
        )
        self._event(state.step, "rollback", reason=reason, to=back.step, batches_left_out=left_out)
        if self._reporter is not None:
            self._reporter.rewind(back.step)
        return back


def _is_bad(report: StepReport) -> bool:
    return report.skipped is not None and report.skipped.reason == "non-finite"
