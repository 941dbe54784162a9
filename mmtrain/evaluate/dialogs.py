"""Reader of VisDial: dialogs about pictures, with 100 candidate answers in every round.

VisDial v1.0 (arXiv:1611.08669): `data.questions` and `data.answers` are lists of texts, a dialog
names its picture, a caption, and rounds of (question, answer, answer_options, gt_index). Dense
annotations give the share of people who found each candidate of one round fitting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import ContentError, MissingError
from mmtrain.evaluate.examples import Picture
from mmtrain.evaluate.readers import read_json

_FORM = 'VisDial {"data": {"questions": [...], "answers": [...], "dialogs": [...]}}'
_NAMES = ("VisualDialog_{split}_{id:012d}.jpg", "COCO_{split}_{id:012d}.jpg", "{id:012d}.jpg")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A question with candidate answers.

    Attributes:
        key: id of the question.
        pictures: shown first.
        caption: said first; may be empty.
        turns: earlier (question, answer) pairs.
        question: that is answered; empty when a caption is chosen.
        candidates: to be ranked.
        true: index of the true candidate.
        relevance: how fitting each candidate is, when people judged that.
    """

    key: str
    pictures: tuple[Picture, ...]
    caption: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    question: str = ""
    candidates: tuple[str, ...]
    true: int
    relevance: tuple[float, ...] = ()


def read_dialogs(
    path: Path, images: Path, relevance: Path | None
) -> tuple[list[Choice], list[str]]:
    """Every round of every dialog, and a line for each dialog that cannot be used.

    Raises:
        MissingError: a file or folder is not there.
        ContentError: the file is of another form, or no dialog of it can be used.
    """
    content = read_json(path)
    if not images.is_dir():
        raise MissingError(f"the folder of pictures {images} is not there; set `images:`")
    try:
        data = content["data"]
        questions, answers, dialogs = data["questions"], data["answers"], data["dialogs"]
    except (KeyError, TypeError) as error:
        raise ContentError(f"{path}: not a file of dialogs; expected {_FORM}") from error
    fitting = _relevance(relevance)
    split = str(content.get("split", "val2018"))
    choices: list[Choice] = []
    broken: list[str] = []
    for number, dialog in enumerate(dialogs):
        try:
            picture = _picture(images, split, int(dialog["image_id"]))
            choices += _rounds(dialog, picture, questions, answers, fitting)
        except (KeyError, TypeError, ValueError, IndexError, FileNotFoundError) as error:
            broken.append(f"{path.name} dialogs[{number}]: {type(error).__name__} {error}")
    if not choices:
        first = f"; the first: {broken[0]}" if broken else ""
        raise ContentError(f"{path}: none of {len(broken)} dialogs can be used{first}")
    return choices, broken


def _rounds(
    dialog: Mapping[str, Any],
    picture: Path,
    questions: Sequence[str],
    answers: Sequence[str],
    fitting: Mapping[tuple[int, int], tuple[float, ...]],
) -> list[Choice]:
    out = []
    turns: list[tuple[str, str]] = []
    image = int(dialog["image_id"])
    for number, entry in enumerate(dialog["dialog"], start=1):
        question = questions[entry["question"]]
        if "answer_options" in entry:
            options = tuple(answers[index] for index in entry["answer_options"])
            relevance = fitting.get((image, number), ())
            if relevance and len(relevance) != len(options):
                raise ValueError(f"{len(relevance)} relevances for {len(options)} candidates")
            true = int(entry["gt_index"])
            if not 0 <= true < len(options):
                raise ValueError(f"gt_index {true} of {len(options)} candidates")
            choice = Choice(
                key=f"{image}/{number}",
                pictures=(picture,),
                caption=str(dialog.get("caption", "")),
                turns=tuple(turns),
                question=question,
                candidates=options,
                true=true,
                relevance=relevance,
            )
            out.append(choice)
        if "answer" in entry:
            turns.append((question, answers[entry["answer"]]))
    return out


def _relevance(path: Path | None) -> dict[tuple[int, int], tuple[float, ...]]:
    if path is None:
        return {}
    try:
        return {
            (int(e["image_id"]), int(e["round_id"])): tuple(
                map(float, e["gt_relevance"] if "gt_relevance" in e else e["relevance"])
            )
            for e in read_json(path)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ContentError(
            f"{path}: not dense annotations ({error!r}); expected "
            '[{"image_id", "round_id", "gt_relevance"}]'
        ) from error


def _picture(folder: Path, split: str, number: int) -> Path:
    for name in _NAMES:
        path = folder / name.format(split=split, id=number)
        if path.is_file():
            return path
    raise FileNotFoundError(f"no picture of id {number} in {folder}")
