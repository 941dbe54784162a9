"""Candidate answers ranked by their likelihood.

The score of a candidate is its summed negative log-likelihood divided by all shifted positions of
prompt and candidate, as the evaluators released with Emu compute it for VisDial; the lowest is
best. On the world of shapes the true caption stands among captions of other pictures of its
category that are false here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmtrain.data.chat import Turn, prompt_parts, template_of
from mmtrain.data.rules import Draw
from mmtrain.data.shapes_text import judge
from mmtrain.errors import ContentError, MissingError
from mmtrain.evaluate import held
from mmtrain.evaluate.asking import Subject, contents, context_of, is_tuned, system_of
from mmtrain.evaluate.dialogs import Choice, read_dialogs
from mmtrain.evaluate.examples import Example
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.ranks import ndcg, rank_of, summary
from mmtrain.evaluate.report import Result
from mmtrain.models.writing import Prompt
from mmtrain.settings import TaskConfig
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
            scores = score(
                trained, prompt_of(trained, choice, system_of(config)), choice.candidates
            )
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


def prompt_of(trained: Trained, choice: Choice, system: str) -> Prompt:
    """What stands before a candidate: picture, caption, earlier turns, the question.

    A run that was tuned on conversations is asked in one, without the caption.

    Raises:
        ContentError: a picture cannot be read, or the context has no room.
    """
    pictures = open_pictures(choice.pictures)
    if is_tuned(trained) and choice.question:
        said = [((question,), (answer,)) for question, answer in choice.turns]
        (first, reply), *later = [*said, ((choice.question,), ())]
        turns = [Turn((*contents([*pictures]), *first), reply), *(Turn(q, a) for q, a in later)]
        prompt = trained.prompt(prompt_parts(turns, template_of(system, turns)))
    else:
        earlier = [f"{question} {answer}." for question, answer in choice.turns]
        words = [text for text in (choice.caption, *earlier, choice.question) if text]
        prompt = trained.prompt([*pictures, *words])
    longest = max(len(trained.vocabulary.encode(candidate)) for candidate in choice.candidates) + 1
    if len(prompt.tokens) + longest > context_of(trained):
        raise ContentError(
            f"prompt and candidate take {len(prompt.tokens) + longest} positions of a context of "
            f"{context_of(trained)}"
        )
    return prompt


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
