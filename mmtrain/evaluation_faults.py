"""What is wrong with the evaluations that a recipe names, and which of their files are missing."""

import re
from collections.abc import Iterator
from pathlib import Path

from mmtrain.data.chat import SYSTEM
from mmtrain.errors import Problem
from mmtrain.models.families import spec_of
from mmtrain.schema import join, suggestion
from mmtrain.settings import ExamplesConfig, Recipe, Scheduler, TaskConfig, TaskKind

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN = (TaskKind.caption, TaskKind.vqa, TaskKind.shapes_captions)  # kinds that take shots
_JSON = (TaskKind.caption, TaskKind.vqa, TaskKind.rank)  # kinds that read published JSON
_LEAST = {"documents": 1, "beams": 1, "new_tokens": 1, "candidates": 2, "steps": 1}


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Every fault of `evaluate:` in itself."""
    evaluate = recipe.evaluate
    if evaluate.every_steps < 0:
        yield Problem("evaluate.every_steps", f"found {evaluate.every_steps}; allowed: 0 or more")
    if evaluate.every_steps and not evaluate.tasks and not recipe.data.heldout:
        yield Problem(
            "evaluate.every_steps",
            "there is nothing to ask; name evaluate.tasks, or sources in data.heldout",
        )
    if not evaluate.timeout_seconds > 0:
        yield Problem(
            "evaluate.timeout_seconds",
            f"found {evaluate.timeout_seconds}; allowed: above 0, as in 7200",
        )
    for name, task in evaluate.tasks.items():
        place = join("evaluate.tasks", name)
        if not _NAME.fullmatch(name):
            yield Problem(place, "names become file names: use letters, digits, - and _")
        yield from _numbers(place, task)
        yield from _scheduler(place, task, recipe)
        yield from _examples(place, task, recipe)
        yield from _shots(place, task)


def missing_files(recipe: Recipe) -> Iterator[Problem]:
    """Files and folders that tasks name and that are not there."""
    for name, task in recipe.evaluate.tasks.items():
        place = join("evaluate.tasks", name)
        yield from _missing(place, task)
        system = task.system
        known = system is None or system in ("auto", *SYSTEM)
        if not known and not Path(str(system)).is_file():
            yield Problem(
                f"{place}.system",
                f"there is no file {system}; name one, or one of auto, {', '.join(SYSTEM)}",
            )
        if task.support is not None:
            yield from _missing(f"{place}.support", task.support)


def _numbers(place: str, task: TaskConfig) -> Iterator[Problem]:
    for key, least in _LEAST.items():
        value = getattr(task, key)
        if value is not None and value < least:
            yield Problem(f"{place}.{key}", f"found {value}; allowed: {least} or more")
    if task.guidance is not None and not task.guidance >= 0:
        yield Problem(f"{place}.guidance", f"found {task.guidance}; allowed: 0 or more")
    if task.kind is TaskKind.vqa and task.prompt is not None and "{question}" not in task.prompt:
        yield Problem(f"{place}.prompt", "{question} is not in it; say where the question stands")


def _scheduler(place: str, task: TaskConfig, recipe: Recipe) -> Iterator[Problem]:
    own = spec_of(recipe.family, recipe.phase).schedulers
    known = own or tuple(scheduler.value for scheduler in Scheduler)
    if task.scheduler is not None and task.scheduler not in known:
        yield Problem(
            f"{place}.scheduler",
            f"found {task.scheduler!r}; wanted: one of {', '.join(known)}"
            f"{suggestion(task.scheduler, known)}",
        )


def _examples(place: str, task: TaskConfig, recipe: Recipe) -> Iterator[Problem]:
    named = task.path or task.questions
    if task.kind is TaskKind.vqa and not named:
        yield Problem(
            f"{place}.path", "empty; name the annotations (and questions: their questions file)"
        )
    elif not named and not recipe.data.heldout:
        yield Problem(f"{place}.path", "empty, and data.heldout has no source to ask about instead")
    published = task.path.endswith(".json") or task.questions is not None
    if published and task.kind not in _JSON:
        kinds = ", ".join(kind.name for kind in _JSON)
        yield Problem(
            f"{place}.path", f"{task.kind.name} needs a folder of shards; JSON is for {kinds}"
        )
    elif published and not task.images:
        yield Problem(f"{place}.images", "empty; name the folder of the pictures")


def _shots(place: str, task: TaskConfig) -> Iterator[Problem]:
    if not task.shots or min(task.shots) < 0:
        yield Problem(
            f"{place}.shots", f"found {list(task.shots)}; wanted: numbers from 0, as in [0, 4, 8]"
        )
    elif max(task.shots) and task.kind not in _SHOWN:
        yield Problem(f"{place}.shots", f"{task.kind.name} shows no examples; leave it out")
    elif max(task.shots) and (task.support is None or not task.support.path):
        yield Problem(
            f"{place}.support",
            f"{max(task.shots)} shots need examples; set {place}.support.path (a JSON file with "
            "images:, or a folder of shards)",
        )


def _missing(place: str, examples: ExamplesConfig) -> Iterator[Problem]:
    for key in ("path", "questions", "relevance"):
        value = getattr(examples, key)
        if value and not Path(value).exists():
            yield Problem(f"{place}.{key}", f"there is no {value}")
    if examples.images and not Path(examples.images).is_dir():
        yield Problem(f"{place}.images", f"there is no folder {examples.images}")
    folder = Path(examples.path or ".")
    if examples.path and folder.is_dir() and not (folder / "index.json").is_file():
        yield Problem(f"{place}.path", f"{folder} holds no index.json; it is no folder of shards")
