"""Tasks: pictures that are true count, likelier candidates rank higher, dialogs are read whole."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtrain.data.document import Part
from mmtrain.data.shapes_edits import EDITS
from mmtrain.data.shapes_text import Category
from mmtrain.data.shards import open_shards
from mmtrain.errors import ContentError, MissingError
from mmtrain.evaluate import held
from mmtrain.evaluate.asking import Asked, Subject
from mmtrain.evaluate.dialogs import Choice, read_dialogs
from mmtrain.evaluate.drawing import judge_drawings
from mmtrain.evaluate.editing import judge_edits
from mmtrain.evaluate.examples import Example, Row
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.ranking import prompt_of, score
from mmtrain.evaluate.report import Group, Result, append_line, write
from mmtrain.evaluate.tasks import judge_replies, run_task
from mmtrain.settings import SourceConfig, TaskConfig, TaskKind
from mmtrain.trained import Trained


@pytest.fixture(scope="module")
def captions(shapes: Path) -> list[Example]:
    heldout = {"captions": SourceConfig(path=str(shapes / "heldout/captions"))}
    made = [held.captioned(name, d) for name, d in held.documents("", heldout, 99)]
    return [example for example in made if example is not None]


# --- draw ----------------------------------------------------------------------------------


def test_true_pictures_are_all_right_and_others_wrong(captions: list[Example]) -> None:
    true = {e.answer: open_pictures(e.pictures)[0] for e in captions}

    def draw(prompts: Sequence[Row]) -> list[Image.Image]:
        return [true[str(prompt[0])] for prompt in prompts]

    def draw_of_another(prompts: Sequence[Row]) -> list[Image.Image]:
        return [Image.new("RGB", (64, 64), "white") for _ in prompts]

    right = judge_drawings("draw", captions, draw)
    assert right.metrics["accuracy"] == 1 and right.asked == len(captions)
    categories = {category.value.replace(" ", "_") for category in Category}
    assert categories <= right.metrics.keys()
    assert all(right.metrics[name] == 1 for name in categories)
    assert "clean 0.00%" in right.notes["the judge's own error on the true pictures"]
    assert right.grid is not None and right.grid.height > 6 * 112
    assert judge_drawings("draw", captions, draw_of_another).metrics["accuracy"] == 0


def test_a_picture_of_another_caption_is_wrong(captions: list[Example]) -> None:
    pictures = [open_pictures(e.pictures)[0] for e in captions]
    turned = pictures[1:] + pictures[:1]
    result = judge_drawings("draw", captions, lambda _: turned)
    assert result.metrics["accuracy"] < 0.1
    assert {record["right"] for record in result.records} <= {True, False}


def test_drawing_needs_a_decoder(
    trained: Trained, subject_of: Callable[[Trained], Subject]
) -> None:
    with pytest.raises(MissingError, match="--decoder RUN"):
        list(run_task("paint", TaskConfig(kind=TaskKind.draw), subject_of(trained)))


# --- edit ----------------------------------------------------------------------------------


def test_true_edits_are_all_right_and_pictures_left_as_they_were_wrong(shapes: Path) -> None:
    heldout = {"edits": SourceConfig(path=str(shapes / "heldout/edits"))}
    made = [held.edited(name, d) for name, d in held.documents("", heldout, 99)]
    edits = [example for example in made if example is not None]
    assert len(edits) == len(made) >= len(EDITS)
    true = {edit.question: open_pictures(edit.pictures)[1] for edit in edits}
    prompts: list[Row] = []

    def draw(asked: Sequence[Row]) -> list[Image.Image]:
        prompts.extend(asked)
        return [true[str(words)] for _, words in asked]

    right = judge_edits("edits", edits, draw)
    assert [words for _, words in prompts] == [edit.question for edit in edits]
    assert right.metrics == dict.fromkeys(("accuracy", "asked", "kept", *EDITS), 1.0)
    assert {group.names[1] for group in right.groups} == set(EDITS)
    assert right.notes["judged wrong on the true edited pictures"] == "0.00%"
    assert right.grid is not None and right.grid.height > 56 * len(edits)
    lazy = judge_edits("edits", edits, lambda asked: [open_image(row[0]) for row in asked])
    assert lazy.metrics["accuracy"] == 0 and lazy.metrics["kept"] > 0.3


def open_image(piece: object) -> Image.Image:
    assert isinstance(piece, Image.Image)
    return piece


def test_edits_need_what_draws_and_documents_that_are_edits(
    trained: Trained, subject_of: Callable[[Trained], Subject]
) -> None:
    subject = subject_of(trained)
    with pytest.raises(MissingError, match="--decoder RUN"):
        list(run_task("change", TaskConfig(kind=TaskKind.edit), subject))
    captions = held.documents("", subject.heldout, 6)
    assert [held.edited(name, document) for name, document in captions] == [None] * 12


# --- rank ----------------------------------------------------------------------------------


def test_scores_are_likelihoods_over_all_shifted_positions(trained: Trained) -> None:
    prompt = trained.prompt([Image.new("RGB", (28, 28), "red")])
    candidates = ["a red circle", "two blue crosses", "a"] * 20  # more than one pass scores
    scores = score(trained, prompt, candidates)
    for candidate, found in zip(candidates[:3], scores[:3], strict=True):
        ids = [*trained.vocabulary.encode(candidate), trained.layout.eos]
        with torch.inference_mode():
            packed = trained.sampler.pack([type(prompt)((*prompt.tokens, *ids), prompt.pixels)])
            rows = trained.sampler.head.logits(trained.sampler.hidden(packed)).log_softmax(-1)
        start = len(prompt.tokens) - 1
        total = -sum(float(rows[start + place, token]) for place, token in enumerate(ids))
        assert found == pytest.approx(total / (len(prompt.tokens) + len(ids) - 1), rel=1e-5)
    assert scores[:3] == pytest.approx(scores[-3:], rel=1e-5)


def test_true_captions_are_ranked_among_false_ones(
    trained: Trained, subject_of: Callable[[Trained], Subject]
) -> None:
    config = TaskConfig(kind=TaskKind.rank, candidates=2)
    (result,) = run_task("ranks", config, subject_of(trained))
    assert result.asked > 4 and result.notes["mean rank by chance"] == 1.5
    assert all(record["true"] in record.values() for record in result.records)
    (again,) = run_task("ranks", config, subject_of(trained))
    assert again.metrics == result.metrics
    too_many = TaskConfig(kind=TaskKind.rank, candidates=500)
    with pytest.raises(MissingError, match="no held-out caption has false ones"):
        list(run_task("ranks", too_many, subject_of(trained)))


VISDIAL: dict[str, Any] = {
    "split": "val2018",
    "data": {
        "questions": ["what shape ?", "what colour ?"],
        "answers": ["a circle", "red", "blue"],
        "dialogs": [
            {
                "image_id": 5,
                "caption": "a picture",
                "dialog": [
                    {"question": 0, "answer": 0, "answer_options": [0, 1, 2], "gt_index": 0},
                    {"question": 1, "answer": 1, "answer_options": [2, 1], "gt_index": 1},
                ],
            },
            {"image_id": 6, "dialog": []},
            {"image_id": 5, "dialog": [{"question": 9, "answer_options": [0], "gt_index": 0}]},
        ],
    },
}


@pytest.fixture
def visdial(tmp_path: Path) -> Path:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "VisualDialog_val2018_000000000005.jpg")
    (tmp_path / "dialogs.json").write_text(json.dumps(VISDIAL))
    dense = [{"image_id": 5, "round_id": 2, "gt_relevance": [0.0, 1.0]}]
    (tmp_path / "dense.json").write_text(json.dumps(dense))
    return tmp_path


def test_dialogs_are_read_with_their_history(visdial: Path) -> None:
    choices, broken = read_dialogs(visdial / "dialogs.json", visdial, visdial / "dense.json")
    first, second = choices
    assert (first.turns, first.question) == ((), "what shape ?")
    assert first.candidates == ("a circle", "red", "blue") and first.true == 0
    assert second.turns == (("what shape ?", "a circle"),) and second.relevance == (0.0, 1.0)
    assert len(broken) == 2 and "dialogs[1]" in broken[0] and "id 6" in broken[0]
    (visdial / "dialogs.json").write_text("{}")
    with pytest.raises(ContentError, match="expected VisDial"):
        read_dialogs(visdial / "dialogs.json", visdial, None)


def test_visdial_is_ranked(
    visdial: Path, trained: Trained, subject_of: Callable[[Trained], Subject]
) -> None:
    config = TaskConfig(
        kind=TaskKind.rank,
        path=str(visdial / "dialogs.json"),
        images=str(visdial),
        relevance=str(visdial / "dense.json"),
    )
    (result,) = run_task("dialogs", config, subject_of(trained))
    assert result.asked == 2 and len(result.broken) == 2
    assert {"mrr", "recall_at_1", "recall_at_10", "mean_rank", "ndcg"} <= result.metrics.keys()


def test_a_tuned_run_is_asked_in_turns(visdial: Path, trained: Trained, tuned: Trained) -> None:
    (_, choice), _ = read_dialogs(visdial / "dialogs.json", visdial, None)
    decode = tuned.vocabulary.decode
    plain = prompt_of(trained, choice, "none").tokens
    assert decode(plain) == "a picture what shape ? a circle. what colour ?"
    asked = prompt_of(tuned, choice, "none").tokens
    ids = tuned.vocabulary.ids
    assert [t for t in asked if t in (ids["[USER]"], ids["[ASSISTANT]"])] == [
        ids["[USER]"], ids["[USER]"], ids["[ASSISTANT]"], ids["[USER]"], ids["[ASSISTANT]"],
    ]  # fmt: skip
    assert "picture" not in decode(asked) and decode(asked).count("what") == 2
    assert isinstance(choice, Choice) and choice.caption == "a picture"


# --- conversations -------------------------------------------------------------------------


def test_every_turn_is_asked_after_the_true_answers_before_it(shapes: Path) -> None:
    shards = open_shards(shapes / "heldout/chat")
    longest = max(map(shards.document, range(len(shards))), key=lambda d: len(d.parts))
    asked = list(held.turns("chat", longest))
    assert len(asked) == len(longest.meta["question_kind"]) > 1
    for number, (example, parts) in enumerate(asked):
        assert example.answers == (longest.meta["answers"][number],)
        assert example.question == longest.meta["questions"][number]
        assert example.group == f"chat/{longest.meta['question_kind'][number]}"
        said = [part.text for part in parts if part.answer and not part.markup]
        assert said == longest.meta["answers"][:number]
        last = parts[-1]
        assert isinstance(last, Part) and "[ASSISTANT]" in last.text


def test_true_answers_are_right_and_others_wrong(shapes: Path) -> None:
    config = TaskConfig(kind=TaskKind.chat)
    shards = open_shards(shapes / "heldout/chat")
    documents = [shards.document(number) for number in range(len(shards))]
    turns = [example for document in documents for example, _ in held.turns("chat", document)]
    true = Asked([(example, f" {example.answers[0].upper()}.") for example in turns])
    told = judge_replies("chat", config, true)
    assert told.metrics == {"accuracy": 1.0, "exact": 1.0} and told.asked == len(turns)
    assert ("chat", "colour") in {group.names for group in told.groups}
    free = judge_replies("chat", config, Asked([(e, f"it is {e.answers[0]}") for e in turns]))
    assert free.metrics["exact"] == 0 and free.metrics["accuracy"] > 0.5
    wrong = judge_replies("chat", config, Asked([(e, "perhaps") for e in turns]))
    assert wrong.metrics == {"accuracy": 0.0, "exact": 0.0}


def test_a_tuned_run_describes_what_it_is_shown(
    trained: Trained, tuned: Trained, subject_of: Callable[[Trained], Subject]
) -> None:
    """Asked in words of its own, it does not go on from those of the document."""
    config = TaskConfig(kind=TaskKind.shapes_captions, documents=12, new_tokens=2)
    begun = {}
    for name, run in (("trained", trained), ("tuned", tuned)):
        (result,) = run_task("captions", config, subject_of(run))
        begun[name] = [record["text"].startswith("the ") for record in result.records]
        assert result.asked == 9 and result.grid is not None
    assert sum(begun["trained"]) >= 2 > sum(begun["tuned"])  # a colour and a position


def test_conversations_are_asked(tuned: Trained, subject_of: Callable[[Trained], Subject]) -> None:
    config = TaskConfig(kind=TaskKind.chat, documents=8, new_tokens=4)
    (result,) = run_task("chat", config, subject_of(tuned))
    assert result.columns == ("source", "question") and result.metrics["accuracy"] <= 0.5
    assert result.asked >= 8 and not result.broken


def test_without_facts_or_conversations_the_way_out_is_said(
    trained: Trained, shapes: Path, subject_of: Callable[[Trained], Subject]
) -> None:
    pages = str(shapes / "heldout/pages")
    for kind in (TaskKind.shapes_captions, TaskKind.chat, TaskKind.rank):
        with pytest.raises(MissingError, match="name"):
            list(run_task("x", TaskConfig(kind=kind, path=pages), subject_of(trained)))


# --- reports -------------------------------------------------------------------------------


def result(task: str, share: int) -> Result:
    return Result(
        task=task,
        kind="vqa",
        asked=4,
        metrics={"accuracy": 25.0 * share},
        groups=(Group(("yes/no",), share, 4),),
        columns=("answer type",),
        broken=("q[3]: no picture",),
    )


def test_reports_of_several_tasks_join_and_replace(tmp_path: Path) -> None:
    heading = {"run": "r", "step": 8}
    write(tmp_path, "step-00000008", heading, [result("a", 1), result("b", 2)])
    table = write(tmp_path, "step-00000008", heading, [result("a", 3)]).read_text()
    stored = json.loads((tmp_path / "step-00000008.json").read_text())
    assert [t["metrics"]["accuracy"] for t in stored["tasks"].values()] == [75.0, 50.0]
    assert "| a | vqa | 4 | 75 |" in table and "| yes/no | 3 | 4 | 75.0% |" in table
    assert "- could not be asked: 1" in table
    assert not list(tmp_path.glob("*.partial"))


def test_a_step_has_one_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    for step, share in ((2, 1), (4, 2), (2, 3)):
        append_line(path, step, [result("a", share)])
    with path.open("a") as file:
        file.write('{"step": 6, "a/acc')  # a kill in the middle of a line
    append_line(path, 8, [result("a", 4)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["a/accuracy"]) for line in lines] == [(4, 50), (2, 75), (8, 100)]
    assert lines[0]["a/share/yes/no"] == 0.5
