"""The rows of a pack as arrays: tokens, positions, masks, labels, weights.

All documents of a pack at once: some dozens of operations on the pack instead of on each of its
documents, where one costs as much for 50 rows as for 2,000.

T packed tokens   R rows of the documents   N image slots   Q visual tokens an image
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtrain.data.sequence import InterleavedSequence
from mmtrain.data.tokens import SequenceFormat
from mmtrain.nn.flow import CARRY
from mmtrain.nn.noise import numbers_at

NO_LABEL = -100
# of a micro-batch, in order
FIELDS = ("tokens", "positions", "lo", "hi", "labels", "slots", CARRY, "source", "noise")


@dataclass(frozen=True)
class Placed:
    """A document in its rows of a pack.

    Attributes:
        start: its first row.
        sequence: its tokens.
        source: index of its source.
        noise: seeds the numbers of its rows.
    """

    start: int
    sequence: InterleavedSequence
    source: int
    noise: int


@dataclass(frozen=True)
class PackedRows:
    """Rows of a pack.

    Attributes:
        fields: int64 `[T]` each: tokens, positions, lo, hi, labels, noise.
        weights_T: float32, 1 where a label counts.
        origins_T: int64, source of each row (0 in padding).
    """

    fields: dict[str, Tensor]
    weights_T: Tensor
    origins_T: Tensor


def lay_out(placed: Sequence[Placed], length: int, layout: SequenceFormat) -> PackedRows:
    """Write documents into the `length` rows of a pack; the rest is padding."""
    fields = _padding(length, layout.pad)
    weights_T, origins_T = torch.zeros(length), torch.zeros(length, dtype=torch.int64)
    packed = PackedRows(fields, weights_T, origins_T)
    if not placed:
        return packed
    tokens_R = torch.cat([item.sequence.tokens_T for item in placed])
    facts = [(p.start, p.sequence.tokens_T.shape[0], p.source, p.noise) for p in placed]
    starts, lengths, sources, seeds = torch.tensor(facts).unbind(1)
    ends = lengths.cumsum(0)
    document_R = torch.repeat_interleave(lengths)
    position_R = torch.arange(len(tokens_R)) - (ends - lengths)[document_R]
    start_R = starts[document_R]
    row_R = start_R + position_R
    labels_R = _following(tokens_R, ends, layout.pad)
    labels_R = torch.where(_learnable(labels_R, layout), labels_R, NO_LABEL)
    weight_R = _following(torch.cat([item.sequence.weights_T for item in placed]), ends, 0)
    fields["tokens"][row_R] = tokens_R
    fields["positions"][row_R] = position_R
    fields["lo"][row_R] = start_R  # causal inside the document; hi = row + 1 holds already
    if layout.sees_whole_image:
        for first in _first_rows(placed):  # begin and end tokens stay causal
            fields["hi"][first : first + layout.visual_tokens] = first + layout.visual_tokens
    fields["labels"][row_R] = labels_R
    fields["noise"][row_R] = numbers_at(seeds[document_R], position_R)
    # a label's weight is that of the token it names
    weights_T[row_R] = torch.where(labels_R == NO_LABEL, 0.0, weight_R)
    origins_T[row_R] = sources[document_R]
    return packed


def _first_rows(placed: Sequence[Placed]) -> Iterator[int]:
    """The row of the first visual token of every image."""
    for item in placed:
        yield from (item.start + span.start + 1 for span in item.sequence.spans)


def labels_of(tokens_T: Tensor, layout: SequenceFormat) -> Tensor:
    """Next-token targets of one document; -100 where the next token is none to learn."""
    following = _following(tokens_T, torch.tensor([len(tokens_T)]), layout.pad)
    return torch.where(_learnable(following, layout), following, NO_LABEL)


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


def _following(values_R: Tensor, ends: Tensor, last: int) -> Tensor:
    """What stands in the next row of the same document; `last` in its last row."""
    following = values_R.roll(-1)
    following[ends - 1] = last
    return following


def _learnable(labels_R: Tensor, layout: SequenceFormat) -> Tensor:
    learnt = (labels_R != layout.pad) & (labels_R != layout.image_slot)
    learnt &= labels_R != layout.image_end
    if not layout.learns_image_begin:
        learnt &= labels_R != layout.image_begin
    return learnt


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
