"""Candidate answers ranked by their likelihood.

The score of a candidate is its summed negative log-likelihood divided by all shifted positions of
prompt and candidate, as the evaluators released with Emu compute it for VisDial; the lowest is
best. On the world of shapes the true caption stands among captions of other pictures of its
category that are false here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from mmtrain.data.document import Modality, Part
from mmtrain.data.rules import Draw
from mmtrain.data.shapes_text import judge
from mmtrain.errors import ContentError, MissingError
from mmtrain.evaluate import held
from mmtrain.evaluate.asking import Subject, context_of
from mmtrain.evaluate.dialogs import Choice, read_dialogs
from mmtrain.evaluate.examples import Example, open_pictures
from mmtrain.evaluate.ranks import ndcg, rank_of, summary
from mmtrain.evaluate.report import Result
from mmtrain.models.emu.generate import Prompt
from mmtrain.settings import Phase, TaskConfig
from mmtrain.trained import Trained

_AT_ONCE = 25  # candidates scored in one pass


def rank(name: str, config: TaskConfig, subject: Subject) -> Iterator[Result]:
    """Ranks of the true candidates.

    Raises:
        MissingError: no held-out caption can be ranked.
        ContentError: the file is of another form, or no choice can be asked.
    """
    trained = subject.trained
    choices, broken = _choices(name, config, subject)
    ranks, gains, records = [], [], []
    for choice in choices[: config.documents or None]:
        try:
            scores = score(trained, prompt_of(trained, choice), choice.candidates)
        except ContentError as error:
            broken.append(f"{choice.key}: {error}")
            continue
        ranks.append(rank_of(scores, choice.true))
        if choice.relevance:
            gains.append(ndcg(scores, choice.relevance))
        best = min(range(len(scores)), key=scores.__getitem__)
        records.append(
            {"sample": choice.key, "rank": ranks[-1], "best": choice.candidates[best]}
            | {"true": choice.candidates[choice.true]}
        )
    if not ranks:
        raise ContentError(f"{name}: no choice could be asked; the first: {broken[0]}")
    metrics = summary(ranks) | ({"ndcg": sum(gains) / len(gains)} if gains else {})
    candidates = len(choices[0].candidates)
    yield Result(
        task=name,
        kind="rank",
        asked=len(ranks),
        metrics=metrics,
        notes={"candidates": candidates, "mean rank by chance": (candidates + 1) / 2},
        records=records,
        broken=tuple(broken),
    )


def score(trained: Trained, prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    """Negative log-likelihood of each candidate by the released divisor; lower is likelier."""
    end = trained.layout.eos
    ids = [[*trained.vocabulary.encode(candidate), end] for candidate in candidates]
    out: list[float] = []
    for start in range(0, len(ids), _AT_ONCE):
        chunk = ids[start : start + _AT_ONCE]
        sums = trained.sampler.negative_log_likelihoods(prompt, chunk).tolist()
        out += [
            total / (len(prompt.tokens) + len(own) - 1)
            for total, own in zip(sums, chunk, strict=True)
        ]
    return out


def prompt_of(trained: Trained, choice: Choice) -> Prompt:
    """What stands before a candidate: picture, caption, earlier turns, the question.

    A run that was tuned on instructions is asked in its own form: " [USER]: " and the picture
    closed by `</s>`, then " [USER]: question [ASSISTANT]:" of every turn.

    Raises:
        ContentError: a picture cannot be read, or the context has no room.
    """
    pieces: list[str | Image.Image | Part] = [*open_pictures(choice.pictures)]
    tuned = trained.recipe.phase is Phase.instruct and choice.question
    if tuned:
        pieces = [_markup(" [USER]: "), *pieces, _markup("</s>")]
    elif choice.caption:
        pieces.append(choice.caption)
    for question, answer in choice.turns:
        if tuned:
            pieces += [_markup(" [USER]: "), question, _markup(" [ASSISTANT]:"), answer]
            pieces.append(_markup("</s>"))
        else:
            pieces.append(f"{question} {answer}.")
    if choice.question:
        pieces += [_markup(" [USER]: ")] if tuned else []
        pieces.append(choice.question)
        pieces += [_markup(" [ASSISTANT]:")] if tuned else []
    prompt = trained.prompt(pieces)
    longest = max(len(trained.vocabulary.encode(candidate)) for candidate in choice.candidates) + 1
    if len(prompt.tokens) + longest > context_of(trained):
        raise ContentError(
            f"prompt and candidate take {len(prompt.tokens) + longest} positions of a context of "
            f"{context_of(trained)}"
        )
    return prompt


def _markup(text: str) -> Part:
    return Part(modality=Modality.text, text=text, markup=True)


def _choices(name: str, config: TaskConfig, subject: Subject) -> tuple[list[Choice], list[str]]:
    if config.path.endswith(".json"):
        relevance = Path(config.relevance) if config.relevance else None
        return read_dialogs(Path(config.path), Path(config.images), relevance)
    count = config.documents or held.DOCUMENTS
    documents = held.documents(config.path, subject.heldout, count)
    made = [held.captioned(source, document) for source, document in documents]
    examples = [example for example in made if example is not None and held.has_facts(example)]
    choices = [
        choice
        for example in examples
        if (choice := _caption_choice(example, examples, config)) is not None
    ]
    if not choices:
        raise MissingError(
            f"{name}: no held-out caption has false ones of its category beside it; name a folder "
            "of captions that `mmtrain data shapes` wrote as path:"
        )
    return choices, []


def _caption_choice(
    example: Example, examples: Sequence[Example], config: TaskConfig
) -> Choice | None:
    """The true caption among false ones of its category; None when there are too few."""
    category = example.facts["category"]
    others = sorted(
        {
            other.answer
            for other in examples
            if other.facts["category"] == category and not judge(other.answer, example.facts)
        }
    )
    wanted = config.candidates - 1
    if len(others) < wanted:
        return None
    false = [others[n] for n in Draw("rank", config.seed, example.key).subset(len(others), wanted)]
    true = Draw("place", config.seed, example.key).below(config.candidates)
    candidates = (*false[:true], example.answer, *false[true:])
    return Choice(key=example.key, pictures=example.pictures, candidates=candidates, true=true)
