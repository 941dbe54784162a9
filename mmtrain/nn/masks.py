"""A mask is two integers per row: query t sees keys `[lo[t], hi[t])`.

One more integer a key says where it ends: no row from `until[s]` on sees it.

`Intervals` is also the way attention layers reach their keys: they call `attend`, and do not know
whether keys come from the same packed row (here) or from a cache (`nn.cache`).

T query rows   S keys   H heads   K head width
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from mmtrain.ops.attention import IntervalPlan, interval_attention, plan_intervals


class Keys(Protocol):
    """What a self-attention layer attends to."""

    def attend(
        self, layer: nn.Module, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, scale: float
    ) -> Tensor:
        """Attention output `[T, H, K]`; `layer` tells whose keys these are."""
        ...


@dataclass(frozen=True)
class Intervals:
    """Keys that each row of a packed micro-batch sees; `0 <= lo < hi <= T`.

    Attributes:
        lo_T: first key of each row.
        hi_T: one past the last key of each row.
        device: of the rows, where it is not that of `lo_T` and `hi_T`.
        until_T: first row from which on no row sees a key; None = keys do not end.
    """

    lo_T: Tensor
    hi_T: Tensor
    device: torch.device | None = None
    until_T: Tensor | None = None

    @cached_property
    def plan(self) -> IntervalPlan:
        """How attention walks the intervals; read to the host once, shared by all layers."""
        keys = self.lo_T.shape[0]
        return plan_intervals(self.lo_T, self.hi_T, keys, self.device, self.until_T)

    def attend(
        self, layer: nn.Module, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, scale: float
    ) -> Tensor:
        """Attention inside the packed row."""
        return interval_attention(q_THK, k_THK, v_THK, self.plan, scale)

    @classmethod
    def causal_packed(cls, segments_T: Tensor) -> Self:
        """Each row sees its own document up to itself.

        Args:
            segments_T: document of each row; equal numbers stand together.
        """
        rows = torch.arange(segments_T.shape[0], device=segments_T.device)
        return cls(_starts(segments_T), rows + 1)

    @classmethod
    def causal_lengths(cls, lengths: Sequence[int], device: torch.device) -> Self:
        """Each row sees its own document up to itself; told by the host, which need not ask.

        Args:
            lengths: of the documents, which stand one after another.
            device: of the rows.
        """
        counts = torch.tensor(lengths)
        starts = counts.cumsum(0) - counts
        rows = torch.arange(sum(lengths))
        return cls(starts.repeat_interleave(counts), rows + 1, device)

    @classmethod
    def image_bidirectional(cls, segments_T: Tensor, spans_T: Tensor) -> Self:
        """Causal inside documents, but rows of one image see the whole image.

        Args:
            segments_T: document of each row; equal numbers stand together.
            spans_T: number of the image a row belongs to, -1 outside images; rows of one image
                stand together, inside one document.
        """
        rows = torch.arange(segments_T.shape[0], device=segments_T.device)
        ends = len(rows) - _starts(spans_T.flip(0)).flip(0)
        return cls(_starts(segments_T), torch.where(spans_T >= 0, ends, rows + 1))

    @classmethod
    def prefix(cls, segments_T: Tensor, in_prefix_T: Tensor) -> Self:
        """Rows of a document's prefix see the whole prefix, later rows see all before them.

        Args:
            segments_T: document of each row; equal numbers stand together.
            in_prefix_T: boolean, true for the rows of each document's prefix, which come first.
        """
        rows = torch.arange(segments_T.shape[0], device=segments_T.device)
        lo_T = _starts(segments_T)
        lengths = torch.zeros_like(lo_T).index_add_(0, lo_T, in_prefix_T.to(lo_T.dtype))
        return cls(lo_T, torch.maximum(lo_T + lengths[lo_T], rows + 1))


def _starts(numbers_T: Tensor) -> Tensor:
    """First row of each run of equal numbers, for every row of the run."""
    rows = torch.arange(numbers_T.shape[0], device=numbers_T.device)
    opens = torch.ones_like(numbers_T, dtype=torch.bool)
    opens[1:] = numbers_T[1:] != numbers_T[:-1]
    return torch.cummax(torch.where(opens, rows, 0), 0).values
