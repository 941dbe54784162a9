"""Demo data: a world of coloured shapes with captions whose truth can be computed.

`write_shapes` draws seven kinds of documents as separate sources, held-out splits of each (plus
`novel`: colours and shapes that training never pairs), and a tokenizer trained on the grammar:

    OUT/captions   pictures with one sentence (six categories)
    OUT/pages      sentences, each with its picture
    OUT/clips      8 frames and a sentence
    OUT/boards     frames and subtitles on one time line
    OUT/text       sentences alone
    OUT/chat       questions and answers about a picture, or without one
    OUT/edits      a picture, an instruction and the edited picture
    OUT/heldout/{captions,pages,clips,boards,text,novel,chat,edits}
    OUT/tokenizer  a Hugging Face folder

Every document is a pure function of (seed, split, kind, number). Cost: 1.3 ms a document.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmtrain.data.chat import Content, Template, Turn, chat_document
from mmtrain.data.document import Document, Modality, Part
from mmtrain.data.folders import temporary_folder
from mmtrain.data.images import encode_png
from mmtrain.data.rules import Draw
from mmtrain.data.shapes_chat import converse, judge_answer
from mmtrain.data.shapes_edits import EDITS, edit
from mmtrain.data.shapes_text import Category, article, caption, judge, remark, scene
from mmtrain.data.shapes_tokenizer import write_tokenizer
from mmtrain.data.shapes_world import (
    DIRECTIONS,
    NOVEL,
    SIDE,
    Kind,
    alone,
    choose_kinds,
    ground,
    kinds,
    moved,
    paint,
    picture,
)
from mmtrain.data.shards import build_index, write_shards
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.errors import ContentError

__all__ = ["SHARES", "Category", "ShapesReport", "judge", "judge_answer", "write_shapes"]

# share of the documents of each training source
SHARES = {"captions": 0.6, "pages": 0.12, "clips": 0.1, "boards": 0.06, "text": 0.12}
CHAT_SHARE = 0.25  # conversations for each of those documents, on top of them
EDIT_SHARE = 0.25  # edits, likewise
HELDOUT_SHARE = 8  # a held-out source has one document for so many of training
CLIP_FRAMES = 8
FEWEST = 24  # documents; below, a source would be empty
_SHARD_BYTES = 1 << 20


@dataclass(frozen=True)
class ShapesReport:
    """What `write_shapes` wrote: documents of each source by its path below `out`."""

    out: Path
    tokenizer: Path
    documents: dict[str, int]
    images: int


def write_shapes(out: Path, documents: int, seed: int) -> ShapesReport:
    """Write the demo world; the same seed gives the same bytes.

    Args:
        out: folder to make; must not exist.
        documents: training documents over all kinds but conversations and edits, at least 24;
            those and held-out ones come on top.
        seed: of everything random.

    Raises:
        ContentError: `out` exists, or `documents` is too small.
        StorageError: writing failed.
    """
    if documents < FEWEST:
        raise ContentError(f"{documents} documents asked; use at least {FEWEST}")
    with temporary_folder(out) as partial:
        return _write(partial, out, _counts(documents), seed)


def _write(partial: Path, out: Path, counts: dict[str, int], seed: int) -> ShapesReport:
    tokenizer = partial / "tokenizer"
    write_tokenizer(tokenizer)
    vocabulary = load_vocabulary(tokenizer)
    # pictures of training, and held-out ones; neither shows one of the other
    shown: dict[bool, set[bytes]] = {False: set(), True: set()}
    images = 0
    for source, count in counts.items():
        folder, kind = partial / source, source.rpartition("/")[2]
        heldout = source.startswith("heldout/")
        with write_shards(folder, shard_bytes=_SHARD_BYTES) as writer:
            for document in _documents(seed, source, kind, count, shown[not heldout]):
                writer.write(document)
                blobs = [blob for part in document.parts for blob in part.media]
                images += len(blobs)
                shown[heldout].update(map(_digest, blobs))
        build_index(folder, vocabulary)
    return ShapesReport(out, out / "tokenizer", counts, images)


def _counts(documents: int) -> dict[str, int]:
    counts = {kind: max(int(documents * share), 1) for kind, share in SHARES.items()}
    counts["captions"] += documents - sum(counts.values())
    held = {f"heldout/{kind}": max(n // HELDOUT_SHARE, 6) for kind, n in counts.items()}
    later = {"chat": CHAT_SHARE, "edits": EDIT_SHARE}
    counts = {**counts, **held, "heldout/novel": held["heldout/captions"]}
    # each behind those before it, which so keep their bytes
    for kind, share in later.items():
        own = max(int(documents * share), 6)
        counts |= {kind: own, f"heldout/{kind}": max(own // HELDOUT_SHARE, 6)}
    return counts


def _documents(
    seed: int, source: str, kind: str, count: int, seen: set[bytes]
) -> Iterator[Document]:
    make = _MAKERS[kind]
    for number in range(count):
        attempt = 0
        document = make(Draw(seed, source, number, attempt), f"{source}-{number:07d}", number)
        while any(_digest(blob) in seen for part in document.parts for blob in part.media):
            attempt += 1
            document = make(Draw(seed, source, number, attempt), f"{source}-{number:07d}", number)
        yield document


def _digest(blob: bytes) -> bytes:
    return hashlib.blake2b(blob, digest_size=16).digest()


def _caption(draw: Draw, name: str, number: int) -> Document:
    category = list(Category)[number % len(Category)]
    return _captioned(draw, name, category, kinds())


def _novel(draw: Draw, name: str, number: int) -> Document:
    category = (Category.single, Category.colour)[number % 2]
    return _captioned(draw, name, category, NOVEL)


def _captioned(draw: Draw, name: str, category: Category, allowed: Sequence[Kind]) -> Document:
    objects = scene(draw, category, allowed)
    text, prompt = caption(category, objects)
    facts = {"category": category.value, "objects": objects, "caption": text, "prompt": prompt}
    parts = (_image(picture(draw, objects)), _text(text))
    return Document(sample_id=name, kind="caption", parts=parts, meta=facts)


def _page(draw: Draw, name: str, number: int) -> Document:
    """Two to four sentences, each followed by the picture it speaks of."""
    shown = choose_kinds(draw, 2 + draw.below(3), kinds())
    words = ["first", *["then"] * (len(shown) - 2), "last"]
    parts: list[Part] = []
    scenes = []
    for word, kind in zip(words, shown, strict=True):
        objects = alone(draw, kind)
        scenes.append(objects)
        parts.append(_text(f"{word} {article(' '.join(kind))}"))
        parts.append(_image(picture(draw, objects), match=len(parts) - 1))
    return Document(sample_id=name, kind="page", parts=tuple(parts), meta={"scenes": scenes})


def _clip(draw: Draw, name: str, number: int) -> Document:
    """One object that moves across the picture in a straight line."""
    (kind,) = choose_kinds(draw, 1, kinds())
    direction = list(DIRECTIONS)[draw.below(len(DIRECTIONS))]
    (start,) = alone(draw, kind)
    along = "x" if DIRECTIONS[direction][0] else "y"
    forward = sum(DIRECTIONS[direction]) > 0
    near, way = start["radius"] + 2, SIDE - 2 * start["radius"] - 4
    start[along] = near if forward else SIDE - near
    colour = ground(draw)
    frames = tuple(
        encode_png(paint(moved([start], direction, way * step / (CLIP_FRAMES - 1)), colour))
        for step in range(CLIP_FRAMES)
    )
    text = f"{article(' '.join(kind))} moves {direction}"
    facts = {"category": "motion", "objects": [start], "direction": direction, "caption": text}
    parts = (Part(modality=Modality.video, media=frames), _text(text))
    return Document(sample_id=name, kind="clip", parts=parts, meta=facts)


def _board(draw: Draw, name: str, number: int) -> Document:
    """A frame every two seconds and a subtitle for most of them."""
    parts, scenes = [], []
    for index, kind in enumerate(choose_kinds(draw, 3 + draw.below(3), kinds())):
        objects, time = alone(draw, kind), 2.0 * index
        scenes.append(objects)
        parts.append(_image(picture(draw, objects), time=time))
        if draw.chance(0.9):
            after = time + draw.below(3) * 0.5
            parts.append(_text(f"here is {article(' '.join(kind))}", time=after))
    return Document(sample_id=name, kind="board", parts=tuple(parts), meta={"scenes": scenes})


def _sentences(draw: Draw, name: str, number: int) -> Document:
    return Document(sample_id=name, kind="text", parts=(_text(remark(draw, kinds())),))


def _conversation(draw: Draw, name: str, number: int) -> Document:
    dialogue = converse(draw, number)
    content: tuple[Content, ...] = ()
    if dialogue.objects:
        content = (_image(picture(draw, dialogue.objects)),)
    turns = [
        Turn((*content, said.question) if index == 0 else (said.question,), (said.answer,))
        for index, said in enumerate(dialogue.said)
    ]
    return chat_document(name, turns, Template(), dialogue.facts)


def _edited(draw: Draw, name: str, number: int) -> Document:
    kind, colour = EDITS[number % len(EDITS)], ground(draw)
    asked = edit(draw, kind, kinds())
    scenes = [asked.before, asked.after]
    first, second = (_image(paint(objects, colour)) for objects in scenes)
    return Document(
        sample_id=name,
        kind="edit",
        parts=(first, _text(asked.instruction), second),
        meta={"category": kind, "scenes": scenes, "instruction": asked.instruction},
    )


_MAKERS: dict[str, Callable[[Draw, str, int], Document]] = {
    "captions": _caption,
    "novel": _novel,
    "pages": _page,
    "clips": _clip,
    "boards": _board,
    "text": _sentences,
    "chat": _conversation,
    "edits": _edited,
}


def _text(text: str, time: float | None = None) -> Part:
    return Part(modality=Modality.text, text=text, time=time)


def _image(image: Image.Image, match: int | None = None, time: float | None = None) -> Part:
    return Part(modality=Modality.image, media=(encode_png(image),), match=match, time=time)
