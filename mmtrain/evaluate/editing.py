"""Editing on the world of shapes: a picture and an instruction in, the edited picture judged.

Nobody publishes such a benchmark for small worlds; the kinds follow Emu Edit (arXiv:2311.10089) as
far as the world has them: local change, removal, addition, and moving and counting.
"""

from collections.abc import Iterator, Sequence

from PIL import Image

from mmtrain.data.picture import draw_rows
from mmtrain.data.shapes_edits import EDITS, judge_edit
from mmtrain.data.shapes_judge import find_objects
from mmtrain.errors import MissingError
from mmtrain.evaluate import held
from mmtrain.evaluate.asking import Subject
from mmtrain.evaluate.drawing import Draw, drawer_of
from mmtrain.evaluate.examples import Example, Row
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.report import Result, grouped
from mmtrain.settings import TaskConfig

_SHOWN = 18  # edits of the grid


def edit(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Held-out pictures edited as their instructions ask.

    Raises:
        MissingError: nothing draws, or no document is an edit with facts.
    """
    draw = drawer_of(name, config, subject)
    count = config.documents or held.DOCUMENTS
    documents = held.documents(config.path, subject.heldout, count)
    made = [held.edited(source, document) for source, document in documents]
    examples = [e for e in made if e is not None and e.facts.get("category") in EDITS]
    if not examples:
        raise MissingError(
            f"{name}: no document is an edit whose truth is known (`mmtrain data shapes` writes "
            "such documents as edits): add one to data.heldout, or name one as path:"
        )
    yield judge_edits(name, examples, draw)


def judge_edits(name: str, examples: Sequence[Example], draw: Draw) -> Result:
    """Edit the picture of every example and judge what came of it.

    Args:
        name: of the task.
        examples: the picture, the instruction as its question, and the true picture last.
        draw: draws a picture after each prompt.
    """
    asked: list[Row] = [[open_pictures(e.pictures[:1])[0], e.question] for e in examples]
    pictures = draw(asked)
    outcomes, records = [], []
    for example, picture in zip(examples, pictures, strict=True):
        found = [item.facts() for item in find_objects(picture)]
        outcome = judge_edit(found, example.facts)
        outcomes.append(outcome)
        told = {"sample": example.key, "instruction": example.question, "found": found}
        records.append(told | vars(outcome))
    total = len(examples)
    groups = [tuple(example.group.split("/", 1)) for example in examples]
    return Result(
        task=name,
        kind="edit",
        asked=total,
        metrics={
            "accuracy": sum(o.right for o in outcomes) / total,
            "asked": sum(o.asked for o in outcomes) / total,
            "kept": sum(o.kept for o in outcomes) / total,
            **_by_kind(examples, [o.right for o in outcomes]),
        },
        groups=grouped((g, float(o.right)) for g, o in zip(groups, outcomes, strict=True)),
        columns=("source", "edit"),
        notes={"judged wrong on the true edited pictures": f"{_own_error(examples):.2%}"},
        records=records,
        grid=_grid(asked, pictures, [o.right for o in outcomes]),
    )


def _by_kind(examples: Sequence[Example], right: Sequence[bool]) -> dict[str, float]:
    """Accuracy of each kind over all sources."""
    out = {}
    for kind in EDITS:
        own = [r for e, r in zip(examples, right, strict=True) if e.facts["category"] == kind]
        if own:
            out[kind] = sum(own) / len(own)
    return out


def _own_error(examples: Sequence[Example]) -> float:
    """Share of the true pictures that the judge finds wrong."""
    wrong = 0
    for example in examples:
        (truth,) = open_pictures(example.pictures[-1:])
        found = [item.facts() for item in find_objects(truth)]
        wrong += not judge_edit(found, example.facts).right
    return wrong / len(examples)


def _grid(
    asked: Sequence[Row], pictures: Sequence[Image.Image], right: Sequence[bool]
) -> Image.Image:
    """The first edits below each other: before, instruction, after, and whether it is right."""
    rows: list[Row] = [
        [*row, "->", picture, "right" if is_right else "wrong"]
        for row, picture, is_right in zip(asked, pictures, right, strict=True)
    ]
    return draw_rows(rows[:_SHOWN], width=600)
