"""Sentences about the world of shapes, and whether one is true.

The grammar, in lower case without punctuation (THING = [SIZE] COLOUR SHAPE):

    a THING                                  single      the SHAPE is COLOUR           colour
    a THING and a THING                      two, attribute binding (with sizes)
    NUMBER COLOUR SHAPEs                     counting
    the COLOUR SHAPE is RELATION the COLOUR SHAPE        position
    a COLOUR SHAPE moves DIRECTION           motion (clips)

`judge` accepts any true sentence of the grammar that says what its category asks for.
"""

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from mmtrain.data.rules import Draw
from mmtrain.data.shapes_world import (
    COLOURS,
    DIRECTIONS,
    MARGIN,
    RADII,
    SHAPES,
    Facts,
    Kind,
    alone,
    apart,
    choose_kinds,
    crowd,
)

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
RELATIONS = ("left of", "right of", "above", "below")
CORNERS = {
    "circle": "no",
    "square": "four",
    "triangle": "three",
    "cross": "twelve",
}
OPPOSITES = (("left", "right"), ("above", "below"), ("up", "down"), ("small", "large"))


class Category(Enum):
    """What a caption must tell."""

    single = "single object"
    two = "two objects"
    counting = "counting"
    colour = "colour"
    position = "position"
    binding = "attribute binding"


def article(word: str) -> str:
    """`a word` or `an word`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plural(shape: str) -> str:
    """More than one of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def relation(first: Facts, second: Facts) -> str:
    """How `first` lies to `second`, by the larger distance."""
    dx, dy = first["x"] - second["x"], first["y"] - second["y"]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def as_read(objects: Sequence[Facts]) -> Sequence[Facts]:
    """Two objects in the order people name them: the left one first, or the upper one.

    Named at random, the order would be noise, and nothing but relations would tell places.
    """
    first, second = objects
    return objects if relation(first, second) in ("left of", "above") else (second, first)


def caption(category: Category, objects: Sequence[Facts]) -> tuple[str, str]:
    """The sentence of a category about objects, and the prompt it is asked with (or "")."""
    first = objects[0]
    name = f"{first['colour']} {first['shape']}"
    match category:
        case Category.single:
            return article(name), ""
        case Category.colour:
            return f"the {first['shape']} is {first['colour']}", f"the {first['shape']} is"
        case Category.counting:
            number = next(word for word, count in NUMBERS.items() if count == len(objects))
            return f"{number} {first['colour']} {plural(first['shape'])}", ""
        case Category.two:
            named = (article(f"{o['colour']} {o['shape']}") for o in as_read(objects))
            return " and ".join(named), ""
        case Category.binding:
            named = (article(f"{o['size']} {o['colour']} {o['shape']}") for o in as_read(objects))
            return " and ".join(named), ""
        case Category.position:
            other = f"{objects[1]['colour']} {objects[1]['shape']}"
            return f"the {name} is {relation(*objects)} the {other}", f"the {name} is"


def scene(draw: Draw, category: Category, allowed: Sequence[Kind]) -> list[dict[str, Any]]:
    """Objects that a sentence of a category can be about."""
    match category:
        case Category.single | Category.colour:
            return alone(draw, choose_kinds(draw, 1, allowed)[0])
        case Category.counting:
            return crowd(draw, choose_kinds(draw, 1, allowed)[0], 2 + draw.below(3))
        case Category.two | Category.position:
            return apart(draw, choose_kinds(draw, 2, allowed), ("medium", "medium"))
        case Category.binding:
            sizes = ("small", "large") if draw.chance(0.5) else ("large", "small")
            return apart(draw, choose_kinds(draw, 2, allowed), sizes)


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_THING = (
    rf"(?:(?P<size{{0}}>{'|'.join(RADII)}) )?(?P<colour{{0}}>{_COLOUR}) (?P<shape{{0}}>{_SHAPE})"
)
_NAMED = rf"(?P<colour{{0}}>{_COLOUR}) (?P<shape{{0}}>{_SHAPE})"
_FORMS = {
    "single": rf"an? {_THING.format(1)}",
    "colour": rf"the (?P<shape1>{_SHAPE}) is (?P<colour1>{_COLOUR})",
    "two": rf"an? {_THING.format(1)} and an? {_THING.format(2)}",
    "counting": rf"(?P<number>{'|'.join(NUMBERS)}) (?P<colour1>{_COLOUR}) "
    rf"(?P<shapes>{'|'.join(map(plural, SHAPES))})",
    "position": rf"the {_NAMED.format(1)} is (?P<relation>{'|'.join(RELATIONS)}) "
    rf"the {_NAMED.format(2)}",
    "motion": rf"an? {_THING.format(1)} moves (?P<direction>{'|'.join(DIRECTIONS)})",
}
_PATTERNS = {form: re.compile(pattern) for form, pattern in _FORMS.items()}
# the forms that tell enough for a category
_TELLING: dict[str, tuple[str, ...]] = {
    Category.single.value: ("single", "colour"),
    Category.colour.value: ("single", "colour"),
    Category.counting.value: ("counting",),
    Category.two.value: ("two", "position"),
    Category.position.value: ("position",),
    Category.binding.value: ("two",),
    "motion": ("motion",),
}


def judge(caption: str, facts: Facts) -> bool:
    """Whether a caption is true of a picture and tells what its category asks.

    Args:
        caption: a sentence, the prompt included; case, outer blanks and a final stop are free.
        facts: `meta` of the document: `category`, `objects`, of clips also `direction`.
    """
    text = " ".join(caption.lower().split()).rstrip(" .")
    for form in _TELLING.get(facts["category"], ()):
        found = _PATTERNS[form].fullmatch(text)
        if found is not None:
            return _holds(form, found.groupdict(), facts)
    return False


def _holds(form: str, said: Mapping[str, str | None], facts: Facts) -> bool:
    objects = facts["objects"]
    if form == "counting":
        matching = [o for o in objects if plural(o["shape"]) == said["shapes"]]
        matching = [o for o in matching if o["colour"] == said["colour1"]]
        return len(matching) == len(objects) == NUMBERS[said["number"] or ""]
    first = _find(objects, said, 1)
    if form in ("single", "colour"):
        return len(objects) == 1 and first is not None
    if form == "motion":
        return first is not None and facts["direction"] == said["direction"]
    second = _find(objects, said, 2)
    if first is None or second is None or first is second or len(objects) != 2:
        return False
    if form == "position":
        return lies(first, second, said["relation"] or "")
    return facts["category"] != Category.binding.value or None not in (said["size1"], said["size2"])


def _find(objects: Sequence[Facts], said: Mapping[str, str | None], place: int) -> Facts | None:
    """The object that the `place`-th thing of a sentence names."""
    wanted = {key: said.get(f"{key}{place}") for key in ("size", "colour", "shape")}
    for item in objects:
        if all(value is None or item[key] == value for key, value in wanted.items()):
            return item
    return None


def lies(first: Facts, second: Facts, said: str) -> bool:
    """Whether `first` lies so to `second`: clearly, by `MARGIN`."""
    dx, dy = second["x"] - first["x"], second["y"] - first["y"]
    distance = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[said]
    return bool(distance >= MARGIN)


def remark(draw: Draw, kinds: Sequence[tuple[str, str]]) -> str:
    """A few sentences without a picture."""
    return " . ".join(_remark(draw, kinds) for _ in range(1 + draw.below(3)))


def _remark(draw: Draw, kinds: Sequence[tuple[str, str]]) -> str:
    (colour, shape), (other_colour, other_shape) = (kinds[draw.below(len(kinds))] for _ in "ab")
    match draw.below(5):
        case 0:
            return f"{article(shape)} has {CORNERS[shape]} corners"
        case 1:
            one, other = OPPOSITES[draw.below(len(OPPOSITES))]
            return f"{one} is the opposite of {other}"
        case 2:
            words = list(NUMBERS)
            left = draw.below(4)
            right = draw.below(4 - left)
            return f"{words[left]} and {words[right]} make {words[left + right + 1]}"
        case 3:
            return f"{article(f'{colour} {shape}')} and {article(f'{other_colour} {other_shape}')}"
        case _:
            near, far = f"the {colour} {shape}", f"the {other_colour} {other_shape}"
            return f"{near} is left of {far} . {far} is right of {near}"
