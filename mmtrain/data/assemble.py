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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from mmtrain.data import images
from mmtrain.data.batch import Batch, BatchInfo, Targets
from mmtrain.data.document import CHAT, Document, Modality, Part
from mmtrain.data.latents import KnownSource
from mmtrain.data.mixture import Source
from mmtrain.data.pack import PackPlan, PlannedDocument
from mmtrain.data.rules import ImagePiece, Selection
from mmtrain.data.sequence import InterleavedSequence, Span
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError
from mmtrain.nn.flow import CARRY, Flow
from mmtrain.nn.noise import row_numbers

NO_LABEL = -100
FIELDS = ("tokens", "positions", "lo", "hi", "labels", "slots", CARRY, "source", "noise")
TEXT, IMAGE = "text", "image"  # the losses


@dataclass(frozen=True)
class Failure:
    """A document that was left out of its pack because a picture of it cannot be decoded."""

    source: str
    sample_id: str
    reason: str


@dataclass(frozen=True)
class Pack:
    """One assembled pack: T = pack_tokens rows, `pixels` of its n real images.

    Attributes:
        number: of the plan.
        rows: int64 `[T]` each: tokens, positions, lo, hi, labels, noise.
        weights_T: float32, 1 where a label counts.
        origins_T: int64, source of each row (0 in padding).
        begins: row of every image's begin token, in order.
        image_origins: source of every image.
        image_weights: of every image's regression pairs; 0 in conversations.
        pixels: `[3, H, W]` each; empty when pixels are not wanted.
        sample_ids: documents in the pack.
        documents: documents planned, failures included.
        failures: documents left out.
    """

    number: int
    rows: dict[str, Tensor]
    weights_T: Tensor
    origins_T: Tensor
    begins: tuple[int, ...]
    image_origins: tuple[int, ...]
    image_weights: tuple[float, ...]
    pixels: tuple[Tensor, ...]
    sample_ids: tuple[str, ...]
    documents: int
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
    """

    sources: Sequence[Source]
    vocabulary: Vocabulary
    layout: SequenceFormat
    pack_tokens: int
    image_slots: int | None = None
    with_pixels: bool = True
    known: Mapping[str, KnownSource] = field(default_factory=dict)

    def batch(self, plans: Sequence[PackPlan]) -> tuple[Batch, tuple[Failure, ...], int]:
        """One micro-batch of several packs, what failed, and how many documents were planned."""
        packs = [self.pack(plan) for plan in plans]
        failures = tuple(failure for pack in packs for failure in pack.failures)
        return self.merge(packs), failures, sum(pack.documents for pack in packs)

    def pack(self, plan: PackPlan) -> Pack:
        """Assemble one pack.

        Raises:
            ContentError: a document is not what the length index counted.
            MissingError, StorageError: a shard cannot be had.
        """
        rows = _padding(self.pack_tokens, self.layout.pad)
        weights, origins = torch.zeros(self.pack_tokens), torch.zeros(self.pack_tokens).long()
        begins: list[int] = []
        image_origins: list[int] = []
        image_weights: list[float] = []
        pixels: list[Tensor] = []
        sample_ids, failures = [], []
        start = 0
        for planned in plan.documents:
            stop = start + planned.selection.positions
            sequence = self.sequence(planned)
            try:
                decoded = self._decode(planned, sequence)
            except images.DecodeError as error:
                name = self.sources[planned.source].name
                failures.append(Failure(name, planned.sample_id, str(error)))
                start = stop  # its rows stay padding, so the others lie where they were planned
                continue
            _place(rows, weights, sequence, start, self.layout)
            rows["noise"][start:stop] = row_numbers(planned.noise, stop - start)
            origins[start:stop] = planned.source
            begins += [start + span.start for span in sequence.spans]
            image_origins += [planned.source] * len(sequence.spans)
            image_weights += [sequence.image_weight] * len(sequence.spans)
            pixels += decoded
            sample_ids.append(planned.sample_id)
            start = stop
        return Pack(
            number=plan.number,
            rows=rows,
            weights_T=weights,
            origins_T=origins,
            begins=tuple(begins),
            image_origins=tuple(image_origins),
            image_weights=tuple(image_weights),
            pixels=tuple(pixels),
            sample_ids=tuple(sample_ids),
            documents=len(plan.documents),
            failures=tuple(failures),
        )

    def sequence(self, planned: PlannedDocument) -> InterleavedSequence:
        """A planned document in tokens, media still encoded.

        Raises:
            ContentError: its length differs from the plan.
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
            name: torch.cat([pack.rows[name] for pack in packs])
            for name in ("tokens", "positions", "labels", "noise")
        }
        for name in ("lo", "hi"):
            shifted = [pack.rows[name] + at for pack, at in zip(packs, starts, strict=True)]
            fields[name] = torch.cat(shifted)
        begins = [at + b for pack, at in zip(packs, starts, strict=True) for b in pack.begins]
        slots = self._slots(len(begins))
        fields |= image_rows(begins, slots, self.layout.visual_tokens, total)
        hidden = torch.zeros(slots, 3, 0, 0)
        if self.with_pixels:
            hidden = images.stack([p for pack in packs for p in pack.pixels], slots, self._form)
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
                    TEXT: torch.cat([pack.weights_T for pack in packs]),
                    IMAGE: weights.repeat_interleave(pairs),
                },
                origins={
                    TEXT: torch.cat([pack.origins_T for pack in packs]),
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
            return [images.decode(blob, self.layout) for blob in sequence.media]
        for blob in sequence.media:
            images.check(blob)
        return []

    @property
    def _form(self) -> tuple[int, int, int]:
        """Shape of an image's numbers: decoded pixels, or what was made of them before."""
        if self.known:
            return next(iter(self.known.values())).form.latents
        return 3, self.layout.image_size, self.layout.image_size


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
        tokens_T=torch.tensor([*tokens, layout.eos]),
        spans=tuple(spans),
        media=tuple(media),
        weights_T=torch.tensor([*weights, weight]),  # </s> closes what stands before it
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


def labels_of(tokens_T: Tensor, layout: SequenceFormat) -> Tensor:
    """Next-token targets of one document; -100 where the next token is none to learn."""
    untrained = [layout.pad, layout.image_slot, layout.image_end]
    if not layout.learns_image_begin:
        untrained.append(layout.image_begin)
    following = torch.cat([tokens_T[1:], tokens_T.new_tensor([layout.pad])])
    return torch.where(torch.isin(following, torch.tensor(untrained)), NO_LABEL, following)


def image_rows(
    begins: Sequence[int], slots: int, visual_tokens: int, total: int
) -> dict[str, Tensor]:
    """Rows of visual tokens and regression pairs.

    Args:
        begins: row of each image's begin token.
        slots: N, at least `len(begins)`.
        visual_tokens: Q.
        total: T; what the slots of dummy images point to.

    Returns:
        `slots` `[N * Q]`, `carry` (targets) and `source` `[N * (Q + 1)]`, int64.
    """
    begin = torch.tensor(begins, dtype=torch.int64).view(-1, 1)
    dummies = slots - len(begins)
    rows = begin + 1 + torch.arange(visual_tokens)
    sources = begin + torch.arange(visual_tokens + 1)
    pairs = torch.zeros(dummies * (visual_tokens + 1), dtype=torch.int64)
    return {
        "slots": torch.cat([rows.flatten(), torch.full((dummies * visual_tokens,), total)]),
        CARRY: torch.cat([sources.flatten() + 1, pairs]),
        "source": torch.cat([sources.flatten(), pairs]),
    }


def _padding(length: int, pad: int) -> dict[str, Tensor]:
    row = torch.arange(length)
    return {
        "tokens": torch.full((length,), pad),
        "positions": torch.zeros(length, dtype=torch.int64),
        "lo": row.clone(),
        "hi": row + 1,
        "labels": torch.full((length,), NO_LABEL),
        "noise": torch.zeros(length, dtype=torch.int64),
    }


def _place(
    rows: dict[str, Tensor],
    weights_T: Tensor,
    sequence: InterleavedSequence,
    start: int,
    layout: SequenceFormat,
) -> None:
    """Write a document into its rows of the pack."""
    length = len(sequence.tokens_T)
    stop = start + length
    labels = labels_of(sequence.tokens_T, layout)
    rows["tokens"][start:stop] = sequence.tokens_T
    rows["positions"][start:stop] = torch.arange(length)
    rows["lo"][start:stop] = start  # causal inside the document; hi = row + 1 holds already
    if layout.sees_whole_image:
        for span in sequence.spans:  # begin and end tokens stay causal
            first = start + span.start + 1
            last = first + layout.visual_tokens
            rows["hi"][first:last] = last
    rows["labels"][start:stop] = labels
    # a label's weight is that of the token it names
    following = torch.cat([sequence.weights_T[1:], torch.zeros(1)])
    weights_T[start:stop] = torch.where(labels == NO_LABEL, 0.0, following)
