"""From a planned pack to tensors: tokens, masks, labels, image slots and regression pairs.

Emu's sequence (released code, Emu1/models/modeling_emu.py, and its authors on what is trained):
an image is `[IMG]`, Q x `<image>`, `[/IMG]`; the next-token target is dropped where it would be
`[PAD]`, `[IMG]`, `<image>` or `[/IMG]`; the Q + 1 regression pairs of an image go from `[IMG]`
and every `<image>` to the next position. Documents of a pack see only themselves.

Of a conversation (kind `chat`) only answers, and the `</s>` that closes each, are learnt, and the
images are not regressed: published Emu pairs rows by flattened masks, which the literal
`[IMG]ImageContent[/IMG]` of its system message would shift. Rows are paired by the spans of real
images here, so literal marks harm nothing; the weight is 0 to train as published.

T packed tokens   N image slots   Q visual tokens an image   P = N * (Q + 1)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmtrain.data import images
from mmtrain.data.batch import Batch, BatchInfo, Targets
from mmtrain.data.document import CHAT, Document, Modality, Part, SampleError
from mmtrain.data.latents import KnownSource
from mmtrain.data.mixture import Source
from mmtrain.data.pack import PackPlan, PlannedDocument
from mmtrain.data.packed import FIELDS, PackedRows, Placed, image_rows, lay_out
from mmtrain.data.rules import ImagePiece, Selection
from mmtrain.data.sequence import InterleavedSequence, Span
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError
from mmtrain.nn.flow import Flow

Item = TypeVar("Item")  # a micro-batch: `Batch`, or what becomes one in the rank
TEXT, IMAGE = "text", "image"  # the losses


@dataclass(frozen=True)
class Failure:
    """A document that was left out of its pack because it cannot be read or decoded."""

    source: str
    sample_id: str
    reason: str


class Made(NamedTuple, Generic[Item]):
    """A micro-batch, what was left out of it, and how many documents were planned by source."""

    batch: Item
    failures: tuple[Failure, ...]
    planned: dict[str, int]


@dataclass(frozen=True)
class Pack:
    """One assembled pack: T = pack_tokens rows, `pixels` of its n real images.

    Attributes:
        number: of the plan.
        rows: tokens, positions, masks, labels and their weights.
        begins: row of every image's begin token, in order.
        image_origins: source of every image.
        image_weights: of every image's regression pairs; 0 in conversations.
        pixels: uint8 `[3, H, W]` each; empty when pixels are not wanted.
        sample_ids: documents in the pack.
        failures: documents left out.
    """

    number: int
    rows: PackedRows
    begins: tuple[int, ...]
    image_origins: tuple[int, ...]
    image_weights: tuple[float, ...]
    pixels: tuple[Tensor, ...]
    sample_ids: tuple[str, ...]
    failures: tuple[Failure, ...]


@dataclass(frozen=True, kw_only=True)
class Assembler:
    """Reads, decodes and lays out planned packs; safe to copy into worker processes.

    Attributes:
        sources: those of the plan, in its order.
        vocabulary: the tokenizer that the plan's lengths were counted with.
        layout: special ids and image groups of the family.
        pack_tokens: T of one pack.
        image_slots: N of a micro-batch; None = as many as it has images, at least 1.
        with_pixels: False for a stage that needs only targets: pictures are still decoded, so
            that every stage leaves out the same documents, but no pixels are made.
        known: source name -> what a frozen model made of its pictures before; it stands where
            pixels would.
        room: memory of pixels.
    """

    sources: Sequence[Source]
    vocabulary: Vocabulary
    layout: SequenceFormat
    pack_tokens: int
    image_slots: int | None = None
    with_pixels: bool = True
    known: Mapping[str, KnownSource] = field(default_factory=dict)
    room: images.Room = field(default_factory=images.Room, compare=False, repr=False)

    def batch(self, plans: Sequence[PackPlan]) -> Made[Batch]:
        """One micro-batch of several packs, what failed, and what was planned."""
        packs = [self.pack(plan) for plan in plans]
        failures = tuple(failure for pack in packs for failure in pack.failures)
        return Made(self.merge(packs), failures, planned_of(plans, self.sources))

    def pack(self, plan: PackPlan) -> Pack:
        """Assemble one pack.

        Raises:
            ContentError: a document is not what the length index counted.
            MissingError, StorageError, ServiceError: a shard cannot be had.
        """
        placed: list[Placed] = []
        begins: list[int] = []
        image_origins: list[int] = []
        image_weights: list[float] = []
        pixels: list[Tensor] = []
        sample_ids, failures = [], []
        start = 0
        for planned in plan.documents:
            first = start
            start += planned.selection.positions
            try:
                sequence = self.sequence(planned)
                decoded = self._decode(planned, sequence)
            except (SampleError, images.DecodeError) as error:
                # its rows stay padding, so the others lie where they were planned
                failures.append(failure_of(error, planned, self.sources))
                continue
            placed.append(Placed(first, sequence, planned.source, planned.noise))
            begins += [first + span.start for span in sequence.spans]
            image_origins += [planned.source] * len(sequence.spans)
            image_weights += [sequence.image_weight] * len(sequence.spans)
            pixels += decoded
            sample_ids.append(planned.sample_id)
        return Pack(
            number=plan.number,
            rows=lay_out(placed, self.pack_tokens, self.layout),
            begins=tuple(begins),
            image_origins=tuple(image_origins),
            image_weights=tuple(image_weights),
            pixels=tuple(pixels),
            sample_ids=tuple(sample_ids),
            failures=tuple(failures),
        )

    def sequence(self, planned: PlannedDocument) -> InterleavedSequence:
        """A planned document in tokens, media still encoded.

        Raises:
            ContentError: its length differs from the plan.
            SampleError: it is malformed.
        """
        document = self.sources[planned.source].documents.document(planned.number)
        sequence = tokenize(document, planned.selection, self.vocabulary, self.layout)
        if len(sequence.tokens_T) != planned.selection.positions:
            raise ContentError(
                f"source {self.sources[planned.source].name}, sample {planned.sample_id}: "
                f"{len(sequence.tokens_T)} positions, planned {planned.selection.positions}; "
                "the length index is stale: run `mmtrain data index` again"
            )
        return sequence

    def merge(self, packs: Sequence[Pack]) -> Batch:
        """Packs end to end as one micro-batch of fixed shape.

        Raises:
            ContentError: more images than `image_slots`.
        """
        total = self.pack_tokens * len(packs)
        starts = [index * self.pack_tokens for index in range(len(packs))]
        fields = {
            name: torch.cat([pack.rows.fields[name] for pack in packs])
            for name in ("tokens", "positions", "labels", "noise")
        }
        for name in ("lo", "hi"):
            shifted = [pack.rows.fields[name] + at for pack, at in zip(packs, starts, strict=True)]
            fields[name] = torch.cat(shifted)
        begins = [at + b for pack, at in zip(packs, starts, strict=True) for b in pack.begins]
        slots = self._slots(len(begins))
        fields |= image_rows(begins, slots, self.layout.visual_tokens, total)
        hidden = torch.zeros(slots, 3, 0, 0)
        if self.with_pixels:
            found = [pixels for pack in packs for pixels in pack.pixels]
            hidden = self._stacked(found, slots)
        image_origins = [origin for pack in packs for origin in pack.image_origins]
        pairs = self.layout.visual_tokens + 1
        image_weights = [weight for pack in packs for weight in pack.image_weights]
        dummies = [0] * (slots - len(begins))
        weights = torch.tensor([*image_weights, *dummies], dtype=torch.float32)
        padded = torch.tensor([*image_origins, *dummies])
        return Batch(
            inputs=Flow(hidden, {name: fields[name] for name in FIELDS}),
            targets=Targets(
                weights={
                    TEXT: torch.cat([pack.rows.weights_T for pack in packs]),
                    IMAGE: weights.repeat_interleave(pairs),
                },
                origins={
                    TEXT: torch.cat([pack.rows.origins_T for pack in packs]),
                    IMAGE: padded.repeat_interleave(pairs),
                },
            ),
            info=BatchInfo(
                pack_numbers=tuple(pack.number for pack in packs),
                sample_ids=tuple(name for pack in packs for name in pack.sample_ids),
                tokens=int((fields["tokens"] != self.layout.pad).sum()),
                images=len(begins),
                slots=total,
            ),
        )

    def _slots(self, needed: int) -> int:
        if self.image_slots is None:
            return max(needed, 1)
        if needed > self.image_slots or self.image_slots < 1:
            raise ContentError(
                f"a micro-batch holds {needed} images, image_slots is {self.image_slots}; "
                "set it to micro_batch_packs * pack_images, at least 1"
            )
        return self.image_slots

    def _decode(self, planned: PlannedDocument, sequence: InterleavedSequence) -> list[Tensor]:
        known = self.known.get(self.sources[planned.source].name)
        if known is not None and sequence.media:
            stored = known.pictures(planned.number, planned.sample_id)
            chosen = [stored[number] for number in sequence.media_numbers]
            return chosen if self.with_pixels else []
        if self.with_pixels:
            return [images.pixels_of(blob, self.layout) for blob in sequence.media]
        for blob in sequence.media:
            images.check(blob)
        return []

    def _stacked(self, found: Sequence[Tensor], slots: int) -> Tensor:
        """Numbers of all images: decoded pixels, or what was made of them before."""
        if not self.known:
            return images.stack(found, slots, self.layout, self.room)
        form = next(iter(self.known.values())).form.latents
        return torch.stack([*found, *[torch.zeros(form)] * (slots - len(found))])


def failure_of(
    error: SampleError | images.DecodeError, planned: PlannedDocument, sources: Sequence[Source]
) -> Failure:
    """What is counted of a document that failed."""
    reason = error.reason if isinstance(error, SampleError) else str(error)
    return Failure(sources[planned.source].name, planned.sample_id, reason)


def planned_of(plans: Sequence[PackPlan], sources: Sequence[Source]) -> dict[str, int]:
    """Documents of some packs by source."""
    # no Counter: torch pins mappings by `update`, which doubles one
    return dict(Counter(sources[d.source].name for plan in plans for d in plan.documents))


def tokenize(
    document: Document, selection: Selection, vocabulary: Vocabulary, layout: SequenceFormat
) -> InterleavedSequence:
    """The chosen pieces of a document as tokens, `<s>` first and `</s>` last."""
    tokens, weights, spans = [layout.bos], [1.0], []
    media: list[bytes] = []
    numbers: list[int] = []
    firsts = [0, *accumulate(len(part.media) for part in document.parts)]
    group = image_group(layout)
    chat = document.kind == CHAT
    encoded: dict[int, list[int]] = {}
    weight = 1.0
    for piece in selection.pieces:
        part = document.parts[piece.part]
        weight = float(part.answer) if chat else 1.0
        if isinstance(piece, ImagePiece):
            spans.append(Span(len(tokens), len(group), part.modality, len(media)))
            media.append(part.media[piece.item])
            numbers.append(firsts[piece.part] + piece.item)
            tokens += group
        else:
            assert part.modality is Modality.text, (document.sample_id, piece)
            if piece.part not in encoded:
                encoded[piece.part] = vocabulary.encode_part(part)
            tokens += encoded[piece.part][piece.start : piece.stop]
        weights += [weight] * (len(tokens) - len(weights))
    return InterleavedSequence(
        tokens_T=torch.from_numpy(np.array([*tokens, layout.eos], np.int64)),  # a fifth of `tensor`
        spans=tuple(spans),
        media=tuple(media),
        # </s> closes what stands before it
        weights_T=torch.from_numpy(np.array([*weights, weight], np.float32)),
        sample_id=document.sample_id,
        image_weight=0.0 if chat else 1.0,
        media_numbers=tuple(numbers),
    )


def image_group(layout: SequenceFormat) -> list[int]:
    """The tokens of one image: begin, slots, end."""
    return [layout.image_begin, *[layout.image_slot] * layout.visual_tokens, layout.image_end]


def prompt_tokens(
    parts: Sequence[Part], vocabulary: Vocabulary, layout: SequenceFormat
) -> tuple[list[int], list[bytes]]:
    """Parts as the beginning of a sequence: `<s>` and their tokens, and their images in order.

    The tokens are those that `tokenize` makes of the same parts in a document.
    """
    tokens = [layout.bos]
    media: list[bytes] = []
    for part in parts:
        if part.modality is Modality.text:
            tokens += vocabulary.encode_part(part)
        else:
            tokens += image_group(layout) * len(part.media)
            media += part.media
    return tokens, media
