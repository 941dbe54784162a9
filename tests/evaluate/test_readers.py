"""Readers: every published form; what cannot be used is named and counted, the rest is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtrain.errors import ContentError, MissingError
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.readers import read_captions, read_questions

COCO = {
    "images": [
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
        {"id": 9, "file_name": "lost.jpg"},
        {"id": 11, "file_name": "COCO_val2014_000000000011.jpg"},
        {"file_name": "COCO_val2014_000000000007.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A red dog."},
        {"id": 2, "image_id": 7, "caption": "a dog"},
        {"id": 3, "image_id": 11, "caption": None},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014", "filename": "k.jpg", "cocoid": 5, "split": "test",
            "sentences": [{"raw": "a kite"}, {"raw": "a blue kite"}],
        },
        {"filepath": "val2014", "filename": "k.jpg", "split": "train", "sentences": [{"raw": "x"}]},
        {"filepath": "val2014", "filename": "gone.jpg", "split": "test", "sentences": []},
    ],
}  # fmt: skip
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 7, "question": "what colour?", "question_id": 70},
        {"image_id": 8, "question": "who?", "question_id": 80},
        {"image_id": 7, "question": "", "question_id": 71},
        {"image_id": 7, "question": "where?", "question_id": 72},
        "nonsense",
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": number,
            "answer_type": "other",
            "answers": [{"answer": word, "answer_id": i} for i, word in enumerate(["red"] * 10)],
        }
        for number in (70, 80, 71)
    ]
}
VIZWIZ = [
    {
        "image": "v.jpg", "question": "what is it?", "answer_type": "unanswerable",
        "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 6
        + [{"answer": "soup", "answer_confidence": "maybe"}] * 4,
    },
    {"image": "v.jpg", "answers": []},
    {"image": "none.jpg", "question": "?", "answers": [{"answer": "x"}]},
]  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    names = ("COCO_val2014_000000000007.jpg", "COCO_val2014_000000000011.jpg", "v.jpg")
    for name in (*names, "val2014/k.jpg"):
        Image.new("RGB", (8, 6), "red").save(folder / name)
    return folder


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_coco_captions(tmp_path: Path, images: Path) -> None:
    found = read_captions(write(tmp_path, "c.json", COCO), images, "test")
    (example,) = found.examples
    assert example.key == "7" and example.answers == ("A red dog.", "a dog")
    assert open_pictures(example.pictures)[0].size == (8, 6)
    lost, untold, nameless = found.broken[1:]
    assert "annotations[2]" in found.broken[0]
    assert "images[1]" in lost and "id 9" in lost
    assert "images[2]" in untold and "11" in untold
    assert "images[3]" in nameless and "'id'" in nameless


def test_a_missing_picture_is_named(tmp_path: Path, images: Path) -> None:
    content = {**COCO, "annotations": [{"image_id": i, "caption": "x"} for i in (7, 9)]}
    found = read_captions(write(tmp_path, "c.json", content), images, "test")
    assert any("lost.jpg" in line and str(images) in line for line in found.broken)


def test_karpathys_split(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path, "dataset_coco.json", KARPATHY)
    found = read_captions(path, images, "test")
    (example,) = found.examples
    assert (example.key, example.answers) == ("5", ("a kite", "a blue kite"))
    assert len(found.broken) == 1 and "no sentences" in found.broken[0]
    with pytest.raises(ContentError, match="no split 'val'; it has test, train"):
        read_captions(path, images, "val")


def test_vqa_questions_and_annotations(tmp_path: Path, images: Path) -> None:
    questions = write(tmp_path, "q.json", QUESTIONS)
    found = read_questions(write(tmp_path, "a.json", ANNOTATIONS), questions, images)
    (example,) = found.examples
    assert (example.key, example.question, example.group) == ("70", "what colour?", "other")
    assert example.answers == ("red",) * 10 and example.answer == "red"
    assert example.image == "COCO_val2014_000000000007.jpg"
    picture, text, annotation, form = found.broken
    assert "questions[1]" in picture and "000000000008.jpg" in picture
    assert "questions[2]" in text and "''" in text
    assert "questions[3]" in annotation and "72" in annotation
    assert "questions[4]" in form


def test_a_test_set_has_no_answers(tmp_path: Path, images: Path) -> None:
    found = read_questions(None, write(tmp_path, "q.json", QUESTIONS), images)
    assert [example.key for example in found.examples] == ["70", "72"]
    assert all(example.answers == () for example in found.examples)


def test_vizwiz(tmp_path: Path, images: Path) -> None:
    found = read_questions(write(tmp_path, "v.json", VIZWIZ), None, images)
    (example,) = found.examples
    assert (example.key, example.answer) == ("v.jpg", "unanswerable")
    assert example.group == "unanswerable" and len(example.answers) == 10
    assert len(found.broken) == 2 and "none.jpg" in found.broken[1]


def test_what_is_no_such_file_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(MissingError, match=r"gone\.json"):
        read_captions(tmp_path / "gone.json", images, "test")
    with pytest.raises(MissingError, match="set `images:`"):
        read_captions(write(tmp_path, "c.json", COCO), tmp_path / "nowhere", "test")
    (tmp_path / "bad.json").write_text('{"images": [')
    with pytest.raises(ContentError, match="cannot be read as JSON"):
        read_captions(tmp_path / "bad.json", images, "test")
    with pytest.raises(ContentError, match="Karpathy"):
        read_captions(write(tmp_path, "l.json", [1]), images, "test")
    with pytest.raises(ContentError, match="name their file as `questions:`"):
        read_questions(write(tmp_path, "a.json", ANNOTATIONS), None, images)
    with pytest.raises(ContentError, match="VizWiz"):
        read_questions(write(tmp_path, "o.json", {"a": 1}), None, images)
    with pytest.raises(ContentError, match="none of 1 records can be used; the first: "):
        read_questions(write(tmp_path, "v.json", VIZWIZ[1:2]), None, images)


def test_a_damaged_picture_is_named_when_it_is_opened(images: Path) -> None:
    path = images / "v.jpg"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ContentError, match=r"v\.jpg cannot be read"):
        open_pictures([path])
