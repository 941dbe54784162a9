"""What a picture of the world of shapes shows, found in its pixels, and whether a caption is true.

The exact judge of generated pictures. The ground is the median colour; what differs from it falls
into connected regions; a region is of the colour of the palette nearest to its core, and of the
shape whose template (drawn by the world's own pen, at the region's centre and area) covers it
best. Coordinates are those of the world (56 pixels a side), whatever the size of the picture.
Sentences are then judged by `shapes_text.judge` on what was found, so a picture with one object
too many is as wrong as one with an object missing.

Its own error on true pictures is measured by `own_errors` and printed beside every result; the
figures are in docs/evaluation.md. Cost: about 3 ms a picture.

H, W = 56 pixels   C = 3 channels   N regions
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmtrain.data.shapes_text import judge
from mmtrain.data.shapes_world import COLOURS, RADII, SHAPES, SIDE, Facts, paint

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# area of a shape of radius 1, as `shapes_world` draws it
_AREAS = {
    "circle": np.pi,
    "square": 1.76**2,
    "triangle": 0.75 * 3**0.5,
    "cross": 4 * 0.66 - 0.66**2,
}
_PALETTE = np.array(list(COLOURS.values()), np.float64)
_CONTRAST = 80.0  # distance from the ground, of 188 at least for the palette, where objects begin
_SPECK = 12.0  # square pixels; the smallest object of the world has 39
_RECOGNISED = 0.55  # a template that covers less of a region than this is no name for it
_SHARED = 0.25  # share of a region's core from which a second colour is a second object
_PLACE = 2.0  # pixels of 56 by which a found centre may differ from the true one
_REACH = 2  # pixels beyond a region where its soft edge is looked for


@dataclass(frozen=True)
class Found:
    """An object found in a picture, in the units of the world.

    Attributes:
        colour: name of the nearest colour.
        shape: name of the best template, or `unclear`.
        size: word for the radius.
        x: centre, pixels from the left of 56.
        y: centre, pixels from the top of 56.
        radius: pixels of 56.
        fit: overlap of region and template, intersection over union, 0 to 1.
    """

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    fit: float

    def facts(self) -> dict[str, Any]:
        """The object as `shapes_world.thing` writes it."""
        names = ("colour", "shape", "size", "x", "y", "radius")
        return {name: getattr(self, name) for name in names}


def is_true(picture: Image.Image, caption: str, category: str) -> bool:
    """Whether a picture shows what a caption of the grammar says, and nothing else.

    Args:
        picture: of any size; not square ones are squashed.
        caption: a sentence of `shapes_text`.
        category: what the caption must tell, a value of `shapes_text.Category`.
    """
    objects = [item.facts() for item in find_objects(picture)]
    return bool(objects) and judge(caption, {"category": category, "objects": objects})


def shows(picture: Image.Image, objects: Sequence[Facts]) -> bool:
    """Whether exactly the given objects are found: colour, shape, size, and place to 2 pixels."""
    left = find_objects(picture)
    for item in objects:
        match = next((found for found in left if _is(found, item)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _is(found: Found, item: Facts) -> bool:
    near = max(abs(found.x - item["x"]), abs(found.y - item["y"])) <= _PLACE
    return near and all(getattr(found, name) == item[name] for name in ("colour", "shape", "size"))


# what generated pictures suffer mildly, done to true ones to measure the judge
DAMAGES: Mapping[str, Callable[[Image.Image, int], Image.Image]] = {
    "clean": lambda picture, seed: picture,
    "noise": lambda picture, seed: _noisy(picture, 8.0, seed),
    "half size": lambda picture, seed: _shrunk(picture, 2),
}


def own_errors(scenes: Iterable[tuple[Image.Image, Sequence[Facts]]]) -> dict[str, float]:
    """Share of true pictures whose objects are not found exactly, for every damage.

    Args:
        scenes: pictures and the facts they were drawn from.
    """
    wrong = dict.fromkeys(DAMAGES, 0)
    count = 0
    for picture, objects in scenes:
        for name, damage in DAMAGES.items():
            wrong[name] += not shows(damage(picture, count), objects)
        count += 1
    return {name: number / max(count, 1) for name, number in wrong.items()}


def _noisy(picture: Image.Image, sigma: float, seed: int) -> Image.Image:
    """Gaussian noise of `sigma` of 255 on every channel."""
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    noise = np.random.default_rng(seed).normal(0.0, sigma, pixels.shape)
    return Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


def _shrunk(picture: Image.Image, times: int) -> Image.Image:
    """Made smaller and large again."""
    small = (picture.width // times, picture.height // times)
    bicubic = Image.Resampling.BICUBIC
    return picture.convert("RGB").resize(small, bicubic).resize(picture.size, bicubic)


def find_objects(picture: Image.Image) -> list[Found]:
    """Every object of a picture, larger ones first."""
    pixels_HWC = _pixels(picture)
    ground_C = np.median(pixels_HWC.reshape(-1, 3), axis=0)
    contrast_HW = np.linalg.norm(pixels_HWC - ground_C, axis=-1)
    found = [
        _name(pixels_HWC, ground_C, mask)
        for region in _regions(contrast_HW > _CONTRAST)
        for mask in _by_colour(pixels_HWC, ground_C, contrast_HW, region)
    ]
    return sorted(found, key=lambda item: -item.radius)


def _pixels(picture: Image.Image) -> Floats:
    """float64 `[56, 56, 3]`."""
    rgb = picture.convert("RGB")
    if rgb.size != (SIDE, SIDE):
        rgb = rgb.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(rgb, np.float64)


def _regions(mask_HW: Mask) -> list[Mask]:
    """Connected regions (sides, not corners) that are larger than a speck."""
    labels = np.where(mask_HW, np.arange(1, mask_HW.size + 1).reshape(mask_HW.shape), 0)
    while True:  # every pixel takes the largest label beside it, until nothing changes
        spread = labels.copy()
        for axis in (0, 1):
            for step in (1, -1):
                shifted = np.roll(labels, step, axis)
                edge = [slice(None), slice(None)]
                edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
                shifted[tuple(edge)] = 0
                spread = np.maximum(spread, shifted)
        spread = np.where(mask_HW, spread, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    names, counts = np.unique(labels[mask_HW], return_counts=True)
    return [labels == name for name, count in zip(names, counts, strict=True) if count >= _SPECK]


def _by_colour(
    pixels_HWC: Floats, ground_C: Floats, contrast_HW: Floats, region: Mask
) -> Iterator[Mask]:
    """Touching objects of different colours apart; a region of one colour as it is."""
    # a soft edge is a mixture of ground and colour: the distance to that line, not to the colour
    lines_KC = _PALETTE - ground_C
    along_K = (lines_KC**2).sum(-1)
    away_NC = pixels_HWC[region] - ground_C
    part_NK = np.clip(away_NC @ lines_KC.T / along_K, 0, 1)
    error_NK = np.linalg.norm(away_NC[:, None] - part_NK[..., None] * lines_KC, axis=-1)
    nearest_N = error_NK.argmin(-1)
    core_N = contrast_HW[region] > 0.75 * np.quantile(contrast_HW[region], 0.9)
    shares_K = np.bincount(nearest_N[core_N], minlength=len(lines_KC)) / max(core_N.sum(), 1)
    several = np.flatnonzero(shares_K > _SHARED)
    if len(several) < 2:
        yield region
        return
    owner_HW = np.full(region.shape, -1)
    owner_HW[region] = several[error_NK[:, several].argmin(-1)]
    for colour in several:
        yield from _regions(owner_HW == colour)


def _name(pixels_HWC: Floats, ground_C: Floats, region: Mask) -> Found:
    """Colour, shape, size and place of one region."""
    away_NC = pixels_HWC[region] - ground_C
    contrast_N = np.linalg.norm(away_NC, axis=-1)
    core_C = np.median(away_NC[contrast_N >= np.quantile(contrast_N, 0.5)], axis=0)
    colour = int(np.linalg.norm(_PALETTE - ground_C - core_C, axis=-1).argmin())
    cover_HW = _cover(pixels_HWC - ground_C, core_C, region)
    shape, x, y, radius, fit = max(_fits(cover_HW), key=lambda fit: fit[-1])
    return Found(
        list(COLOURS)[colour],
        shape if fit >= _RECOGNISED else "unclear",
        _size_word(radius),
        round(x, 2),
        round(y, 2),
        round(radius, 2),
        round(fit, 3),
    )


def _cover(away_HWC: Floats, core_C: Floats, region: Mask) -> Floats:
    """How much of each pixel near a region is of its colour; noise around 0 and 1 is kept."""
    near = region.copy()
    for _ in range(_REACH):
        padded = np.pad(near, 1)
        near = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1]
        near |= padded[1:-1, :-2] | padded[1:-1, 2:]
    cover_HW = away_HWC @ core_C / (core_C @ core_C)
    return np.where(near, np.clip(cover_HW, -0.25, 1.25), 0.0)


def _fits(cover_HW: Floats) -> Iterator[tuple[str, float, float, float, float]]:
    """(shape, x, y, radius, overlap) of every template at the region's centre and area."""
    area = cover_HW.sum()
    middles = np.arange(SIDE) + 0.5
    x, y = (float((cover_HW.sum(axis) * middles).sum() / area) for axis in (0, 1))
    solid_HW = np.clip(cover_HW, 0, 1)
    for shape in SHAPES:
        radius = float((area / _AREAS[shape]) ** 0.5)
        template_HW = _template(shape, x, y, radius)
        union = np.maximum(solid_HW, template_HW).sum()
        yield shape, x, y, radius, float(np.minimum(solid_HW, template_HW).sum() / union)


def _template(shape: str, x: float, y: float, radius: float) -> Floats:
    """Cover of a shape as the world draws it, `[56, 56]` of 0 to 1."""
    item = {"colour": "blue", "shape": shape, "x": x, "y": y, "radius": radius}
    drawn = np.asarray(paint([item], (255, 255, 255)), np.float64)[..., 0]
    return (255.0 - drawn) / (255.0 - COLOURS["blue"][0])


def _size_word(radius: float) -> str:
    """The word whose range lies nearest."""
    return min(RADII, key=lambda word: max(RADII[word][0] - radius, radius - RADII[word][1]))
