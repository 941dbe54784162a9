"""Text to image on the world of shapes: pictures of held-out captions, judged by their pixels.

The categories are those of GenEval (Ghosh et al. 2023, arXiv:2310.11513): single object, two
objects, counting, colour, position, attribute binding. The judge's own error, measured on the true
pictures of the same captions, is part of the result.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from mmtrain.data.shapes_judge import find_objects, own_errors
from mmtrain.data.shapes_text import Category, judge
from mmtrain.errors import MissingError
from mmtrain.evaluate import held
from mmtrain.evaluate.asking import Subject
from mmtrain.evaluate.examples import Example, Row
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.report import Result, grouped
from mmtrain.settings import TaskConfig
from mmtrain.trained import Style

Draw = Callable[[Sequence[Row]], list[Image.Image]]  # a picture after each prompt

_CATEGORIES = {category.value for category in Category}
_SHOWN = 6  # pictures of each category in the grid
_CELL, _GAP, _TEXT_SIZE = 112, 8, 11
_PAPER, _INK, _TRUE, _FALSE = (255, 255, 255), (20, 20, 20), (40, 150, 60), (205, 45, 45)


def draw(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Pictures of held-out captions by a run and its decoder.

    Raises:
        MissingError: there is no decoder, or no caption with facts.
    """
    drawer = drawer_of(name, config, subject)
    count = config.documents or held.DOCUMENTS
    documents = held.documents(config.path, subject.heldout, count)
    made = [held.captioned(source, document) for source, document in documents]
    examples = [e for e in made if e is not None and _is_drawable(e)]
    if not examples:
        raise MissingError(
            f"{name}: no document keeps facts to judge pictures by (`mmtrain data shapes` writes "
            "such documents): add one to data.heldout, or name one as path:"
        )
    yield judge_drawings(name, examples, drawer)


def drawer_of(name: str, config: TaskConfig, subject: Subject) -> Draw:
    """What draws for a task, as its recipe says.

    Raises:
        MissingError: there is no decoder, and the run draws nothing by itself.
    """
    if not subject.artist.draws:
        raise MissingError(
            f"{name}: there is no visual decoder to draw with; name a decoder run as --decoder RUN"
        )
    style = Style(
        scheduler=config.scheduler, steps=config.steps, guidance=config.guidance, seed=config.seed
    )
    return replace(subject.artist, style=style).draw


def _is_drawable(example: Example) -> bool:
    return held.has_facts(example) and example.facts["category"] in _CATEGORIES


def judge_drawings(name: str, examples: Sequence[Example], draw: Draw) -> Result:
    """Draw the caption of every example and judge the pictures.

    Args:
        name: of the task.
        examples: captions with their true pictures and facts.
        draw: draws a picture after each prompt.
    """
    pictures = draw([[example.answer] for example in examples])
    outcomes, records = [], []
    for example, picture in zip(examples, pictures, strict=True):
        found = [item.facts() for item in find_objects(picture)]
        category = str(example.facts["category"])
        right = judge(example.answer, {"category": category, "objects": found})
        outcomes.append((tuple(example.group.split("/", 1)), right))
        records.append(
            {"sample": example.key, "prompt": example.answer, "found": found, "right": right}
        )
    errors = own_errors((open_pictures(e.pictures)[0], e.facts["objects"]) for e in examples)
    told = ", ".join(f"{damage} {error:.2%}" for damage, error in errors.items())
    return Result(
        task=name,
        kind="draw",
        asked=len(examples),
        metrics={
            "accuracy": sum(right for _, right in outcomes) / len(outcomes),
            **_by_category(examples, [right for _, right in outcomes]),
        },
        groups=grouped((names, float(right)) for names, right in outcomes),
        notes={"the judge's own error on the true pictures": told},
        records=records,
        grid=grid(examples, pictures, [right for _, right in outcomes]),
    )


def _by_category(examples: Sequence[Example], right: Sequence[bool]) -> dict[str, float]:
    """Accuracy of each category over all sources, in GenEval's order."""
    out = {}
    for category in Category:
        own = [
            r for e, r in zip(examples, right, strict=True) if e.facts["category"] == category.value
        ]
        if own:
            out[category.value.replace(" ", "_")] = sum(own) / len(own)
    return out


def grid(
    examples: Sequence[Example], pictures: Sequence[Image.Image], right: Sequence[bool]
) -> Image.Image:
    """The first pictures of every category below each other, framed green where they are true."""
    rows: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        row = rows.setdefault(str(example.facts["category"]), [])
        if len(row) < _SHOWN:
            row.append(number)
    font = ImageFont.load_default(_TEXT_SIZE)
    width, height = _CELL + _GAP, _CELL + 3 * (_TEXT_SIZE + 3) + _GAP
    page = Image.new("RGB", (_GAP + _SHOWN * width, _GAP + len(rows) * height), _PAPER)
    pen = ImageDraw.Draw(page)
    for line, numbers in enumerate(rows.values()):
        for place, number in enumerate(numbers):
            left, top = _GAP + place * width, _GAP + line * height
            page.paste(_framed(pictures[number], _TRUE if right[number] else _FALSE), (left, top))
            words = _broken(examples[number].answer, font, _CELL)
            pen.multiline_text((left, top + _CELL + 2), words, fill=_INK, font=font, spacing=2)
    return page


def _framed(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    cell = Image.new("RGB", (_CELL, _CELL), colour)
    side = _CELL - 6
    cell.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (3, 3))
    return cell


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Text in lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
