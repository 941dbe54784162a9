"""Conversations about shapes: every answer is right, wrong ones are not, and old data stays."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.data import shapes
from mmtrain.data.document import CHAT, Document, Modality
from mmtrain.data.rules import Draw
from mmtrain.data.shapes import judge_answer, write_shapes
from mmtrain.data.shapes_chat import converse
from mmtrain.data.shapes_world import COLOURS, SHAPES
from mmtrain.data.shards import open_shards
from mmtrain.data.vocabulary import Vocabulary

KINDS = {
    *("colour", "shape", "counting", "place", "neighbour", "size", "presence", "describe"),
    *("sum", "opposite", "corners"),
}


def documents(folder: Path) -> Iterator[Document]:
    shards = open_shards(folder)
    return (shards.document(number) for number in range(len(shards)))


def test_the_other_sources_do_not_depend_on_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They came last: what was measured on the other sources stays true."""
    for name, share in (("few", 0.25), ("many", 2.0)):
        monkeypatch.setattr(shapes, "CHAT_SHARE", share)
        write_shapes(tmp_path / name, 24, seed=5)
    sources = [folder.parent for folder in (tmp_path / "few").rglob("index.json")]
    for folder in (f.relative_to(tmp_path / "few") for f in sources if f.name != "chat"):
        few, many = (tmp_path / n / folder / "shard.00000.mds" for n in ("few", "many"))
        assert few.read_bytes() == many.read_bytes(), folder
    assert len(list(documents(tmp_path / "many/chat"))) == 48


def test_conversations_have_pictures_turns_and_text_alone(world: Path) -> None:
    shown, turns = Counter[bool](), Counter[int]()
    for document in documents(world / "chat"):
        assert document.kind == CHAT
        shown[any(part.modality is Modality.image for part in document.parts)] += 1
        turns[len(document.meta["answers"])] += 1
        said = [part.text for part in document.parts if part.answer and not part.markup]
        assert said == document.meta["answers"]
        questions = [part.text for part in document.parts if part.text and not part.markup]
        assert [q for q in questions if q not in said] == document.meta["questions"]
    assert shown[True] == 5 * shown[False] and set(turns) == {1, 2, 3}
    assert len(list(documents(world / "heldout/chat"))) == 6


def test_every_word_of_a_conversation_is_one_token(world: Path, vocabulary: Vocabulary) -> None:
    for document in documents(world / "chat"):
        for part in document.parts:
            ids = vocabulary.encode_part(part)
            words = part.text.replace("]:", "] :").split()
            assert vocabulary.ids["<unk>"] not in ids and len(ids) == len(words)


def test_dialogues_are_right_about_their_scenes() -> None:
    """Facts against answers, in every kind of question; a wrong word is never right."""
    kinds = Counter[str]()
    said = Counter[str]()
    for number in range(600):
        dialogue = converse(Draw("test", number), number)
        facts = dialogue.facts
        assert len(set(facts["questions"])) == len(facts["questions"])
        for turn, answer in enumerate(facts["answers"]):
            kind, question = facts["question_kind"][turn], facts["questions"][turn]
            kinds[kind] += 1
            assert judge_answer(answer, facts, turn)
            assert judge_answer(f" {answer.upper()}. ", facts, turn)
            assert not judge_answer("", facts, turn)
            if kind == "presence":
                said[answer] += 1
                named = question.removeprefix("is there ").split()[1:3]
                there = [[item["colour"], item["shape"]] for item in dialogue.objects]
                assert (named in there) == (answer == "yes")
            for word in answer.split():
                wrong = next((w for w in (*COLOURS, *SHAPES) if w != word), "")
                if word in (*COLOURS, *SHAPES):
                    mutated = answer.replace(word, wrong)
                    assert not judge_answer(mutated, facts, turn), (answer, mutated)
    assert set(kinds) == KINDS and min(kinds.values()) > 15
    assert 0.35 < said["yes"] / said.total() < 0.65


@pytest.mark.parametrize(
    "answer, right",
    [
        ("the blue square", True),
        ("a blue square", True),
        ("blue square .", True),
        ("square", False),
    ],
)
def test_articles_are_free(answer: str, right: bool) -> None:
    facts = {"question_kind": ["neighbour"], "answers": ["the blue square"]}
    assert judge_answer(answer, facts) is right
