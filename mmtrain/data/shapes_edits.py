"""Edits in the world of shapes: an instruction, the scene before and after, and whether one worked.

    colour   make the red circle blue
    shape    make the red circle a square
    remove   remove the circle, remove the red circle
    add      add a green cross left of the red circle
    move     move the red circle up
    count    make three red circles

Truth is computed from the objects found in a picture (`data.shapes_judge`): what should stay must
be there, in its place, and the rest must be exactly what was asked for. Where an instruction leaves
a choice (where to add, which ones to take away), every choice is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.data.rules import Draw
from mmtrain.data.shapes_text import NUMBERS, article, lies, plural, relation
from mmtrain.data.shapes_world import (
    COLOURS,
    DIRECTIONS,
    MARGIN,
    SHAPES,
    SIDE,
    Facts,
    Kind,
    alone,
    apart,
    choose_kinds,
    crowd,
    moved,
)

EDITS = ("colour", "shape", "remove", "add", "move", "count")
_WAY = 0.22 * SIDE  # pixels that an object is moved by
_NEAR = 5.0  # pixels of 56 by which what stays may be off in a generated picture

Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Edit:
    """What is asked, and the objects before and after."""

    instruction: str
    before: Objects
    after: Objects


@dataclass(frozen=True)
class Outcome:
    """What became of an edit.

    Attributes:
        asked: what was asked for is there.
        kept: what should stay is there, in its place.
        right: both, and nothing else.
    """

    asked: bool
    kept: bool
    right: bool


def edit(draw: Draw, kind: str, allowed: Sequence[Kind]) -> Edit:
    """An edit of a kind of `EDITS`; no object is of a colour and shape outside `allowed`."""
    match kind:
        case "colour" | "shape":
            return _changed(draw, kind, allowed)
        case "remove":
            before = apart(draw, choose_kinds(draw, 2, allowed), ("medium", "medium"))
            gone = before[draw.below(2)]
            name = gone["shape"] if draw.chance(0.5) else _name(gone)
            return Edit(f"remove the {name}", before, [o for o in before if o is not gone])
        case "add":
            first, new = apart(draw, choose_kinds(draw, 2, allowed), ("medium", "medium"))
            place = f"{relation(new, first)} the {_name(first)}"
            return Edit(f"add {article(_name(new))} {place}", [first], [first, new])
        case "move":
            return _moved(draw, allowed)
        case "count":
            return _counted(draw, allowed)
        case other:
            raise AssertionError(f"no edit {other!r}")


def _name(item: Facts) -> str:
    return f"{item['colour']} {item['shape']}"


def _changed(draw: Draw, kind: str, allowed: Sequence[Kind]) -> Edit:
    if draw.chance(0.5):
        before = alone(draw, choose_kinds(draw, 1, allowed)[0])
    else:
        before = apart(draw, choose_kinds(draw, 2, allowed), ("medium", "medium"))
    place = draw.below(len(before))
    item = before[place]
    values = [
        value
        for value in (COLOURS if kind == "colour" else SHAPES)
        if all(other[kind] != value for other in before) and _kind({**item, kind: value}) in allowed
    ]
    value = values[draw.below(len(values))]
    after = [*before[:place], {**item, kind: value}, *before[place + 1 :]]
    words = value if kind == "colour" else article(value)
    return Edit(f"make the {_name(item)} {words}", before, after)


def _kind(item: Facts) -> Kind:
    return item["colour"], item["shape"]


def _moved(draw: Draw, allowed: Sequence[Kind]) -> Edit:
    before = alone(draw, choose_kinds(draw, 1, allowed)[0], "medium")
    (item,) = before
    low, high = item["radius"] + 1, SIDE - item["radius"] - 1
    ways = []
    for direction in DIRECTIONS:
        (there,) = moved(before, direction, _WAY)
        if low <= there["x"] <= high and low <= there["y"] <= high:
            ways.append((direction, there))
    direction, there = ways[draw.below(len(ways))]
    there = {**there, "x": round(there["x"], 2), "y": round(there["y"], 2)}
    return Edit(f"move the {_name(item)} {direction}", before, [there])


def _counted(draw: Draw, allowed: Sequence[Kind]) -> Edit:
    kind = choose_kinds(draw, 1, allowed)[0]
    four = crowd(draw, kind, 4)
    order = [four.pop(draw.below(len(four))) for _ in range(4)]
    before, after = 1 + draw.below(4), 1 + draw.below(3)
    after += after >= before
    number = next(word for word, count in NUMBERS.items() if count == after)
    shapes = kind[1] if after == 1 else plural(kind[1])
    return Edit(f"make {number} {kind[0]} {shapes}", order[:before], order[:after])


def judge_edit(found: Sequence[Facts], facts: Facts) -> Outcome:
    """Whether a picture shows what an edit asked for.

    Args:
        found: objects of the picture.
        facts: `meta` of the document: `category` (of `EDITS`), `scenes` (before and after).
    """
    before, after = facts["scenes"]
    if facts["category"] == "count":
        return _judge_count(found, before, after)
    left: list[Facts] = list(found)
    kept = True
    for item in (o for o in after if o in before):
        match = next((f for f in left if _same(f, item) and _near(f, item)), None)
        if match is None:
            kept = False
        else:
            left.remove(match)
    gone = [o for o in before if o not in after]
    new = [o for o in after if o not in before]
    if facts["category"] == "remove":
        asked = not any(_same(f, item) for f in left for item in gone)
    else:
        asked = any(_as_asked(f, new[0], facts["category"], before, gone) for f in left)
    return Outcome(asked, kept, asked and kept and len(found) == len(after))


def _judge_count(found: Sequence[Facts], before: Objects, after: Objects) -> Outcome:
    asked = len(found) == len(after) and all(_same(item, after[0]) for item in found)
    # fewer: those left stood there before; more: those before still stand there
    fewer = len(after) < len(before)
    stay: Sequence[Facts] = found if fewer else before
    places: list[Facts] = list(before if fewer else found)
    kept = True
    for item in stay:
        match = next((o for o in places if _near(o, item)), None)
        if match is None:
            kept = False
        else:
            places.remove(match)
    return Outcome(asked, kept, asked and kept)


def _as_asked(
    found: Facts, new: Facts, category: str, before: Sequence[Facts], gone: Sequence[Facts]
) -> bool:
    """Whether an object is the one that an edit should have made."""
    if not _same(found, new):
        return False
    if category == "add":
        return lies(found, before[0], relation(new, before[0]))
    if category == "move":
        along = "x" if abs(new["x"] - gone[0]["x"]) > abs(new["y"] - gone[0]["y"]) else "y"
        across = "y" if along == "x" else "x"
        way = (found[along] - gone[0][along]) * (1 if new[along] > gone[0][along] else -1)
        return bool(way >= MARGIN and abs(found[across] - gone[0][across]) <= _NEAR)
    return _near(found, new)


def _same(one: Facts, other: Facts) -> bool:
    return _kind(one) == _kind(other)


def _near(one: Facts, other: Facts) -> bool:
    return bool(max(abs(one["x"] - other["x"]), abs(one["y"] - other["y"])) <= _NEAR)
