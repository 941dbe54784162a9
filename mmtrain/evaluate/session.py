"""Evaluations of a run: by command, beside a run in training, and inside it.

A checkpoint is asked the tasks of the recipe. Results go to `RUN/evaluation/<checkpoint>.json` and
`.md`; while a run trains also to `RUN/evaluation.jsonl` and to TensorBoard. A recipe without tasks
has its held-out captions of the world of shapes judged, as `evaluation.json`; after instruction
tuning its held-out conversations, of a decoder its pictures.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor

from mmtrain import __version__
from mmtrain import recipe as recipes
from mmtrain.checkpoint import store
from mmtrain.errors import ExitCode, MissingError, MmtrainError, Problem, RecipeError
from mmtrain.evaluate.asking import Subject
from mmtrain.evaluate.report import Result, append_line, group_table, table, write
from mmtrain.evaluate.tasks import run_task
from mmtrain.generation.artist import Artist
from mmtrain.schema import suggestion
from mmtrain.settings import Phase, Recipe, TaskConfig, TaskKind
from mmtrain.train.signals import Interrupted
from mmtrain.trained import Style

log = logging.getLogger(__name__)

FOLDER = "evaluation"
LINES = "evaluation.jsonl"
_WATCH_SECONDS = 5.0  # between looks for a new checkpoint
# what a phase is asked when the recipe names no task
_DEFAULTS = {
    Phase.pretrain: {"captions": TaskConfig(kind=TaskKind.shapes_captions)},
    Phase.instruct: {"answers": TaskConfig(kind=TaskKind.chat)},
    Phase.decoder: {"drawings": TaskConfig(kind=TaskKind.draw)},
}


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What is evaluated.

    Attributes:
        run: the run's folder.
        recipe: of the run, with its tasks as they are to be asked.
        tasks: name -> task.
        decoder: a decoder run that draws, if any.
    """

    run: Path
    recipe: Recipe
    tasks: Mapping[str, TaskConfig]
    decoder: Path | None = None

    @property
    def judges_captions(self) -> bool:
        """Whether the recipe names no task, and its captions are judged instead."""
        return not self.recipe.evaluate.tasks and self.recipe.phase is Phase.pretrain


def assign(
    run: Path,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    documents: int | None = None,
    decoder: Path | None = None,
) -> Assignment:
    """Read what a run's recipe asks.

    Args:
        run: the run's folder.
        overrides: `key=value` of the recipe, as in `evaluate.tasks.coco.path=...`.
        only: names of tasks; all of them when empty.
        documents: asked of each source, instead of what tasks say.
        decoder: a decoder run that draws.

    Raises:
        RecipeError: the recipe or a name is at fault, or files of a task are missing.
        MissingError: there is no such run.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        raise MissingError(f"{run}: holds no recipe.yaml; expected the folder of a run")
    seen = recipes.examine(path, overrides)
    if seen.recipe is None or seen.faults:
        raise RecipeError(seen.faults)
    tasks = _tasks(seen.recipe)
    faults = [
        Problem(
            "--task",
            f"there is no task {name!r}{suggestion(name, list(tasks))}; tasks of {path}: "
            + ", ".join(tasks),
        )
        for name in only
        if name not in tasks
    ]
    asked = {name: tasks[name] for name in (only or tasks) if name in tasks}
    places = tuple(f"evaluate.tasks.{name}." for name in asked)
    faults += [problem for problem in seen.missing if problem.place.startswith(places)]
    if faults:
        raise RecipeError(faults)
    if documents is not None:
        asked = {name: replace(task, documents=documents) for name, task in asked.items()}
    return Assignment(run=run, recipe=seen.recipe, tasks=asked, decoder=decoder)


def assignment_of(run: Path, recipe: Recipe) -> Assignment:
    """All tasks of a recipe, for a run in training."""
    return Assignment(run=run, recipe=recipe, tasks=_tasks(recipe))


def _tasks(recipe: Recipe) -> Mapping[str, TaskConfig]:
    return recipe.evaluate.tasks or _DEFAULTS[recipe.phase]


def evaluate(assignment: Assignment, checkpoint: str | None) -> int:
    """Ask the tasks of one checkpoint, write the results and print them.

    Args:
        assignment: what is asked.
        checkpoint: name of a checkpoint, or None for the newest.
    """
    results, failed = ask_all(assignment, checkpoint)
    if results:
        name, step = _place(assignment.run, checkpoint)
        heading = _heading(assignment, name, step)
        path = write(assignment.run / FOLDER, name, heading, results)
        if assignment.judges_captions:
            _write_captions(assignment.run, results[0])
        else:
            print("\n\n".join("\n".join(table(result)) for result in results))
            print(f"\nall answers: {path.with_suffix('.json')}\ntable: {path}")
    for name, error in failed.items():
        log.error("task %s: %s", name, error)
    if failed:
        raise next(iter(failed.values()))
    return ExitCode.DONE


def watch(assignment: Assignment) -> int:
    """Evaluate every checkpoint of a run that another process trains, until its last step."""
    run, recipe = assignment.run, assignment.recipe
    every = recipe.evaluate.every_steps or 1
    seen = _recorded(run)
    board = SummaryWriter(str(run / "tensorboard"))
    log.info("watching %s until step %d", run / "checkpoints", recipe.train.steps)
    try:
        while recipe.train.steps not in seen:
            for folder in store.committed(run / "checkpoints"):
                step = _step(folder.name)
                due = step % every == 0 or step == recipe.train.steps
                if step not in seen and due:
                    record(assignment, folder.name, board)
                seen.add(step)
            time.sleep(_WATCH_SECONDS if recipe.train.steps not in seen else 0)
    finally:
        board.close()
    return ExitCode.DONE


def record(
    assignment: Assignment,
    checkpoint: str,
    board: SummaryWriter,
    interrupting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Evaluate a checkpoint for the curves of a run; a fault is logged, and training goes on.

    Args:
        assignment: what is asked.
        checkpoint: its name.
        board: where curves are drawn.
        interrupting: what lets a request to end the run break off the asking.
    """
    began = time.perf_counter()
    try:
        # what is drawn here must not move the generators of training
        cuda = torch.cuda.is_available()
        devices = [torch.cuda.current_device()] if cuda else []
        with torch.random.fork_rng(devices), interrupting():
            results, failed = ask_all(assignment, checkpoint)
        _record(assignment, checkpoint, board, results)
        if cuda:
            torch.cuda.empty_cache()  # training had the device to itself
    except Interrupted:
        log.warning(
            "evaluation of %s broken off; it is asked by: mmtrain evaluate %s --checkpoint %s",
            checkpoint,
            assignment.run,
            checkpoint,
        )
        return
    except MmtrainError as error:
        log.error("evaluation of %s: %s", checkpoint, error)
        return
    except Exception:  # a bug, but none that may end the run
        log.exception("evaluation of %s failed", checkpoint)
        return
    for name, fault in failed.items():
        log.error("evaluation of %s, task %s: %s", checkpoint, name, fault)
    told = [
        f"{r.task} " + " ".join(f"{name} {value:.4g}" for name, value in r.metrics.items())
        for r in results
    ]
    seconds = time.perf_counter() - began
    log.info("evaluation of %s in %.1f s: %s", checkpoint, seconds, "; ".join(told))


def _record(
    assignment: Assignment, checkpoint: str, board: SummaryWriter, results: Sequence[Result]
) -> None:
    step = _step(checkpoint)
    heading = _heading(assignment, checkpoint, step)
    write(assignment.run / FOLDER, checkpoint, heading, results)
    append_line(assignment.run / LINES, step, results)
    for result in results:
        for name, value in result.scalars().items():
            board.add_scalar(f"evaluate/{result.task}/{name}", value, step)
        if result.grid is not None:
            board.add_image(f"evaluate/{result.task}", pil_to_tensor(result.grid), step)
    board.flush()


def ask_all(
    assignment: Assignment, checkpoint: str | None
) -> tuple[list[Result], dict[str, MmtrainError]]:
    """Results of every task, and the faults of those that could not be asked."""
    recipe = assignment.recipe
    artist = Artist.load(
        assignment.run, assignment.decoder, checkpoint, Style(), recipe.ops.attention
    )
    subject = Subject(artist, recipe.data.heldout)
    results: list[Result] = []
    failed: dict[str, MmtrainError] = {}
    for name, task in assignment.tasks.items():
        try:
            results += run_task(name, task, subject)
        except MmtrainError as error:
            failed[name] = error
    return results, failed


def _write_captions(run: Path, result: Result) -> None:
    """The report of a recipe without tasks: one table, and every caption."""
    print("\n".join(group_table(result)))
    scores = [
        {"source": g.names[0], "category": g.names[1], "right": g.right, "asked": g.asked}
        for g in result.groups
    ]
    path = run / "evaluation.json"
    content = {"scores": scores, "captions": result.records}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"every caption: {path}")


def _heading(assignment: Assignment, checkpoint: str, step: int) -> dict[str, object]:
    return {
        "run": assignment.recipe.name,
        "checkpoint": checkpoint,
        "step": step,
        "decoder": str(assignment.decoder) if assignment.decoder else None,
        "code_version": __version__,
    }


def _place(run: Path, checkpoint: str | None) -> tuple[str, int]:
    """Name and step of a checkpoint, the newest one for None; exported weights have no step."""
    found = store.committed(run / "checkpoints")
    name = checkpoint or (found[-1].name if found else "weights")
    return name, _step(name)


def _step(checkpoint: str) -> int:
    digits = checkpoint.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _recorded(run: Path) -> set[int]:
    """Steps that `evaluation.jsonl` holds."""
    path = run / LINES
    lines = path.read_text().splitlines() if path.exists() else []
    return {json.loads(line)["step"] for line in lines}
