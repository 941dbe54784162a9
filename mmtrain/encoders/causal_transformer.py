"""Causal transformer: learned queries read an image and become a causal sequence of embeddings.

It is a T5 decoder stack (Raffel et al. 2020, arXiv:1910.10683) fed with learned queries, as in Emu
(arXiv:2307.05222): each block has causal self-attention over the queries, cross-attention to the
visual tokens and a ReLU perceptron, all pre-norm RMS and without biases. Attention logits are not
scaled (T5 folds the factor into the initial weights). Only self-attention knows positions, through
one relative bias table shared by all blocks. T5's dropout is left out: whether Emu trained with it
is unknown, and it would make the regression targets noisy.

One layer of the model's list, because queries and visual tokens are two float streams and only one
may cross a pipeline stage; it is smaller than one LLaMA block.

N images   Q queries   W width   S visual tokens   C visual width   H heads   D output width
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.nn.flow import Flow
from mmtrain.nn.mlp import Mlp
from mmtrain.nn.norm import RMSNorm
from mmtrain.ops.dense_attention import dense_attention


@cache
def distance_buckets(queries: int, buckets: int, max_distance: int) -> tuple[int, ...]:
    """Bucket of each distance 0 .. queries - 1 into the past (T5, unidirectional).

    The first half of the buckets are exact distances, the rest grow by a constant factor up to
    `max_distance`; everything farther shares the last one.
    """
    exact = buckets // 2
    per_octave = (buckets - exact) / math.log(max_distance / exact)
    far = [exact + int(math.log(d / exact) * per_octave) for d in range(exact, queries)]
    return (*range(min(exact, queries)), *(min(bucket, buckets - 1) for bucket in far))


class QuerySelfAttention(nn.Module):
    """Causal attention among the queries of one image with an additive position bias."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        """Allocate the projections; `heads * head_width` may differ from `width`."""
        super().__init__()
        self.head_width = head_width
        self.enter = nn.Identity()
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, heads * head_width, bias=False)
        self.v = nn.Linear(width, heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x_NQW: Tensor, bias_HQQ: Tensor) -> Tensor:
        """`[N, Q, W]` to `[N, Q, W]`; softmax in float32, `bias` is -inf on the future."""
        x_NQW = self.enter(x_NQW)
        q, k, v = (
            project(x_NQW).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        weights = torch.softmax((q @ k.transpose(-1, -2)).float() + bias_HQQ, -1).to(v.dtype)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Every query sees all visual tokens of its image; no positions, no scale."""

    def __init__(self, width: int, memory_width: int, heads: int, head_width: int) -> None:
        """Allocate the projections; keys and values read the visual width directly."""
        super().__init__()
        self.head_width = head_width
        self.enter = nn.Identity()
        self.enter_memory = nn.Identity()
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(memory_width, heads * head_width, bias=False)
        self.v = nn.Linear(memory_width, heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x_NQW: Tensor, memory_NSC: Tensor) -> Tensor:
        """`[N, Q, W]` to `[N, Q, W]`."""
        memory_NSC = self.enter_memory(memory_NSC)
        q, k, v = (
            x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for x in (self.q(self.enter(x_NQW)), self.k(memory_NSC), self.v(memory_NSC))
        )
        mixed = dense_attention(q, k, v, scale=1.0)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class CausalBlock(nn.Module):
    """Self-attention, cross-attention, perceptron; each pre-norm with a residual."""

    def __init__(
        self,
        *,
        width: int,
        memory_width: int,
        heads: int,
        head_width: int,
        mlp_width: int,
        norm_eps: float,
    ) -> None:
        """Allocate one block."""
        super().__init__()
        self.norm1 = RMSNorm(width, norm_eps)
        self.self_attention = QuerySelfAttention(width, heads, head_width)
        self.norm2 = RMSNorm(width, norm_eps)
        self.cross_attention = CrossAttention(width, memory_width, heads, head_width)
        self.norm3 = RMSNorm(width, norm_eps)
        self.mlp = Mlp(
            nn.Linear(width, mlp_width, bias=False),
            nn.Linear(mlp_width, width, bias=False),
            functional.relu,
        )

    def forward(self, x_NQW: Tensor, memory_NSC: Tensor, bias_HQQ: Tensor) -> Tensor:
        """`[N, Q, W]` to `[N, Q, W]`."""
        x_NQW = x_NQW + self.self_attention(self.norm1(x_NQW), bias_HQQ)
        x_NQW = x_NQW + self.cross_attention(self.norm2(x_NQW), memory_NSC)
        x_NQW = x_NQW + self.mlp(self.norm3(x_NQW))
        return x_NQW


class CausalTransformer(nn.Module):
    """Visual tokens `[N, S, C]` to embeddings `[N, Q, D]`; row i depends on queries up to i."""

    def __init__(
        self,
        *,
        queries: int,
        layers: int,
        width: int,
        memory_width: int,
        heads: int,
        head_width: int,
        mlp_width: int,
        output_width: int,
        relative_buckets: int,
        relative_distance: int,
        norm_eps: float,
    ) -> None:
        """Allocate the whole stack, its queries and the projection to the trunk's width."""
        super().__init__()
        self.relative_distance = relative_distance
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.relative_bias = nn.Parameter(torch.zeros(relative_buckets, heads))
        self.blocks = nn.ModuleList(
            CausalBlock(
                width=width,
                memory_width=memory_width,
                heads=heads,
                head_width=head_width,
                mlp_width=mlp_width,
                norm_eps=norm_eps,
            )
            for _ in range(layers)
        )
        self.norm = RMSNorm(width, norm_eps)
        self.projection = nn.Linear(width, output_width)

    def forward(self, flow: Flow) -> Flow:
        """`hidden [N, S, C]` to `[N, Q, D]`; three dims, so no carried rows are read into it."""
        memory_NSC = flow.hidden
        x_NQW = self.queries.expand(memory_NSC.shape[0], -1, -1)
        bias_HQQ = self.position_bias()
        for block in self.blocks:
            x_NQW = block(x_NQW, memory_NSC, bias_HQQ)
        return flow.with_hidden(self.projection(self.norm(x_NQW)))

    def position_bias(self) -> Tensor:
        """Float32 `[H, Q, Q]`: the table's entry of each distance, -inf on the future."""
        queries, device = self.queries.shape[0], self.queries.device
        of_distance = torch.tensor(
            distance_buckets(queries, self.relative_bias.shape[0], self.relative_distance),
            device=device,
        )
        row = torch.arange(queries, device=device)
        distance_QQ = row[:, None] - row
        bias_QQH = self.relative_bias.float()[of_distance[distance_QQ.clamp(min=0)]]
        return bias_QQH.permute(2, 0, 1).masked_fill(distance_QQ < 0, -math.inf)
