"""Prompts: their form, the examples in them, and the room they leave."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmtrain.data.document import Part
from mmtrain.data.shapes_world import COLOURS, paint
from mmtrain.evaluate.asking import Asked, Manner, ask, context_of, laid_out, positions, row_of
from mmtrain.evaluate.examples import Example, ExampleSet
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.shots import Support, prepare
from mmtrain.nn.choice import Beams
from mmtrain.settings import ShotChoice, ShotForm
from mmtrain.trained import Trained

SHORT = Beams(beams=1, new_tokens=4)


def picture(folder: Path, name: str, colour: str, x: float = 28) -> Path:
    path = folder / f"{name}.png"
    item = {"colour": colour, "shape": "square", "x": x, "y": 28, "radius": 14}
    paint([item], (230, 230, 230)).save(path)
    return path


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    """One example of each colour."""
    return [
        Example(
            key=colour,
            image=colour,
            pictures=(picture(tmp_path, colour, colour),),
            question="what is it ?",
            answers=(f"a {colour} square",),
        )
        for colour in COLOURS
    ]


def words(row: list[str | Image.Image]) -> list[str]:
    return [piece if isinstance(piece, str) else "[]" for piece in row]


def test_a_question_stands_after_its_picture(examples: list[Example]) -> None:
    manner = Manner(prompt="based on the picture, {question} short answer:", beams=SHORT)
    shown = Image.new("RGB", (4, 4))
    said = "based on the picture, what is it ? short answer:"
    assert words(manner.asks(examples[0], [shown])) == ["[]", said]
    separated = replace(manner, between=". ")
    assert words(separated.shows(examples[0])) == ["[]", f"{said} a red square. "]
    alone = replace(separated, form=ShotForm.text)
    assert words(alone.shows(examples[0])) == [f"{said} a red square. "]
    bare = Manner(prompt="", beams=SHORT)
    assert words(bare.asks(examples[0], [shown])) == ["[]"]
    assert words(bare.shows(examples[0])) == ["[]", "a red square"]


def test_a_caption_is_shown_whole_where_it_begins_with_its_question(
    examples: list[Example],
) -> None:
    asked = replace(examples[0], question="the square is", answers=("the square is red",))
    assert words(Manner(beams=SHORT).shows(asked)) == ["[]", "the square is red"]


def test_runs_tuned_on_conversations_are_asked_in_one(trained: Trained, tuned: Trained) -> None:
    row: list[str | Image.Image] = [Image.new("RGB", (28, 28), "red"), "what is it ?"]
    assert laid_out(trained, row, "none") is row
    parts = laid_out(tuned, row, "none")
    assert [p.text.strip() for p in parts if isinstance(p, Part) and p.markup] == [
        "[USER]:", "[ASSISTANT]:",
    ]  # fmt: skip
    ids = tuned.prompt(parts).tokens
    assert positions(tuned, parts) == len(ids)
    assert tuned.vocabulary.ids["[ASSISTANT]"] in ids
    system = laid_out(tuned, row, "auto")[0]
    assert isinstance(system, Part) and "[IMG]ImageContent[/IMG]" in system.text


def test_similar_examples_are_those_whose_pictures_are_alike(
    trained: Trained, examples: list[Example], tmp_path: Path
) -> None:
    support = prepare(ExampleSet(tuple(examples)), ShotChoice.similar, trained, seed=0)
    for colour in COLOURS:
        near = picture(tmp_path, f"{colour}-near", colour, x=28.5)
        asked = Example(key="q", image="other", pictures=(near,), answers=("",))
        with Image.open(near) as shown:
            chosen = support.choose(asked, [shown.convert("RGB")], trained, 3)
        assert len(chosen) == 3 and chosen[-1].key == colour  # the most similar stands last


def test_an_example_is_never_shown_for_its_own_picture(
    trained: Trained, examples: list[Example]
) -> None:
    for choice in ShotChoice:
        support = prepare(ExampleSet(tuple(examples)), choice, trained, seed=0)
        for asked in examples:
            with Image.open(asked.pictures[0]) as shown:
                chosen = support.choose(asked, [shown.convert("RGB")], trained, 9)
            assert asked not in chosen and len(chosen) == len(examples) - 1


def test_random_examples_depend_on_the_seed_and_the_question(
    trained: Trained, examples: list[Example]
) -> None:
    def drawn(seed: int, key: str) -> list[str]:
        support = Support(tuple(examples), None, (), seed)
        asked = replace(examples[0], key=key, image="other")
        return [example.key for example in support.choose(asked, [], trained, 2)]

    assert drawn(0, "a") == drawn(0, "a")
    assert len({tuple(drawn(seed, key)) for seed in range(4) for key in "abc"}) > 4


def test_examples_that_do_not_fit_are_left_out_the_farthest_first(
    trained: Trained, examples: list[Example]
) -> None:
    support = prepare(ExampleSet(tuple(examples)), ShotChoice.similar, trained, seed=0)
    manner = Manner(prompt="what colour is the square ?", beams=SHORT, shots=5)
    asked = Asked()
    row = row_of(trained, examples[0], manner, support, asked)
    pictures = open_pictures(examples[0].pictures)
    chosen = support.choose(examples[0], pictures, trained, 5)
    left_out = asked.shots_left_out
    assert 1 <= left_out <= 4
    assert words(row[1:-2:2]) == [words(manner.shows(shot))[1] for shot in chosen[left_out:]]
    room = context_of(trained) - SHORT.new_tokens
    longer = positions(trained, [*manner.shows(chosen[left_out - 1]), *row])
    assert positions(trained, row) <= room < longer


def test_a_question_without_room_and_a_lost_picture_are_counted(
    trained: Trained, examples: list[Example], tmp_path: Path
) -> None:
    long = replace(examples[0], key="long", question="what is it ? " * 40)
    lost = replace(examples[0], key="lost", pictures=(tmp_path / "gone.png",))
    found = ExampleSet((long, lost, examples[1]), ("broken.json[3]: no picture",))
    done = ask(trained, found, Manner(beams=SHORT), None)
    assert [example.key for example, _ in done.answers] == ["green"]
    assert done.broken[0] == "broken.json[3]: no picture"
    assert "long: the question leaves no room" in done.broken[1]
    assert "lost: picture" in done.broken[2] and "gone.png" in done.broken[2]


def test_many_beams_and_one_write_for_every_example(
    trained: Trained, examples: list[Example]
) -> None:
    for beams in (SHORT, Beams(beams=3, new_tokens=4, minimum_length=1, length_penalty=-1.0)):
        done = ask(trained, ExampleSet(tuple(examples)), Manner(beams=beams), None)
        assert len(done.answers) == len(examples)
