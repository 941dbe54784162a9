"""Edits: what is asked can be done, the truth is found right, everything else wrong."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtrain.data.document import Document, Modality
from mmtrain.data.rules import Draw
from mmtrain.data.shapes_edits import EDITS, edit, judge_edit
from mmtrain.data.shapes_judge import find_objects
from mmtrain.data.shapes_world import NOVEL, SIDE, kinds
from mmtrain.data.shards import open_shards

COUNT = 100  # edits of each kind


def drawn(kind: str) -> Iterator[dict[str, Any]]:
    for number in range(COUNT):
        made = edit(Draw("edits", number), kind, kinds())
        scenes = [made.before, made.after]
        yield {"category": kind, "scenes": scenes, "instruction": made.instruction}


@pytest.mark.parametrize("kind", EDITS)
def test_what_is_asked_is_right_and_what_was_there_before_is_not(kind: str) -> None:
    for facts in drawn(kind):
        before, after = facts["scenes"]
        outcome = judge_edit(after, facts)
        assert outcome.asked and outcome.kept and outcome.right, facts
        assert not judge_edit(before, facts).right, facts
        assert not judge_edit([], facts).right or not after
        assert before != after
        for item in after:
            assert (item["colour"], item["shape"]) not in NOVEL
            assert item["radius"] <= item["x"] <= SIDE - item["radius"]
            assert item["radius"] <= item["y"] <= SIDE - item["radius"]


@pytest.mark.parametrize("kind", EDITS)
def test_damage_is_told_apart_from_edits_that_were_not_done(kind: str) -> None:
    for facts in drawn(kind):
        before, after = facts["scenes"]
        extra = {**before[0], "colour": "green", "shape": "cross", "x": 5.0, "y": 51.0}
        assert not judge_edit([*after, extra], facts).right, "one object too many"
        kept = [item for item in after if item in before]
        if kept:  # what should stay has gone elsewhere, or has another colour
            for change in ({"x": kept[0]["x"] + 9}, {"colour": "grey"}):
                damaged = [{**o, **change} if o == kept[0] else o for o in after]
                outcome = judge_edit(damaged, facts)
                assert not outcome.right, (facts, change)
                if kind != "count":
                    assert not outcome.kept


def test_where_an_instruction_leaves_a_choice_every_choice_is_right() -> None:
    red = {"colour": "red", "shape": "circle", "size": "medium", "radius": 9.0}
    cross = {**red, "colour": "green", "shape": "cross"}
    base, new = {**red, "x": 40.0, "y": 28.0}, {**cross, "x": 14.0, "y": 28.0}
    added = {"category": "add", "scenes": [[base], [base, new]]}
    assert judge_edit([base, {**new, "y": 40.0}], added).right
    assert not judge_edit([base, {**new, "x": 50.0}], added).right
    quarters = [{**red, "x": x, "y": y} for x in (14.0, 42.0) for y in (14.0, 42.0)]
    fewer = {"category": "count", "scenes": [quarters, quarters[:2]]}
    assert judge_edit(quarters[2:], fewer).right and judge_edit(quarters[1:3], fewer).right
    assert not judge_edit(quarters[:3], fewer).right
    more = {"category": "count", "scenes": [quarters[:1], quarters[:3]]}
    assert judge_edit([quarters[0], *quarters[2:]], more).right
    elsewhere = judge_edit(quarters[1:], more)
    assert elsewhere.asked and not elsewhere.kept and not elsewhere.right
    up = {"category": "move", "scenes": [[base], [{**base, "y": 16.0}]]}
    assert judge_edit([{**base, "y": 19.0}], up).right
    assert not judge_edit([{**base, "y": 40.0}], up).right
    assert not judge_edit([{**base, "y": 16.0, "x": 30.0}], up).right


def documents(folder: Path) -> list[Document]:
    shards = open_shards(folder)
    return [shards.document(number) for number in range(len(shards))]


def test_stored_edits_are_two_pictures_and_words_and_the_judge_of_pixels_agrees(
    world: Path,
) -> None:
    found = documents(world / "edits") + documents(world / "heldout/edits")
    assert {document.meta["category"] for document in found} == set(EDITS)
    for document in found:
        first, words, second = document.parts
        assert words.text == document.meta["instruction"]
        assert (first.modality, second.modality) == (Modality.image, Modality.image)
        for part, is_right in ((first, False), (second, True)):
            picture = Image.open(io.BytesIO(part.media[0]))
            objects = [item.facts() for item in find_objects(picture)]
            assert judge_edit(objects, document.meta).right == is_right, document.meta
