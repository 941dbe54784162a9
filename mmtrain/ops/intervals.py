"""Masks as two integers per query row, and the same mask seen from the keys.

Row t sees keys `[lo[t], hi[t])`. A kernel that walks over keys also wants to know which rows see a
key. If `lo` and `hi` never fall from row to row (causal, packed documents, prefix, bidirectional
images: all masks of `mmtrain.nn.masks`), the rows that see a key stand together, and
`column_intervals` gives exactly these. For any other `lo` and `hi` it gives an interval that
includes them all, so whoever skips by columns must still test rows; the kernels do.

Cost: a running maximum, a running minimum and two binary searches, without reading to the host;
once per micro-batch.

B batches (1: the same for all)   T query rows   S keys
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyIntervals:
    """A mask by rows and by columns, int32.

    Attributes:
        lo_BT: first key each row sees.
        hi_BT: one past the last; a row with `hi <= lo` sees none.
        first_BS: rows `[first, last)` include all that see a key.
        last_BS: see `first_BS`; no row sees a key with `last <= first`.
    """

    lo_BT: Tensor
    hi_BT: Tensor
    first_BS: Tensor
    last_BS: Tensor

    @classmethod
    def of_rows(cls, lo: Tensor, hi: Tensor, keys: int) -> Self:
        """From the rows' intervals, `[T]` or `[B, T]`, over `keys` keys."""
        lo_BT, hi_BT = (x.reshape(-1, x.shape[-1]).to(torch.int32).contiguous() for x in (lo, hi))
        return cls(lo_BT, hi_BT, *column_intervals(lo_BT, hi_BT, keys))

    def sees_BTS(self) -> Tensor:
        """The mask itself, boolean `[B, T, S]`; for the reference and tests."""
        key = torch.arange(self.first_BS.shape[-1], device=self.lo_BT.device)
        return (self.lo_BT[..., None] <= key) & (key < self.hi_BT[..., None])


def column_intervals(lo_BT: Tensor, hi_BT: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Intervals of rows `[first, last)` that include all rows which see a key, `[B, S]` int32.

    Exact where `lo` and `hi` never fall from row to row.
    """
    batch = lo_BT.shape[0]
    key = torch.arange(keys, dtype=lo_BT.dtype, device=lo_BT.device).expand(batch, keys)
    if lo_BT.shape[-1] == 0:
        return torch.zeros_like(key).contiguous(), torch.zeros_like(key).contiguous()
    key = key.contiguous()
    reach = hi_BT.cummax(-1).values  # no row up to here sees a key at or past this
    back = lo_BT.flip(-1).cummin(-1).values.flip(-1).contiguous()  # nor any from here one before
    first = torch.searchsorted(reach, key, right=True, out_int32=True)
    last = torch.searchsorted(back, key, right=True, out_int32=True)
    return first, torch.maximum(first, last)
