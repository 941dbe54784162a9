"""What a run knows besides its weights: where it is, and what a step gave."""

from dataclasses import dataclass, field
from typing import Any

from mmtrain.data.mixture import Cursor
from mmtrain.data.pack import Mark


@dataclass
class TrainState:
    """Progress of a run; a batch is a pure function of `data_step`."""

    step: int = 0  # optimizer steps done
    tokens_seen: int = 0
    images_seen: int = 0
    plan_window: int = 0  # where the next step begins in the plan of packs, so that a resumed
    plan_first_pack: int = 0  # run need not plan what lies before
    batches_skipped: int = 0  # batches that rollbacks left out, up to here
    plan_draws: int = 0  # `data.mixture.Cursor` of that window; 0 in older checkpoints
    plan_counts: list[int] = field(default_factory=list)
    plan_clocks: list[float] = field(default_factory=list)
    # what the plan was made from, by recipe key (`mmtrain.lineage`); empty in older checkpoints
    plan_origin: dict[str, Any] = field(default_factory=dict)

    @property
    def data_step(self) -> int:
        """Number of the next batch in the order of the data."""
        return self.step + self.batches_skipped

    @property
    def mark(self) -> Mark:
        """Where the next step begins in the plan of packs."""
        cursor = Cursor(self.plan_draws, tuple(self.plan_counts), tuple(self.plan_clocks))
        return Mark(self.plan_window, self.plan_first_pack, cursor)

    @mark.setter
    def mark(self, mark: Mark) -> None:
        self.plan_window, self.plan_first_pack = mark.window, mark.first_pack
        self.plan_draws = mark.cursor.draws
        self.plan_counts, self.plan_clocks = list(mark.cursor.counts), list(mark.cursor.clocks)

    def advance(self, report: "StepReport") -> None:
        """Count one finished step."""
        self.step += 1
        self.tokens_seen += report.tokens
        self.images_seen += report.images


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over the global batch of one loss from one source."""

    total: float
    count: float

    @property
    def mean(self) -> float:
        """Mean loss; NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True)
class Refusal:
    """Why an optimizer step was not made.

    Attributes:
        reason: `non-finite` or `spike`.
        layers: those whose gradients are not finite, in the order of the model.
        of: number of layers.
    """

    reason: str
    layers: tuple[str, ...] = ()
    of: int = 0

    def __str__(self) -> str:
        """Return the reason and where the gradients went wrong first: next to the loss."""
        if not self.layers:
            return self.reason
        return (
            f"{self.reason}: gradients of {len(self.layers)} of {self.of} layers, "
            f"from {self.layers[-1]} backward"
        )


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step over all ranks.

    Attributes:
        loss: weighted sum of the parts.
        parts: mean of each loss over the global batch; 0 where nothing was counted.
        by_source: (loss name, source index) -> sums.
        grad_norm: global 2-norm before clipping.
        module_norms: gradient norm per layer, when asked for.
        skipped: why the optimizer step was not made; None when it was.
        tokens: real tokens of the global batch.
        images: real images of the global batch.
        documents: documents of the global batch.
        slots: positions of the global batch, padding included.
        seconds: wall time of the step.
        data_seconds: of which waiting for data.
    """

    loss: float
    parts: dict[str, float]
    by_source: dict[tuple[str, int], LossSums]
    grad_norm: float
    tokens: int
    images: int
    documents: int
    slots: int
    seconds: float
    data_seconds: float
    module_norms: dict[str, float] = field(default_factory=dict)
    skipped: Refusal | None = None
