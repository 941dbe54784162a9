"""Keys and values kept while a model writes: one slot a position, one row a sequence.

Attention layers reach it through `nn.masks.Keys`, so that the model code is the same in training
and in sampling. Prompts are prefilled packed in one row, then every step adds one row a sequence.

B sequences   S slots   T packed rows   H heads   K head width
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmtrain.nn.masks import Intervals
from mmtrain.ops.attention import repeat_heads
from mmtrain.ops.dense_attention import dense_attention
from mmtrain.ops.select import Shapes


class KeyValueCache:
    """Keys and values `[B, S, H, K]` of every layer, allocated when a layer first writes."""

    def __init__(self, sequences: int, capacity: int) -> None:
        """Make room for `capacity` positions in each of `sequences` rows."""
        self.sequences = sequences
        self.capacity = capacity
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def write(
        self, layer: nn.Module, sequence_T: Tensor, slot_T: Tensor, k_THK: Tensor, v_THK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store row t in its sequence and slot; returns the layer's keys and values."""
        if layer not in self._layers:
            shape = (self.sequences, self.capacity, *k_THK.shape[1:])
            self._layers[layer] = (k_THK.new_zeros(shape), v_THK.new_zeros(shape))
        k_BSHK, v_BSHK = self._layers[layer]
        k_BSHK[sequence_T, slot_T] = k_THK
        v_BSHK[sequence_T, slot_T] = v_THK
        return k_BSHK, v_BSHK

    def read(self, layer: nn.Module, sequence_B: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """The first `slots` keys and values of some sequences, `[B, S, H, K]`."""
        k_BSHK, v_BSHK = self._layers[layer]
        return k_BSHK[sequence_B, :slots], v_BSHK[sequence_B, :slots]

    def select(self, sequence_B: Tensor) -> None:
        """Make row b the former row `sequence_B[b]` (beams are copied, dropped and reordered)."""
        self.sequences = sequence_B.shape[0]
        self._layers = {
            layer: (k[sequence_B], v[sequence_B]) for layer, (k, v) in self._layers.items()
        }


@dataclass(frozen=True)
class Prefill:
    """Packed prompts: attend inside the pack, and remember its keys and values."""

    cache: KeyValueCache
    intervals: Intervals
    sequence_T: Tensor
    slot_T: Tensor

    def attend(
        self, layer: nn.Module, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, scale: float
    ) -> Tensor:
        """`[T, H, K]`."""
        self.cache.write(layer, self.sequence_T, self.slot_T, k_THK, v_THK)
        return self.intervals.attend(layer, q_THK, k_THK, v_THK, scale)


@dataclass(frozen=True)
class Step:
    """One new row for every sequence: it sees its sequence up to itself."""

    cache: KeyValueCache
    slot_B: Tensor
    longest: int  # rows of the longest sequence, the new one included

    def attend(
        self, layer: nn.Module, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, scale: float
    ) -> Tensor:
        """`[B, H, K]`; here T is B, one row a sequence."""
        rows = torch.arange(self.cache.sequences, device=q_THK.device)
        k, v = (
            repeat_heads(x[:, : self.longest], q_THK.shape[-2]).transpose(1, 2)
            for x in self.cache.write(layer, rows, self.slot_B, k_THK, v_THK)
        )
        slots = torch.arange(self.longest, device=q_THK.device)
        seen_B11S = (slots <= self.slot_B[:, None])[:, None, None]
        out = dense_attention(
            q_THK.unsqueeze(2), k, v, mask=seen_B11S, scale=scale, shapes=Shapes.CHANGING
        )
        return out.squeeze(2)


@dataclass(frozen=True)
class Block:
    """n new rows for each of some sequences: they see what is kept of theirs, and each other.

    Attributes:
        cache: what is kept; it is only read, unless `keeps`.
        sequence_B: the sequences.
        slot_B: slots in use of each, and so the first one of its new rows.
        used: slots in use of the longest.
        rows: n.
        causal: a new row sees the new rows up to itself instead of all.
        keeps: whether the new rows are written behind the others.
    """

    cache: KeyValueCache
    sequence_B: Tensor
    slot_B: Tensor
    used: int
    rows: int
    causal: bool = False
    keeps: bool = False

    def attend(
        self, layer: nn.Module, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, scale: float
    ) -> Tensor:
        """`[T, H, K]`; here T is B n, the rows of a sequence together."""
        kept = self.cache.read(layer, self.sequence_B, self.used)
        own = (x.view(-1, self.rows, *x.shape[1:]) for x in (k_THK, v_THK))
        k, v = (
            repeat_heads(torch.cat(pair, 1), q_THK.shape[-2]).transpose(1, 2)
            for pair in zip(kept, own, strict=True)
        )
        q = q_THK.view(-1, self.rows, *q_THK.shape[1:]).transpose(1, 2)
        out = dense_attention(q, k, v, mask=self._mask(), scale=scale, shapes=Shapes.CHANGING)
        if self.keeps:
            offset = torch.arange(self.rows, device=q_THK.device)
            slot_T = (self.slot_B[:, None] + offset).flatten()
            sequence_T = self.sequence_B.repeat_interleave(self.rows)
            self.cache.write(layer, sequence_T, slot_T, k_THK, v_THK)
        return out.transpose(1, 2).flatten(0, 1)

    def _mask(self) -> Tensor:
        """Boolean `[B, 1, n, S + n]`: kept slots in use, then the new rows."""
        device = self.slot_B.device
        kept = torch.arange(self.used, device=device) < self.slot_B[:, None]
        own = torch.ones(self.rows, self.rows, dtype=torch.bool, device=device)
        own = own.tril() if self.causal else own
        count = len(self.slot_B)
        return torch.cat(
            [
                kept[:, None].expand(count, self.rows, self.used),
                own.expand(count, self.rows, self.rows),
            ],
            2,
        )[:, None]
