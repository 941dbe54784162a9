"""The world of shapes: the same bytes for a seed, true captions, and no leak into training."""

import hashlib
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtrain.data.document import Document
from mmtrain.data.rules import Draw
from mmtrain.data.shapes import SHARES, Category, judge, write_shapes
from mmtrain.data.shapes_text import caption, relation
from mmtrain.data.shapes_tokenizer import SIZE
from mmtrain.data.shapes_world import COLOURS, NOVEL, SHAPES, SIDE, paint, thing
from mmtrain.data.shards import open_shards
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError


def documents(folder: Path) -> Iterator[Document]:
    shards = open_shards(folder)
    return (shards.document(number) for number in range(len(shards)))


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    report = write_shapes(tmp_path / "a", documents=40, seed=3)
    script = (
        "import sys; from pathlib import Path; from mmtrain.data.shapes import write_shapes; "
        "write_shapes(Path(sys.argv[1]), documents=40, seed=3)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "b")], check=True)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    write_shapes(tmp_path / "c", documents=40, seed=4)
    one, other = digest(tmp_path / "a"), digest(tmp_path / "c")
    differing = {name.split("/")[0] for name in one if one[name] != other.get(name)}
    assert differing == {*SHARES, "heldout", "chat", "edits"}
    assert sum(report.documents[kind] for kind in SHARES) == 40


def test_too_few_documents_and_an_existing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="use at least 24"):
        write_shapes(tmp_path / "a", documents=5, seed=0)
    with pytest.raises(ContentError, match="never overwritten"):
        write_shapes(tmp_path, documents=24, seed=0)


def test_every_caption_is_true_of_its_picture_and_of_few_others(world: Path) -> None:
    for split in ("captions", "heldout/captions", "heldout/novel", "clips", "heldout/clips"):
        facts = [document.meta for document in documents(world / split)]
        for index, own in enumerate(facts):
            assert judge(own["caption"], own), own
            assert own["caption"].startswith(own.get("prompt", ""))
            others = [judge(own["caption"], other) for other in facts[:index]]
            assert sum(others) <= 0.5 * len(others) + 3


def test_categories_are_all_there_and_even(world: Path) -> None:
    for split in ("captions", "heldout/captions"):
        counts = Counter(document.meta["category"] for document in documents(world / split))
        assert set(counts) == {category.value for category in Category}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_training_never_shows_or_names_a_novel_pair(world: Path) -> None:
    named = [f"{colour} {shape}" for colour, shape in NOVEL]
    for kind in (*SHARES, "chat", "edits"):
        for document in documents(world / kind):
            text = " ".join(part.text for part in document.parts)
            assert not any(name in text for name in named)
            scenes = document.meta.get("scenes", [document.meta.get("objects", [])])
            for item in (item for scene in scenes for item in scene):
                assert (item["colour"], item["shape"]) not in NOVEL
    shown = {
        (item["colour"], item["shape"])
        for document in documents(world / "heldout/novel")
        for item in document.meta["objects"]
    }
    assert shown <= set(NOVEL)


def test_no_held_out_picture_was_seen_in_training(world: Path) -> None:
    def blobs(folder: str) -> set[bytes]:
        return {b for d in documents(world / folder) for part in d.parts for b in part.media}

    seen = set().union(*(blobs(kind) for kind in (*SHARES, "chat", "edits")))
    assert len(seen) > 50
    for kind in (*SHARES, "novel", "chat", "edits"):
        assert not seen & blobs(f"heldout/{kind}")


def test_pictures_show_the_colours_of_their_facts(world: Path) -> None:
    for document in documents(world / "captions"):
        pixels = np.asarray(Image.open(io.BytesIO(document.parts[0].media[0])), np.int64)
        assert pixels.shape == (SIDE, SIDE, 3)
        for colour, rgb in COLOURS.items():
            found = (np.abs(pixels - rgb).sum(-1) < 6).sum()
            expected = any(item["colour"] == colour for item in document.meta["objects"])
            assert (found > 12) == expected, (document.sample_id, colour, found)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_told_apart_by_their_pixels(shape: str) -> None:
    def mask(other: str) -> np.ndarray:
        item = thing(Draw("fixed"), ("red", other), 28, 28, "medium") | {"radius": 10.0}
        return np.asarray(paint([item], (255, 255, 255)), np.int64)[..., 1] < 128

    for other in SHAPES:
        if other != shape:
            union, common = mask(shape) | mask(other), mask(shape) & mask(other)
            assert common.sum() / union.sum() < 0.85, (shape, other)


def scene(*things: tuple[str, str, str, float, float], category: Category) -> dict[str, object]:
    objects = [
        {"size": size, "colour": colour, "shape": shape, "x": x, "y": y, "radius": 8.0}
        for size, colour, shape, x, y in things
    ]
    return {"category": category.value, "objects": objects}


RED_CIRCLE = ("medium", "red", "circle", 12.0, 30.0)
BLUE_CROSS = ("medium", "blue", "cross", 44.0, 18.0)
TRUTHS = [
    (scene(RED_CIRCLE, category=Category.single), "a red circle", True),
    (scene(RED_CIRCLE, category=Category.single), " A red  circle. ", True),
    (scene(RED_CIRCLE, category=Category.single), "the circle is red", True),
    (scene(RED_CIRCLE, category=Category.single), "a medium red circle", True),
    (scene(RED_CIRCLE, category=Category.single), "a large red circle", False),
    (scene(RED_CIRCLE, category=Category.single), "a blue circle", False),
    (scene(RED_CIRCLE, category=Category.single), "a red square", False),
    (scene(RED_CIRCLE, category=Category.single), "red circle red circle", False),
    (scene(RED_CIRCLE, category=Category.single), "", False),
    (scene(RED_CIRCLE, category=Category.single), "a red circle and a blue cross", False),
    (scene(RED_CIRCLE, category=Category.colour), "the circle is red", True),
    (scene(RED_CIRCLE, category=Category.colour), "the circle is blue", False),
    (scene(RED_CIRCLE, BLUE_CROSS, category=Category.two), "a red circle and a blue cross", True),
    (scene(RED_CIRCLE, BLUE_CROSS, category=Category.two), "a blue cross and a red circle", True),
    (scene(RED_CIRCLE, BLUE_CROSS, category=Category.two), "a blue circle and a red cross", False),
    (scene(RED_CIRCLE, BLUE_CROSS, category=Category.two), "a red circle and a red circle", False),
    (scene(RED_CIRCLE, BLUE_CROSS, category=Category.two), "a red circle", False),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.two),
        "the red circle is below the blue cross",
        True,
    ),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.position),
        "the red circle is left of the blue cross",
        True,
    ),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.position),
        "the blue cross is right of the red circle",
        True,
    ),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.position),
        "the red circle is above the blue cross",
        False,
    ),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.position),
        "a red circle and a blue cross",
        False,
    ),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.binding),
        "a medium red circle and a medium blue cross",
        True,
    ),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.binding),
        "a red circle and a blue cross",
        False,
    ),
    (
        scene(RED_CIRCLE, BLUE_CROSS, category=Category.binding),
        "a large red circle and a medium blue cross",
        False,
    ),
    (scene(RED_CIRCLE, RED_CIRCLE, category=Category.counting), "two red circles", True),
    (scene(RED_CIRCLE, RED_CIRCLE, category=Category.counting), "three red circles", False),
    (scene(RED_CIRCLE, RED_CIRCLE, category=Category.counting), "two red crosses", False),
    (scene(RED_CIRCLE, BLUE_CROSS, category=Category.counting), "one red circle", False),
]


@pytest.mark.parametrize("facts, said, true", TRUTHS)
def test_a_sentence_is_judged_by_the_facts(facts: dict[str, object], said: str, true: bool) -> None:
    assert judge(said, facts) is true


def test_a_wrong_word_makes_a_caption_false(world: Path) -> None:
    swaps = {
        **dict(zip(COLOURS, [*list(COLOURS)[1:], "red"], strict=True)),
        "two": "three",
        "three": "four",
        "four": "two",
        "left": "right",
        "right": "left",
        "above": "below",
        "below": "above",
        "small": "large",
        "large": "small",
    }
    checked = 0
    for document in documents(world / "captions"):
        words = document.meta["caption"].split()
        for index, word in enumerate(words):
            if word in swaps:
                wrong = " ".join([*words[:index], swaps[word], *words[index + 1 :]])
                assert not judge(wrong, document.meta), (wrong, document.meta)
                checked += 1
    assert checked > 100


def test_a_prompt_asks_for_the_rest_of_its_caption(world: Path, vocabulary: Vocabulary) -> None:
    """Tokens of the prompt are the first tokens of the caption, so it can be continued."""
    asked = 0
    for document in documents(world / "captions"):
        prompt = vocabulary.encode(document.meta["prompt"]) if document.meta["prompt"] else []
        assert vocabulary.encode(document.meta["caption"])[: len(prompt)] == prompt
        asked += bool(prompt)
    assert asked > 15


def test_one_token_is_one_word_and_the_size_is_known(world: Path, vocabulary: Vocabulary) -> None:
    assert vocabulary.size == SIZE
    for kind in SHARES:
        for document in documents(world / kind):
            for part in document.parts:
                ids = vocabulary.encode(part.text)
                assert len(ids) == len(part.text.split()) and vocabulary.ids["<unk>"] not in ids
                assert vocabulary.decode(ids) == part.text


def test_objects_of_a_position_are_named_by_their_larger_distance() -> None:
    facts = scene(RED_CIRCLE, BLUE_CROSS, category=Category.position)
    text, prompt = caption(Category.position, facts["objects"])  # type: ignore[arg-type]
    assert text == "the red circle is left of the blue cross" and prompt == "the red circle is"


def test_two_objects_are_named_in_reading_order(world: Path) -> None:
    pairs = 0
    for document in documents(world / "captions"):
        facts = document.meta
        if facts["category"] not in ("two objects", "attribute binding"):
            continue
        words = facts["caption"].split(" and ")
        named = sorted(facts["objects"], key=lambda item: item["shape"] not in words[0])
        assert relation(*named) in ("left of", "above"), facts
        pairs += 1
    assert pairs > 20
