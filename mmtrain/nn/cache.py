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
    position_T: Tensor

    def attend(
        self, layer: nn.Module, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, scale: float
    ) -> Tensor:
        """`[T, H, K]`."""
        self.cache.write(layer, self.sequence_T, self.position_T, k_THK, v_THK)
        return self.intervals.attend(layer, q_THK, k_THK, v_THK, scale)


@dataclass(frozen=True)
class Step:
    """One new row for every sequence: it sees its sequence up to itself."""

    cache: KeyValueCache
    position_B: Tensor
    longest: int  # positions of the longest sequence, the new one included

    def attend(
        self, layer: nn.Module, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, scale: float
    ) -> Tensor:
        """`[B, H, K]`; here T is B, one row a sequence."""
        rows = torch.arange(self.cache.sequences, device=q_THK.device)
        k, v = (
            repeat_heads(x[:, : self.longest], q_THK.shape[-2]).transpose(1, 2)
            for x in self.cache.write(layer, rows, self.position_B, k_THK, v_THK)
        )
        slots = torch.arange(self.longest, device=q_THK.device)
        seen_B11S = (slots <= self.position_B[:, None])[:, None, None]
        out = dense_attention(
            q_THK.unsqueeze(2), k, v, mask=seen_B11S, scale=scale, shapes=Shapes.CHANGING
        )
        return out.squeeze(2)
