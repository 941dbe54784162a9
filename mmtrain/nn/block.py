"""A pre-norm transformer block over packed rows, as a layer `Flow -> Flow`.

R rows (T tokens, or this rank's share under sequence parallelism)   D width
"""

from torch import nn

from mmtrain.nn.attention import PackedAttention
from mmtrain.nn.flow import Flow
from mmtrain.nn.masks import Intervals, Keys
from mmtrain.nn.noise import RowNoise
from mmtrain.ops.rotary import rotary_tables

KEYS = "keys"  # name in `Flow.derived`; a sampler puts its cache there
UNTIL = "until"  # integer field of length T, where keys end (`nn.masks`); not every family has it
NOISE = "noise"  # integer field of length T: one number per row (`nn.noise.row_numbers`)


def keys_of(flow: Flow) -> Keys:
    """What the rows of `flow` see: its fields `lo`, `hi` and `until`, or what a sampler said."""
    told = flow.fields
    keys: Keys = flow.derive(
        KEYS, lambda: Intervals(told["lo"], told["hi"], until_T=told.get(UNTIL))
    )
    return keys


def noise_of(flow: Flow) -> RowNoise | None:
    """Where dropout draws from: the field `noise`, which only training has."""
    rows_T = flow.fields.get(NOISE)
    return None if rows_T is None else flow.derive(NOISE, lambda: RowNoise(rows_T))


class TransformerBlock(nn.Module):
    """`x + attention(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(
        self,
        *,
        norm1: nn.Module,
        attention: PackedAttention,
        norm2: nn.Module,
        mlp: nn.Module,
        rope_theta: float,
    ) -> None:
        """Take the parts; `rope_theta` is the base of the rotary wave lengths."""
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp
        self.rope_theta = rope_theta

    def forward(self, flow: Flow) -> Flow:
        """Change `hidden [R, D]`; rotary tables and the attention plan are shared by all blocks."""
        width, theta = self.attention.head_width, self.rope_theta
        rotary = flow.derive(
            ("rotary", width, theta), lambda: rotary_tables(flow.fields["positions"], width, theta)
        )
        x, noise = flow.hidden, noise_of(flow)
        x = x + self.attention(self.norm1(x), rotary, keys_of(flow), noise)
        x = x + self.mlp(self.norm2(x), noise)
        return flow.with_hidden(x)
