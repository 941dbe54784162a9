"""Sources that are made of lengths alone, or kept in memory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtrain.data.choices import Overlong
from mmtrain.data.document import Document, DocumentLengths, Modality, Part, PartLength
from mmtrain.data.images import encode_png
from mmtrain.data.lengths import collect
from mmtrain.data.mixture import Source
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.shards import count
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary

SPECIAL = ("<s>", "</s>", "[PAD]", "[IMG]", "[/IMG]", "<image>")


class Unread:
    """A reader that nobody may use: plans are made from lengths alone."""

    def document(self, number: int) -> Document:
        raise AssertionError(f"document {number} was opened while planning")


def lengths_source(
    name: str,
    sizes: list[tuple[int, int]],
    *,
    weight: float = 1.0,
    rule: Rule = Rule.document,
    shard: int = 16,
    weight_steps: dict[int, float] | None = None,
    epochs: float | None = None,
    overlong: Overlong = Overlong.cut,
    positions: int = 4096,
) -> Source:
    """A source of documents with (text tokens, images) each, known by their lengths alone."""
    documents = [
        DocumentLengths(
            f"{name}-{number}",
            "page",
            (PartLength(Modality.text, text), *[PartLength(Modality.image, 1)] * images),
        )
        for number, (text, images) in enumerate(sizes)
    ]
    shards = [min(shard, len(sizes) - start) for start in range(0, len(sizes), shard)]
    lengths = collect(documents, fingerprint="f", dataset="d", shard_sizes=shards)
    return Source(
        name=name,
        lengths=lengths,
        documents=Unread(),
        options=RuleOptions(rule=rule, max_images=8, max_positions=positions, overlong=overlong),
        weight=weight,
        weight_steps=weight_steps or {},
        epochs=epochs,
    )


class Kept:
    """A reader of documents that are kept in memory."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def document(self, number: int) -> Document:
        return self.documents[number]


def kept_source(
    name: str, documents: list[Document], vocabulary: Vocabulary, options: RuleOptions
) -> Source:
    """A source of documents in memory."""
    counted = [count(document, vocabulary) for document in documents]
    lengths = collect(counted, fingerprint="f", dataset="d", shard_sizes=[len(documents)])
    return Source(name=name, lengths=lengths, documents=Kept(documents), options=options)


def png(colour: tuple[int, int, int], side: int = 28) -> bytes:
    """A plain picture."""
    return encode_png(Image.new("RGB", (side, side), colour))


def document(name: str, *content: str | bytes) -> Document:
    """A document of texts and pictures in order."""
    parts = tuple(
        Part(modality=Modality.text, text=item)
        if isinstance(item, str)
        else Part(modality=Modality.image, media=(item,))
        for item in content
    )
    return Document(sample_id=name, kind="page", parts=parts)


def form_of(vocabulary: Vocabulary) -> SequenceFormat:
    """A sequence format of Emu with three visual tokens an image."""
    ids = vocabulary.require(SPECIAL)
    return SequenceFormat(
        bos=ids["<s>"],
        eos=ids["</s>"],
        pad=ids["[PAD]"],
        image_begin=ids["[IMG]"],
        image_end=ids["[/IMG]"],
        image_slot=ids["<image>"],
        visual_tokens=3,
        image_size=28,
    )


def film(path: Path, frames: int) -> None:
    """A film of grey frames that grow lighter by 8 steps each."""
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            pixels = np.full((48, 64, 3), 8 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
