"""Perceiver resampler: learned latents read one frame's features into a few rows.

The history branch of Unified-IO 2 (Lu et al. 2023, arXiv:2312.17172; perceivers: Jaegle et al.
2021, arXiv:2103.03206). Every layer is cross-attention of the latents to the RMS-normalised
features and a tanh-GELU perceptron, both pre-norm RMS and without biases; a final RMS norm; no
positions. Frames do not see each other. The attention is made of parts, as the trunk's: an RMS norm
of each head's query and key with the scaled dot product, or cosines with a learned scale per head
(Liu et al. 2021, arXiv:2111.09883), which on a GPU run as one op (`ops.cosine_attention`).

Attention does not ask for the order of keys: features that count are moved in front of those that
do not, once for all layers, so a mask of any form is one length a frame, and what is masked may
hold anything, NaN included. A frame of which nothing counts attends to nothing: its latents pass
the perceptrons alone, and no gradient leaves it but theirs. The published code gives such a frame
the mean of all its values instead and masks the latents later; either way nobody may read them.

Cost of a layer: 4 N S W^2 operations on keys and values, 4 N Q W (W + M) on latents, 4 N Q S W of
attention.

N frames   S features of a frame   C their width   Q latents   W width   M inner width of the
perceptron   H heads   K head width   D output width
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.layout.plan import Cut
from mmtrain.nn.attention import Cosine, HeadAttention
from mmtrain.nn.init import Draw, InitialRules, constant, normal, truncated_normal
from mmtrain.nn.mlp import Mlp
from mmtrain.nn.norm import RMSNorm
from mmtrain.ops.cosine_attention import CosinePath, cosine_attention, cosine_path
from mmtrain.ops.dense_attention import dense_attention

_TRUNCATED_STD = 0.87962566  # of a unit normal that is cut at two standard deviations


class LatentAttention(HeadAttention):
    """Cross-attention of latents to the features of their frame."""

    def __init__(
        self, width: int, heads: int, *, q_norm: nn.Module, k_norm: nn.Module, similarity: nn.Module
    ) -> None:
        """Allocate four projections without biases; `heads` divides `width`."""
        super().__init__()
        self.head_width = width // heads
        self.enter = nn.Identity()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.similarity = similarity
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_NQW: Tensor, context_NSW: Tensor, lengths_N: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x_NQW: normalised latents; with N = 1 all frames have the same.
            context_NSW: normalised features; zeros where a frame has none.
            lengths_N: int32, features of each frame, which come first; None: all S.

        Returns:
            `[N, Q, W]`; zeros for a frame of length 0.
        """
        q, k, v = (
            x.unflatten(-1, (-1, self.head_width))
            for x in (self.q(self.enter(x_NQW)), self.k(context_NSW), self.v(context_NSW))
        )
        q = q.expand(len(k), -1, -1, -1)
        similarity, keys = self.similarity, k.shape[1]
        if isinstance(similarity, Cosine) and cosine_path(q, keys) is CosinePath.FUSED:
            q, k, scale = self.q_norm(q), self.k_norm(k), similarity.log_scale.float()
            mixed = cosine_attention(q, k, v, scale, key_lengths_B=lengths_N)
        else:
            q, k, factor = self.compared(q, k)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            seen = None if lengths_N is None else _seen(lengths_N, keys)
            mixed = dense_attention(q, k, v, mask=seen, scale=factor)
            mixed = mixed.transpose(1, 2)
        out: Tensor = self.out(mixed.flatten(2))
        return out


class ResamplerBlock(nn.Module):
    """`x + attention(norm1(x), context)`, then `x + mlp(norm2(x))`."""

    def __init__(
        self, *, width: int, mlp_width: int, attention: LatentAttention, norm_eps: float
    ) -> None:
        """Allocate norms and perceptron beside the `attention`."""
        super().__init__()
        self.norm1 = RMSNorm(width, norm_eps)
        self.attention = attention
        self.norm2 = RMSNorm(width, norm_eps)
        self.mlp = Mlp(
            nn.Linear(width, mlp_width, bias=False),
            nn.Linear(mlp_width, width, bias=False),
            partial(functional.gelu, approximate="tanh"),
        )

    def forward(self, x_NQW: Tensor, context_NSW: Tensor, lengths_N: Tensor | None) -> Tensor:
        """`[N or 1, Q, W]` to `[N, Q, W]`; the rest as in `LatentAttention`."""
        x_NQW = x_NQW + self.attention(self.norm1(x_NQW), context_NSW, lengths_N)
        out: Tensor = x_NQW + self.mlp(self.norm2(x_NQW))
        return out


class Resampler(nn.Module):
    """Features `[N, S, C]` to `[N, Q, D]`.

    A plain module, not a layer of a model's list: features and mask come from the family's flow.
    """

    def __init__(
        self,
        *,
        latents: int,
        width: int,
        blocks: list[ResamplerBlock],
        norm_eps: float,
        context_width: int | None = None,
        output_width: int | None = None,
    ) -> None:
        """Allocate latents and norms around the `blocks`.

        `context_width` and `output_width` ask for projections from and to other widths.
        """
        super().__init__()
        self.pre_projection = _projection(context_width, width)
        self.latents = nn.Parameter(torch.zeros(latents, width))
        self.context_norm = RMSNorm(width, norm_eps)
        self.enter_context = nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(width, norm_eps)
        self.post_projection = _projection(width, output_width)

    def forward(self, context_NSC: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        """Resample.

        Args:
            context_NSC: features of frames.
            mask_NS: what counts (true or 1), in any order; None: everything.

        Returns:
            `[N, Q, D]`.
        """
        lengths_N = None
        if mask_NS is not None:
            context_NSC, lengths_N = _in_front(context_NSC, mask_NS.bool())
        context_NSW = self.enter_context(self.context_norm(self.pre_projection(context_NSC)))
        x_NQW = self.latents[None]
        for block in self.blocks:
            x_NQW = block(x_NQW, context_NSW, lengths_N)
        out: Tensor = self.post_projection(self.norm(x_NQW))
        return out


def tensor_rules(name: str) -> dict[str, Cut]:
    """Rows of a tensor plan for the resampler called `name`, whose heads the ranks share.

    Where the number of heads is not divisible, leave the rows out: every rank computes it whole.
    """
    attention, mlp = f"{name}.blocks.*.attention", f"{name}.blocks.*.mlp"
    return {
        f"{name}.enter_context": Cut.ENTER,  # of all layers at once
        f"{name}.blocks.*.{{attention,mlp}}.enter": Cut.ENTER,
        f"{attention}.{{q,k,v}}": Cut.COLUMN,
        f"{attention}.{{q_norm,k_norm}}.{{weight,bias}}": Cut.SHARED,
        f"{attention}.similarity.log_scale": Cut.HEADS_0,
        f"{attention}.out": Cut.ROW,
        f"{mlp}.up": Cut.COLUMN,
        f"{mlp}.down": Cut.ROW,
    }


def initial_rules(
    name: str, *, width: int, mlp_width: int, context_width: int | None = None
) -> InitialRules:
    """How Unified-IO 2 draws the resampler called `name`: variance 1 / inputs."""
    attention = f"{name}.blocks.*.attention"
    return [
        (f"{name}.latents", normal(width**-0.5)),
        (f"{name}.pre_projection.weight", _dense(context_width or width)),
        (f"{attention}.{{q,k,v,out}}.weight", normal(width**-0.5)),
        (f"{attention}.{{q_norm,k_norm}}.weight", constant(1.0)),
        (f"{attention}.similarity.log_scale", constant(math.log(10.0))),
        (f"{name}.blocks.*.mlp.up.weight", _dense(width)),
        (f"{name}.blocks.*.mlp.down.weight", _dense(mlp_width)),
        (f"{name}.blocks.*.{{norm1,norm2}}.weight", constant(1.0)),
        (f"{name}.{{context_norm,norm}}.weight", constant(1.0)),
        (f"{name}.post_projection.weight", _dense(width)),
    ]


def _dense(inputs: int) -> Draw:
    """Truncated normal of variance 1 / inputs."""
    return truncated_normal(inputs**-0.5 / _TRUNCATED_STD)


def _projection(inputs: int | None, outputs: int | None) -> nn.Module:
    """A linear without bias between two widths; nothing where one is not given."""
    if inputs is None or outputs is None:
        return nn.Identity()
    return nn.Linear(inputs, outputs, bias=False)


def _in_front(context_NSC: Tensor, mask_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Features that count before zeros, in their order, and how many count in each frame."""
    frames, keys = mask_NS.shape
    order_NS = mask_NS.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    starts_N1 = torch.arange(frames, device=mask_NS.device)[:, None] * keys
    moved = context_NSC.flatten(0, 1).index_select(0, (order_NS + starts_N1).flatten())
    lengths_N = mask_NS.sum(1, dtype=torch.int32)
    padding_NS = torch.arange(keys, device=mask_NS.device) >= lengths_N[:, None]
    return moved.view_as(context_NSC).masked_fill(padding_NS[..., None], 0.0), lengths_N


def _seen(lengths_N: Tensor, keys: int) -> Tensor:
    """Boolean `[N, 1, 1, S]`; a frame of length 0 sees a zero, which adds nothing."""
    key = torch.arange(keys, device=lengths_N.device)
    return key < lengths_N.clamp(min=1)[:, None, None, None]
