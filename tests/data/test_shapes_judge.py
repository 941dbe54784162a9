"""The judge of pictures: hardly an error on the truth, and no lie gets past it."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtrain.data.document import Document
from mmtrain.data.rules import Draw
from mmtrain.data.shapes import write_shapes
from mmtrain.data.shapes_judge import DAMAGES, find_objects, is_true, own_errors
from mmtrain.data.shapes_text import Category
from mmtrain.data.shapes_world import COLOURS, RADII, SHAPES, paint, thing
from mmtrain.data.shards import open_shards

GROUND = (236, 238, 231)


def picture_of(document: Document) -> Image.Image:
    return Image.open(io.BytesIO(document.parts[0].media[0])).convert("RGB")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Image.Image, Mapping[str, Any]]]:
    """All held-out captions of a world of 800 documents, pictures and facts."""
    out = tmp_path_factory.mktemp("judged") / "world"
    write_shapes(out, 800, seed=5)
    found = []
    for source in ("captions", "novel"):
        shards = open_shards(out / "heldout" / source)
        documents = [shards.document(number) for number in range(len(shards))]
        found += [(picture_of(document), document.meta) for document in documents]
    return found


def test_true_pictures_are_read_exactly(
    scenes: list[tuple[Image.Image, Mapping[str, Any]]],
) -> None:
    errors = own_errors((picture, facts["objects"]) for picture, facts in scenes)
    assert errors.keys() == DAMAGES.keys() and len(scenes) == 120
    assert errors["clean"] < 0.01 and errors["noise"] < 0.01 and errors["half size"] < 0.02


def test_true_captions_are_found_true_in_every_category(
    scenes: list[tuple[Image.Image, Mapping[str, Any]]],
) -> None:
    judged = [
        (facts["category"], is_true(picture, facts["caption"], facts["category"]))
        for picture, facts in scenes
    ]
    assert {category for category, _ in judged} == {category.value for category in Category}
    assert sum(not right for _, right in judged) <= 1


def lies(caption: str) -> list[str]:
    """Sentences that differ from a caption in one word that matters."""
    out = []
    others = (
        ("left of", "right of"), ("right of", "left of"), ("above", "below"), ("below", "above"),
        ("two", "three"), ("three", "four"), ("four", "two"),
        ("small", "large"), ("large", "small"),
        *zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))], strict=True),
        *zip(SHAPES, [*SHAPES[1:], SHAPES[0]], strict=True),
    )  # fmt: skip
    words = f" {caption} "
    for true, false in others:
        for form in ("", "s", "es"):
            changed = words.replace(f" {true}{form} ", f" {false}{form} ", 1)
            if changed != words:
                out.append(changed.strip().replace("crosss", "crosses"))
    return [lie.replace("a orange", "an orange").replace("an p", "a p") for lie in out]


def test_no_lie_is_found_true(scenes: list[tuple[Image.Image, Mapping[str, Any]]]) -> None:
    told = 0
    for picture, facts in scenes:
        for lie in lies(facts["caption"]):
            told += 1
            assert not is_true(picture, lie, facts["category"]), (facts["caption"], lie)
    assert told > 300


def test_a_changed_picture_no_longer_fits_its_caption() -> None:
    """Wrong colour, count and place; one object too many, one missing, nothing at all."""
    draw = Draw("judge")
    left = thing(draw, ("red", "circle"), 15, 28)
    right = thing(draw, ("blue", "square"), 42, 28)
    said = "the red circle is left of the blue square"
    swapped = [{**left, "x": right["x"]}, {**right, "x": left["x"]}]
    extra = thing(draw, ("green", "cross"), 28, 48, "small")
    assert is_true(paint([left, right], GROUND), said, "position")
    assert not is_true(paint(swapped, GROUND), said, "position")
    assert not is_true(paint([left, right, extra], GROUND), said, "position")
    assert not is_true(paint([left], GROUND), said, "position")
    assert not is_true(paint([], GROUND), said, "position")
    assert not is_true(paint([{**left, "colour": "orange"}, right], GROUND), said, "position")
    assert not is_true(paint([{**left, "shape": "cross"}, right], GROUND), said, "position")


@pytest.mark.parametrize("side", [28, 40, 56, 64, 256])
def test_pictures_of_any_size_are_read_in_the_units_of_the_world(side: int) -> None:
    draw = Draw("sizes", side)
    item = thing(draw, ("purple", "square"), 20, 34, "large")
    (found,) = find_objects(paint([item], GROUND).resize((side, side), Image.Resampling.BICUBIC))
    assert (found.colour, found.shape, found.size) == ("purple", "square", "large")
    assert abs(found.x - item["x"]) < 0.5 and abs(found.y - item["y"]) < 0.5
    assert abs(found.radius - item["radius"]) < 0.5 and found.fit > 0.85


def test_touching_objects_of_two_colours_are_two() -> None:
    draw = Draw("touching")
    one = thing(draw, ("red", "square"), 18, 28, "medium")
    other = thing(draw, ("green", "circle"), 18 + one["radius"] * 0.88 + 10, 28, "medium")
    found = find_objects(paint([one, {**other, "radius": 10}], GROUND))
    assert sorted((item.colour, item.shape) for item in found) == [
        ("green", "circle"), ("red", "square"),
    ]  # fmt: skip


def test_specks_are_no_objects_and_a_smear_has_no_name() -> None:
    picture = np.full((56, 56, 3), GROUND, np.uint8)
    picture[3:5, 3:6] = COLOURS["red"]
    assert find_objects(Image.fromarray(picture)) == []
    picture[20:23, 4:54] = COLOURS["blue"]
    (found,) = find_objects(Image.fromarray(picture))
    assert found.shape == "unclear" and found.colour == "blue"


def test_sizes_are_told_apart_at_their_limits() -> None:
    draw = Draw("limits")
    for shape in SHAPES:
        for word, limits in RADII.items():
            for radius in limits:
                item = {**thing(draw, ("blue", shape), 28, 28), "size": word, "radius": radius}
                (found,) = find_objects(paint([item], GROUND))
                assert (found.shape, found.size) == (shape, word), (item, found)
