"""Documents of shards as examples: captions of pictures and clips, and conversations."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmtrain.data.document import CHAT, Document, Modality, Part, is_edit
from mmtrain.data.shards import open_shards
from mmtrain.errors import ContentError
from mmtrain.evaluate.examples import Example
from mmtrain.settings import SourceConfig

DOCUMENTS = 256  # asked of each source, if a task does not say how many
_FRAMES = 8  # of a clip that is captioned


def documents(
    path: str, heldout: Mapping[str, SourceConfig], count: int
) -> Iterator[tuple[str, Document]]:
    """(source, document) of the first documents of a shard folder, or of every held-out source.

    Args:
        path: a folder of shards; empty for the held-out sources.
        heldout: the recipe's.
        count: of each source.
    """
    sources = {Path(path).name: SourceConfig(path=path)} if path else heldout
    for name, config in sources.items():
        shards = open_shards(Path(config.path), config.remote)
        for number in range(min(count, len(shards))):
            yield name, shards.document(number)


def captioned(source: str, document: Document) -> Example | None:
    """A picture or clip with its caption; None for a document that is no such pair."""
    pictures = [p for p in document.parts if p.modality is not Modality.text]
    texts = [p for p in document.parts if p.modality is Modality.text]
    if document.kind == CHAT or len(pictures) != 1 or len(texts) != 1:
        return None
    meta = document.meta
    return Example(
        key=f"{source}/{document.sample_id}",
        image=f"{source}/{document.sample_id}",
        pictures=pictures[0].media[:_FRAMES],
        question=str(meta.get("prompt", "")),
        answers=(texts[0].text,),
        group=f"{source}/{meta.get('category', '')}",
        facts=meta,
    )


def edited(source: str, document: Document) -> Example | None:
    """A picture, what is asked of it and the edited picture; None for any other document.

    The edited picture is the last of `pictures`.
    """
    if not is_edit(document):
        return None
    first, words, second = document.parts
    return Example(
        key=f"{source}/{document.sample_id}",
        image=f"{source}/{document.sample_id}",
        pictures=(*first.media, *second.media),
        question=words.text,
        group=f"{source}/{document.meta.get('category', '')}",
        facts=document.meta,
    )


def has_facts(example: Example) -> bool:
    """Whether the truth of a caption can be computed."""
    return {"category", "objects"} <= set(example.facts)


def turns(source: str, document: Document) -> Iterator[tuple[Example, tuple[Part, ...]]]:
    """Every answer of a conversation that is asked for, and the parts that stand before it.

    The true answers of earlier turns are part of the history. A kind of question is
    `question_kind` of the document's facts: one name, or one for each turn.

    Raises:
        ContentError: there are not as many kinds as answers.
    """
    answers = [n for n, part in enumerate(document.parts) if part.answer and not part.markup]
    kinds = document.meta.get("question_kind", "")
    names = list(kinds) if isinstance(kinds, list) else [str(kinds)] * len(answers)
    if len(names) != len(answers):
        raise ContentError(
            f"{source}/{document.sample_id}: {len(names)} question kinds for {len(answers)} answers"
        )
    shown = tuple(blob for part in document.parts for blob in part.media)
    for number, (place, name) in enumerate(zip(answers, names, strict=True)):
        words = [part.text for part in document.parts[:place] if part.text and not part.markup]
        example = Example(
            key=f"{source}/{document.sample_id}/{number}",
            image=f"{source}/{document.sample_id}",
            pictures=shown,
            question=words[-1] if words else "",
            answers=(document.parts[place].text,),
            group=f"{source}/{name}",
            facts=document.meta,
        )
        yield example, document.parts[:place]
