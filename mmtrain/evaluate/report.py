"""Results of evaluations: what is kept of them, as JSON, Markdown and lines on a screen."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmtrain.errors import StorageError

_NAMED = 20  # broken records that a report names; all are counted


@dataclass(frozen=True)
class Group:
    """Right answers of one kind; `right` is broken where answers get part of the credit."""

    names: tuple[str, ...]  # as in (source, category)
    right: float
    asked: int

    @property
    def share(self) -> float:
        """Right answers of all."""
        return self.right / self.asked


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one task gave.

    Attributes:
        task: its name in the recipe, with the number of shots when there are several.
        kind: as in the recipe.
        asked: examples that were answered.
        metrics: name -> figure of the whole.
        groups: right answers by kind of question.
        columns: what the names of a group are.
        notes: what one must know to read the figures, as in shots that were left out.
        records: every example with what was answered.
        broken: a line for every example that could not be asked.
        grid: pictures to look at, if any.
    """

    task: str
    kind: str
    asked: int
    metrics: dict[str, float]
    groups: tuple[Group, ...] = ()
    columns: tuple[str, ...] = ("source", "category")
    notes: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    broken: tuple[str, ...] = ()
    grid: Image.Image | None = None

    def scalars(self) -> dict[str, float]:
        """Every figure by a name that TensorBoard and a JSON line can carry."""
        out = dict(self.metrics)
        for group in self.groups:
            name = "_".join("_".join(group.names).split())
            out[f"share/{name}"] = group.share
        return out

    def plain(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {
            "kind": self.kind,
            "asked": self.asked,
            "metrics": self.metrics,
            "groups": [
                {
                    **dict(zip(self.columns, g.names, strict=True)),
                    "right": g.right,
                    "asked": g.asked,
                }
                for g in self.groups
            ],
            "notes": self.notes,
            "broken": {"count": len(self.broken), "first": list(self.broken[:_NAMED])},
            "records": self.records,
        }


def grouped(outcomes: Iterable[tuple[tuple[str, ...], float]]) -> tuple[Group, ...]:
    """Groups of (names, credit) pairs, sorted by name."""
    sums: dict[tuple[str, ...], list[float]] = {}
    for names, credit in outcomes:
        sums.setdefault(names, []).append(credit)
    return tuple(
        Group(n, _whole(sum(credits)), len(credits)) for n, credits in sorted(sums.items())
    )


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def table(result: Result) -> list[str]:
    """Lines of a result for a screen."""
    lines = [f"{result.task}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items())]
    if result.groups:
        lines += group_table(result)
    for name, note in result.notes.items():
        lines.append(f"  {name}: {note}")
    if result.broken:
        lines.append(f"  {len(result.broken)} examples could not be asked; the first:")
        lines += [f"    {line}" for line in result.broken[:3]]
    return lines


def group_table(result: Result) -> list[str]:
    """Right answers by group, in columns."""
    widths = [12, *[20] * (len(result.columns) - 1)]
    head = "".join(f"{name:<{width}}" for name, width in zip(result.columns, widths, strict=True))
    lines = [f"{head}{'right':>7}{'asked':>7}{'share':>8}"]
    for group in result.groups:
        names = "".join(f"{n:<{width}}" for n, width in zip(group.names, widths, strict=True))
        lines.append(f"{names}{group.right:7.4g}{group.asked:7}{group.share:8.1%}")
    return lines


def write(folder: Path, name: str, heading: Mapping[str, Any], results: Sequence[Result]) -> Path:
    """Write `NAME.json`, `NAME.md` and the grids; tasks of an earlier evaluation stay.

    Args:
        folder: the run's `evaluation` folder; made when it is not there.
        name: of the checkpoint.
        heading: what was evaluated: run, checkpoint, step.
        results: of the tasks that were asked now.

    Returns:
        The Markdown file.

    Raises:
        StorageError: a file cannot be written.
    """
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tasks = json.loads(path.read_text())["tasks"] if path.exists() else {}
        tasks |= {result.task: result.plain() for result in results}
        _replace(path, json.dumps({**heading, "tasks": tasks}, indent=1, ensure_ascii=False) + "\n")
        _replace(path.with_suffix(".md"), _markdown(heading, tasks))
        for result in results:
            if result.grid is not None:
                result.grid.save(folder / f"{name}-{result.task}.png")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error
    return path.with_suffix(".md")


def append_line(path: Path, step: int, results: Sequence[Result]) -> None:
    """One line of every figure at a step; a line that an earlier start wrote for it goes."""
    old = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in old if line.endswith("\n") and json.loads(line)["step"] != step]
    figures = {f"{r.task}/{name}": value for r in results for name, value in r.scalars().items()}
    _replace(path, "".join(kept) + json.dumps({"step": step, **figures}) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def _markdown(heading: Mapping[str, Any], tasks: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for task in tasks.values() for name in task["metrics"]))
    rows = [
        [task, entry["kind"], str(entry["asked"])]
        + [_figure(entry["metrics"].get(name)) for name in names]
        for task, entry in tasks.items()
    ]
    lines = [f"# {heading['run']}, step {heading['step']}", ""]
    lines += _rows(["task", "kind", "asked", *names], rows)
    for task, entry in tasks.items():
        if entry["groups"]:
            columns = [key for key in entry["groups"][0] if key not in ("right", "asked")]
            lines += ["", f"## {task}", ""]
            lines += _rows(
                [*columns, "right", "asked", "share"],
                [
                    [str(g[c]) for c in columns]
                    + [_figure(g["right"]), str(g["asked"]), f"{g['right'] / g['asked']:.1%}"]
                    for g in entry["groups"]
                ],
            )
        notes = [f"- {name}: {note}" for name, note in entry["notes"].items()]
        if entry["broken"]["count"]:
            notes.append(f"- could not be asked: {entry['broken']['count']}")
        lines += ["", f"Notes on {task}:", "", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
