"""The kinds of evaluation: what is asked of a run, and how the answers are measured.

A task reads its examples, asks, measures, and returns results: one for every number of shots.
Beams and lengths are those of the evaluators released with Emu, unless the recipe says otherwise.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmtrain.data.document import CHAT, Part
from mmtrain.data.picture import draw_rows
from mmtrain.data.shapes_chat import judge_answer
from mmtrain.data.shapes_text import judge
from mmtrain.errors import ContentError, MissingError
from mmtrain.evaluate import held, vqa
from mmtrain.evaluate.asking import (
    Asked,
    Manner,
    Subject,
    ask,
    context_of,
    is_tuned,
    system_of,
    write,
)
from mmtrain.evaluate.cider import cider
from mmtrain.evaluate.drawing import draw
from mmtrain.evaluate.editing import edit
from mmtrain.evaluate.examples import Example, ExampleSet, Row
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.ranking import rank
from mmtrain.evaluate.readers import read_captions, read_questions
from mmtrain.evaluate.released import answer_of, caption_of
from mmtrain.evaluate.report import Result, grouped
from mmtrain.evaluate.shots import Support, prepare
from mmtrain.evaluate.words import caption_words
from mmtrain.nn.choice import Beams
from mmtrain.settings import ExamplesConfig, SourceConfig, TaskConfig, TaskKind
from mmtrain.trained import BATCH, Trained

Heldout = Mapping[str, SourceConfig]
Task = Callable[[str, TaskConfig, Subject], Iterator[Result]]

# baaivision/Emu, Emu1: COCO captions and short answers
_CAPTION = Beams(beams=5, new_tokens=20, minimum_length=8, length_penalty=-1.0)
_ANSWER = Beams(beams=5, new_tokens=20, minimum_length=1, length_penalty=-1.0)
_SHAPES = Beams(beams=1, new_tokens=24)
_CAPTION_PROMPT = "the image depicts a photo of"
_QUESTION_PROMPT = "based on the picture, {question} short answer:"  # Emu2, arXiv:2312.13286
_DESCRIBE = "describe the picture"  # as `data.shapes_chat` asks
_SHOWN = 12  # pictures of a grid
_REMEDY = "data.heldout, or name one as path:"


def run_task(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Ask what a task of a recipe says.

    Raises:
        MissingError: examples are not there.
        ContentError: they are of another form, or none can be asked.
    """
    return KINDS[config.kind](name, config, subject)


def shapes_captions(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Captions of the world of shapes; their truth is computed from the facts."""
    trained = subject.trained
    found = _captions(config, subject.heldout, config.documents or held.DOCUMENTS)
    found = _with_facts(found)
    if not found.examples:
        raise MissingError(
            f"{name}: no document keeps facts to judge captions by (`mmtrain data shapes` writes "
            f"such documents): add one to {_REMEDY}"
        )
    prompt = _shapes_prompt(trained)
    for label, manner, support in _manners(name, config, subject, prompt, _SHAPES):
        asked = ask(trained, found, manner, support)
        outcomes, records = [], []
        for example, written in asked.answers:
            text = manner.whole(example, written)
            right = judge(text, example.facts)
            outcomes.append((tuple(example.group.split("/", 1)), float(right)))
            records.append({"sample": example.key, "text": text, "right": right})
        metrics = {"accuracy": _mean(right for _, right in outcomes)}
        yield _result(label, config, asked, outcomes, metrics, records)


def caption(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Captions compared with those of people."""
    trained = subject.trained
    found = _published(config, subject.heldout)
    prompt = _CAPTION_PROMPT if _is_json(config) else _shapes_prompt(trained)
    for label, manner, support in _manners(name, config, subject, prompt, _CAPTION):
        asked = ask(trained, found, manner, support)
        texts = [manner.whole(example, caption_of(text)) for example, text in asked.answers]
        references = [[caption_words(a) for a in e.answers] for e, _ in asked.answers]
        scores = cider([caption_words(text) for text in texts], references)
        records = [
            {"sample": example.key, "text": text, "cider": score}
            for (example, _), text, score in zip(asked.answers, texts, scores, strict=True)
        ]
        yield _result(label, config, asked, [], {"cider": 100 * _mean(scores)}, records)


def _shapes_prompt(trained: Trained) -> str:
    """A run tuned on conversations is asked; any other goes on from the document's own words."""
    return _DESCRIBE if is_tuned(trained) else "{question}"


def short_answers(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Answers to questions, compared with those of ten people."""
    trained = subject.trained
    found = _questions(config).first(config.documents or 0)
    for label, manner, support in _manners(name, config, subject, _QUESTION_PROMPT, _ANSWER):
        asked = ask(trained, found, manner, support)
        outcomes, records = [], []
        for example, written in asked.answers:
            record: dict[str, object] = {"question_id": _number(example.key)}
            record |= {"answer": answer_of(written)}
            if example.answers:
                credit = vqa.accuracy(answer_of(written), example.answers)
                outcomes.append(((example.group or "all",), credit))
                record |= {"credit": credit, "question": example.question}
            records.append(record)
        metrics = {"accuracy": 100 * _mean(c for _, c in outcomes)} if outcomes else {}
        yield _result(label, config, asked, outcomes, metrics, records, ("answer type",))


def chat(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Answers of held-out conversations, each after the true ones before it.

    An answer is exact when it is the stored one, but for case, blanks and a final stop. Where the
    facts of the world of shapes are known, it is right when it is true.
    """
    trained = subject.trained
    beams = _beams(config, Beams(beams=1, new_tokens=32))
    turns = [
        turn
        for source, document in held.documents(
            config.path, subject.heldout, config.documents or held.DOCUMENTS
        )
        if document.kind == CHAT
        for turn in held.turns(source, document)
    ]
    if not turns:
        raise MissingError(f"{name}: no conversation is held out; add a chat source to {_REMEDY}")
    asked = Asked()
    for start in range(0, len(turns), BATCH):
        chunk = turns[start : start + BATCH]
        asked.answers += _replies(trained, chunk, beams, asked)
    yield judge_replies(name, config, asked)


def judge_replies(name: str, config: TaskConfig, asked: Asked) -> Result:
    """What answers of conversations are worth."""
    outcomes, records = [], []
    for example, written in asked.answers:
        true = example.answers[0]
        exact = _bare(written) == _bare(true)
        right = exact or _is_right(written, example)
        outcomes.append((tuple(example.group.split("/", 1)), float(right)))
        records.append(
            {"sample": example.key, "text": written, "true": true, "right": right, "exact": exact}
        )
    metrics = {
        "accuracy": _mean(right for _, right in outcomes),
        "exact": _mean(bool(record["exact"]) for record in records),
    }
    return _result(name, config, asked, outcomes, metrics, records, ("source", "question"))


def _replies(
    trained: Trained, turns: Sequence[tuple[Example, tuple[Part, ...]]], beams: Beams, asked: Asked
) -> list[tuple[Example, str]]:
    examples, prompts = [], []
    for example, parts in turns:
        try:
            prompt = trained.prompt(parts)
            if len(prompt.tokens) + beams.new_tokens > context_of(trained):
                raise ContentError("the conversation leaves no room for an answer")
            prompts.append(prompt)
            examples.append(example)
        except ContentError as error:
            asked.broken.append(f"{example.key}: {error}")
    return list(zip(examples, write(trained, prompts, beams), strict=True))


KINDS: dict[TaskKind, Task] = {
    TaskKind.shapes_captions: shapes_captions,
    TaskKind.caption: caption,
    TaskKind.vqa: short_answers,
    TaskKind.chat: chat,
    TaskKind.rank: rank,
    TaskKind.draw: draw,
    TaskKind.edit: edit,
}


# --- what tasks share ----------------------------------------------------------------------


def _manners(
    name: str, config: TaskConfig, subject: Subject, prompt: str, beams: Beams
) -> Iterator[tuple[str, Manner, Support | None]]:
    """A label, a manner and a support set for every number of shots."""
    support = None
    if max(config.shots):
        assert config.support is not None  # `evaluation_faults` has seen to it
        found = _supporting(config, config.support, subject.heldout)
        support = prepare(found, config.choice, subject.trained, config.seed)
    for shots in config.shots:
        manner = Manner(
            prompt=prompt if config.prompt is None else config.prompt,
            between=". " if config.kind is TaskKind.vqa else "",
            beams=_beams(config, beams),
            shots=shots,
            form=config.form,
            system=system_of(config),
        )
        yield name if len(config.shots) == 1 else f"{name}_{shots}_shots", manner, support


def _beams(config: TaskConfig, published: Beams) -> Beams:
    return Beams(
        beams=config.beams or published.beams,
        new_tokens=config.new_tokens or published.new_tokens,
        minimum_length=published.minimum_length,
        length_penalty=published.length_penalty,
    )


def _supporting(task: TaskConfig, config: ExamplesConfig, heldout: Heldout) -> ExampleSet:
    if task.kind is TaskKind.vqa:
        asked = _questions(config)
        answered = tuple(example for example in asked.examples if example.answers)
        return ExampleSet(answered, asked.broken)
    if _is_json(config):
        return read_captions(Path(config.path), Path(config.images), config.split)
    found = _captions(config, heldout, sys.maxsize)
    return _with_facts(found) if task.kind is TaskKind.shapes_captions else found


def _published(config: TaskConfig, heldout: Heldout) -> ExampleSet:
    if not _is_json(config):
        return _captions(config, heldout, config.documents or held.DOCUMENTS)
    found = read_captions(Path(config.path), Path(config.images), config.split)
    return found.first(config.documents or 0)


def _questions(config: ExamplesConfig) -> ExampleSet:
    path = Path(config.path) if config.path else None
    questions = Path(config.questions) if config.questions else None
    return read_questions(path, questions, Path(config.images))


def _captions(config: ExamplesConfig, heldout: Heldout, count: int) -> ExampleSet:
    documents = held.documents(config.path, heldout, count)
    made = (held.captioned(source, document) for source, document in documents)
    return ExampleSet(tuple(example for example in made if example is not None))


def _with_facts(found: ExampleSet) -> ExampleSet:
    return ExampleSet(tuple(filter(held.has_facts, found.examples)), found.broken)


def _is_json(config: ExamplesConfig) -> bool:
    return config.path.endswith(".json")


def _result(
    label: str,
    config: TaskConfig,
    asked: Asked,
    outcomes: Iterable[tuple[tuple[str, ...], float]],
    metrics: dict[str, float],
    records: list[dict[str, Any]],
    columns: tuple[str, ...] = ("source", "category"),
) -> Result:
    if not asked.answers:
        first = f"; the first: {asked.broken[0]}" if asked.broken else ""
        raise ContentError(f"{label}: no example could be asked{first}")
    left_out = {"shots left out for want of room": asked.shots_left_out}
    return Result(
        task=label,
        kind=config.kind.name,
        asked=len(asked.answers),
        metrics=metrics,
        groups=grouped(outcomes),
        columns=columns,
        notes=left_out if asked.shots_left_out else {},
        records=records,
        broken=tuple(asked.broken),
        grid=_grid(asked.answers),
    )


def _grid(answers: Sequence[tuple[Example, str]]) -> Image.Image | None:
    """The first pictures with what was written of them; None where no picture is shown."""
    rows: list[Row] = [
        [*open_pictures(example.pictures[:1]), example.question, "->", text]
        for example, text in answers[:_SHOWN]
        if example.pictures
    ]
    return draw_rows(rows, width=600) if rows else None


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def _is_right(written: str, example: Example) -> bool:
    """Whether an answer about the world of shapes is true; False where nothing is known of it."""
    known = {"question_kind", "answers", "objects", "scene"} <= set(example.facts)
    return known and judge_answer(written, example.facts, int(example.key.rpartition("/")[2]))


def _bare(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .")


def _number(key: str) -> int | str:
    return int(key) if key.isdecimal() else key
