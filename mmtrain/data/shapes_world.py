"""The world of coloured shapes: its objects, where they lie, and how they are drawn.

Six colours, four shapes, pictures of 56 pixels (16 patches of 14), a plain light ground whose tint
varies. Facts are plain JSON, so that the truth of a sentence can be computed from them
(`data.shapes_text`). Three pairs of colour and shape are never shown in training.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from mmtrain.data.rules import Draw

SIDE = 56  # pixels of a picture
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 90, 210),
    "yellow": (236, 200, 20),
    "purple": (148, 60, 190),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
# pairs that training never shows; they are drawn only for the held-out source `novel`
NOVEL = (("purple", "triangle"), ("orange", "cross"), ("yellow", "circle"))
RADII = {"small": (6.0, 7.5), "medium": (9.0, 11.0), "large": (12.5, 14.0)}  # pixels
MARGIN = 6.0  # pixels between centres from which a relation in space holds
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_ZOOM = 4  # drawn so many times larger, then averaged: smooth edges

Facts = Mapping[str, Any]
Kind = tuple[str, str]  # colour, shape


def kinds(novel: Sequence[Kind] = NOVEL) -> list[Kind]:
    """All pairs of colour and shape but the ones in `novel`."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [pair for pair in pairs if pair not in novel]


def choose_kinds(draw: Draw, count: int, allowed: Sequence[Kind]) -> list[Kind]:
    """`count` kinds, no colour and no shape twice while that can be had."""
    chosen: list[Kind] = []
    while len(chosen) < count:
        free = [
            kind
            for kind in allowed
            if all(kind[0] != other[0] and kind[1] != other[1] for other in chosen)
        ]
        pool = free or allowed
        chosen.append(pool[draw.below(len(pool))])
    return chosen


def thing(draw: Draw, kind: Kind, x: float, y: float, size: str = "medium") -> dict[str, Any]:
    """Facts of one object: colour, shape, size word, centre and radius in pixels."""
    radius = draw.uniform(*RADII[size])
    x, y = (min(max(value, radius + 1), SIDE - radius - 1) for value in (x, y))
    return {
        "colour": kind[0],
        "shape": kind[1],
        "size": size,
        "x": round(x, 2),
        "y": round(y, 2),
        "radius": round(radius, 2),
    }


def alone(draw: Draw, kind: Kind, size: str = "large") -> list[dict[str, Any]]:
    """One object near one of nine places."""
    return [thing(draw, kind, _near(draw), _near(draw), size)]


def _near(draw: Draw) -> float:
    """A coordinate near a third of the picture: a tiny model meets each place often enough."""
    return SIDE * (0.28, 0.5, 0.72)[draw.below(3)] + draw.uniform(-2, 2)


def apart(draw: Draw, pair: Sequence[Kind], sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Two objects that do not touch, beside or above each other."""
    near, far = SIDE * 0.26, SIDE * 0.74
    first, second = (near, far) if draw.chance(0.5) else (far, near)
    ends = [
        (position + draw.uniform(-2, 2), SIDE / 2 + draw.uniform(-4, 4))
        for position in (first, second)
    ]
    if draw.chance(0.5):
        ends = [(y, x) for x, y in ends]
    return [
        thing(draw, kind, x, y, size) for kind, (x, y), size in zip(pair, ends, sizes, strict=True)
    ]


def crowd(draw: Draw, kind: Kind, count: int) -> list[dict[str, Any]]:
    """`count` small objects of one kind in different quarters of the picture."""
    quarter = SIDE / 2
    return [
        thing(
            draw,
            kind,
            (place % 2 + 0.5) * quarter + draw.uniform(-4, 4),
            (place // 2 + 0.5) * quarter + draw.uniform(-4, 4),
            "small",
        )
        for place in draw.subset(4, count)
    ]


def moved(objects: Sequence[Facts], direction: str, distance: float) -> list[dict[str, Any]]:
    """The objects `distance` pixels further."""
    right, down = DIRECTIONS[direction]
    return [
        {**item, "x": item["x"] + right * distance, "y": item["y"] + down * distance}
        for item in objects
    ]


def picture(draw: Draw, objects: Sequence[Facts]) -> Image.Image:
    """Draw objects on a light ground of random tint, RGB of SIDE x SIDE pixels."""
    return paint(objects, ground(draw))


def ground(draw: Draw) -> tuple[int, int, int]:
    """A light, nearly grey colour."""
    light = draw.uniform(205, 250)
    red, green, blue = (int(min(light + draw.uniform(-8, 8), 255)) for _ in range(3))
    return red, green, blue


def paint(objects: Sequence[Facts], colour: tuple[int, int, int]) -> Image.Image:
    """Draw objects on a plain ground."""
    large = Image.new("RGB", (SIDE * _ZOOM, SIDE * _ZOOM), colour)
    pen = ImageDraw.Draw(large)
    for item in objects:
        _stamp(pen, item)
    return large.reduce(_ZOOM)


def _stamp(pen: ImageDraw.ImageDraw, item: Facts) -> None:
    x, y, radius = (item[key] * _ZOOM for key in ("x", "y", "radius"))
    fill = COLOURS[item["colour"]]
    box = (x - radius, y - radius, x + radius, y + radius)
    match item["shape"]:
        case "circle":
            pen.ellipse(box, fill=fill)
        case "square":
            half = radius * 0.88
            pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        case "cross":
            arm = radius * 0.33
            pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
            pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        case "triangle":
            pen.polygon(_corners(x, y, radius, 3), fill=fill)
        case other:
            raise AssertionError(f"no shape {other!r}")


def _corners(x: float, y: float, radius: float, count: int) -> list[tuple[float, float]]:
    """Points around (x, y), the first one on top."""
    turns = [2 * math.pi * index / count for index in range(count)]
    return [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn in turns]
