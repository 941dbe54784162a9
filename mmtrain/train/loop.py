"""The training loop: a paragraph, no callbacks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from PIL.Image import Image

from mmtrain.data.batch import Batch
from mmtrain.settings import LogConfig, SaveConfig, ScheduleConfig, ValidateConfig
from mmtrain.train.ema import Ema
from mmtrain.train.engine import Engine
from mmtrain.train.guard import Guard
from mmtrain.train.metrics import Reporter
from mmtrain.train.optim import rate_factor
from mmtrain.train.save import Saver
from mmtrain.train.signals import Listener
from mmtrain.train.state import TrainState
from mmtrain.train.watch import Watch

Step = Sequence[Batch]  # micro-batches of one optimizer step on one data rank


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When the loop does what."""

    steps: int
    schedule: ScheduleConfig
    log: LogConfig
    validate: ValidateConfig
    saving: SaveConfig
    evaluate_every_steps: int


@dataclass(frozen=True)
class Heldout:
    """One held-out source.

    Attributes:
        name: as in the recipe.
        micro_batches: of every data rank.
        batches: those of this data rank, the same at every call; None where no data is read.
    """

    name: str
    micro_batches: int
    batches: Callable[[], Sequence[Batch]] | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop works with on this rank.

    Attributes:
        engine: makes optimizer steps.
        batches: steps of this data rank from `state.step` on; None where no data is read.
        heldout: held-out sources.
        reporter: on rank 0.
        ema: running means of the weights, or None.
        draw: draws a step's packs as one picture (rank 0).
        sketch: shows what the model draws after a step, on rank 0; a collective; None when it
            draws nothing while training.
        save: begins a checkpoint of a state; a collective.
        saver: commits it.
        guard: looks after the numbers of every step.
        samples: keeps what a step was made of; a collective; None when that is not asked for.
        evaluate: asks a checkpoint the tasks of the recipe; a collective; None when it is not due
            while training.
    """

    engine: Engine
    batches: Iterator[Step] | None
    heldout: tuple[Heldout, ...]
    reporter: Reporter | None
    draw: Callable[[Step], Image] | None
    save: Callable[[TrainState], None]
    saver: Saver
    guard: Guard
    samples: Callable[[int, Sequence[Batch] | None], None] | None = None
    evaluate: Callable[[Path, Listener], None] | None = None
    ema: Ema | None = None
    sketch: Callable[[int], Image | None] | None = None


def run(parts: Parts, plan: Plan, state: TrainState, watch: Watch) -> TrainState:
    """Train from `state.step` to the last step, or to the one in which the end is asked for.

    Every rank calls it; saving and validating are collectives and happen at the same steps.
    """
    engine, reporter = parts.engine, parts.reporter
    saved = state.step
    owed = evaluates = False  # a checkpoint, also to be asked; both wait for a good step
    while not watch.ends(engine.mesh, state.step) and state.step < plan.steps:
        asked = perf_counter()
        with watch.section("data"):
            batches = next(parts.batches) if parts.batches is not None else None
        waited = perf_counter() - asked
        number = state.step + 1
        engine.norms.wanted = _due(number, plan.log.modules_every_steps)
        factor = rate_factor(state.step, plan.steps, plan.schedule)
        report = engine.train_step(batches, factor)
        report = replace(report, seconds=report.seconds + waited, data_seconds=waited)
        state.advance(report)
        if parts.samples is not None:
            parts.samples(number, batches)
        if parts.ema is not None and report.skipped is None:
            parts.ema.update(number)
        if reporter is not None:
            rates = {g["label"]: g["lr"] for g in engine.deepspeed.optimizer.param_groups}
            reporter.step(number, report, rates, plan.log.every_steps)
            if parts.draw is not None and _due(number, plan.log.images_every_steps) and batches:
                reporter.picture(number, "packs", parts.draw(batches))
        back = parts.guard.look(state, report, batches)
        if back is not None:
            state, saved, owed, evaluates = back, back.step, False, False
            continue
        if parts.sketch is not None and _due(number, plan.log.images_every_steps):
            picture = parts.sketch(number)
            if reporter is not None and picture is not None:
                reporter.picture(number, "samples", picture)
        if parts.heldout and _due(number, plan.validate.every_steps):
            validate(parts, number, watch)
        if parts.evaluate is not None:
            last = number == plan.steps
            evaluates = evaluates or last or _due(number, plan.evaluate_every_steps)
        parts.saver.poll()
        owed = owed or evaluates or _due(number, plan.saving.every_steps)
        if owed and (parts.guard.is_settled or number == plan.steps):
            with watch.section("save"):
                parts.guard.compare(number)
                parts.save(state)
            if parts.evaluate is not None and evaluates:
                with watch.section("save"):
                    folder = parts.saver.finish(number)
                with watch.section("evaluate"):
                    parts.evaluate(folder, watch.listener)
            saved, owed, evaluates = number, False, False
    with watch.section("save"):
        if saved != state.step:
            parts.guard.compare(state.step)
            parts.save(state)
        parts.saver.finish(state.step)
    return state


def validate(parts: Parts, step: int, watch: Watch) -> None:
    """Held-out losses of every source; a collective."""
    means = {}
    for source in parts.heldout:
        with watch.section("validate"):
            batches = source.batches() if source.batches is not None else None
            means[source.name] = parts.engine.evaluate(batches, source.micro_batches).means()
    if parts.reporter is not None:
        parts.reporter.heldout(step, means)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
