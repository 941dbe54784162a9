"""Attention built from parts, and self-attention of a trunk block over packed rows.

No head count is stored: under tensor parallelism the projections are narrower, and the number of
heads is read off their output. What varies between models is passed in as parts: norms of queries
and keys, and the similarity (scaled dot product, or cosine with a learned scale).

Between projections and attention, queries and keys pass norm, rotary embedding and similarity: on a
CPU module after module, on a GPU as one op (`ops.qk_norm_rope`) that is told the modules'
parameters. The modules own them in both cases, so names, initial weights, tensor plan and hooks of
parameters are the same. `HeadAttention` is this way, for every attention that is made of parts.

T tokens   S keys   D width   H heads   K head width
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.nn.lora import Beside, adapted, no_adapter
from mmtrain.nn.masks import Keys
from mmtrain.nn.noise import RowNoise
from mmtrain.nn.norm import RMSNorm
from mmtrain.ops.qk_norm_rope import ELEMENTS, MOST_HEADS, WIDTHS, Norm, Pairing, qk_norm_rope
from mmtrain.ops.rotary import rotate
from mmtrain.ops.select import QkBackend, qk_backend

LOG_SCALE_MAX = math.log(100.0)  # Swin v2 (Liu et al. 2021, arXiv:2111.09883, section 3.3)
COSINE_EPS = 1e-6  # length below which a row counts as zero; 1e-12 blows up gradients of zero rows


class DotProduct(nn.Module):
    """Logits `q . k / sqrt(K)`."""

    def forward(self, q_THK: Tensor, k_THK: Tensor) -> tuple[Tensor, Tensor, float]:
        """Queries, keys and the factor on their products."""
        return q_THK, k_THK, q_THK.shape[-1] ** -0.5


class Cosine(nn.Module):
    """Logits `s_h cos(q, k)`, `s_h = exp(min(log_scale_h, log 100))` learned for each head."""

    def __init__(self, heads: int) -> None:
        """Allocate `log_scale [H]` at log 10, the start of Swin v2."""
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(10.0)))

    def scale(self) -> Tensor:
        """The factor of each head's cosines, float32 `[H]`."""
        return self.log_scale.float().clamp(max=LOG_SCALE_MAX).exp()

    def forward(self, q_THK: Tensor, k_THK: Tensor) -> tuple[Tensor, Tensor, float]:
        """Queries and keys of unit length, the scale folded into the queries, and 1."""
        q = functional.normalize(q_THK.float(), dim=-1, eps=COSINE_EPS) * self.scale()[:, None]
        k = functional.normalize(k_THK.float(), dim=-1, eps=COSINE_EPS)
        return q.to(q_THK.dtype), k.to(k_THK.dtype), 1.0


class HeadAttention(nn.Module):
    """What attentions made of parts share: the way from projected heads to logits.

    Subclasses set the parts, so that each keeps the order of its own parameters.

    Attributes:
        q_norm: of each head's query.
        k_norm: of each head's key.
        similarity: `DotProduct` or `Cosine`.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    similarity: nn.Module

    def compared(
        self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """Queries and keys after norm, turn and similarity, and the factor on their products.

        Args:
            q: queries `[..., T, H, K]`.
            k: keys `[..., S, G, K]`; with `rotary`, of the same tokens.
            rotary: cosines and sines `[T, 1, K / 2]`, for `[T, H, K]` alone.
        """
        if qk_backend(q.device) is QkBackend.KERNEL and self._fuses(q):
            rows = _of_same_tokens(q, k)
            if rows is not None:
                fused_q, fused_k, scale = self._fused(*rows, q.shape[-2], rotary)
                return fused_q.view(q.shape), fused_k.view(k.shape), scale
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        found: tuple[Tensor, Tensor, float] = self.similarity(q, k)
        return found

    def read_directly(self) -> Iterator[nn.Parameter]:
        """Parameters of parts that this layer reads itself, without calling the part."""
        for part in (self.q_norm, self.k_norm, self.similarity):
            yield from part.parameters()

    def _fuses(self, q: Tensor) -> bool:
        """Whether the op knows these parts, this head width and this type."""
        return (
            type(self.q_norm) in _NORMS
            and type(self.k_norm) is type(self.q_norm)
            and type(self.similarity) in (DotProduct, Cosine)
            and q.shape[-1] in WIDTHS
            and q.dtype in ELEMENTS
        )

    def _fused(
        self, q: Tensor, k: Tensor, heads: int, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, float]:
        """What norms, rotary embedding and similarity give, by one op, two or none.

        Args:
            q: queries `[T, n H, K]`, n of them side by side.
            k: keys of the same number of rows.
            heads: H.
            rotary: cosines and sines.
        """
        norm, similarity = _NORMS[type(self.q_norm)], self.similarity
        tables = None if rotary is None else (rotary[0].squeeze(1), rotary[1].squeeze(1))
        # a turn keeps lengths: cosines without a norm before them are one op
        turned = tables is not None and not isinstance(similarity, Cosine)
        if norm is not Norm.NONE or turned:
            q, k = qk_norm_rope(
                q,
                k,
                norm=norm,
                eps=getattr(self.q_norm, "eps", 0.0),
                weights=(_own(self.q_norm, "weight"), _own(self.k_norm, "weight")),
                biases=(_own(self.q_norm, "bias"), _own(self.k_norm, "bias")),
                pairing=_pairing(tables),
                tables=tables,
            )
            tables = None
        if not isinstance(similarity, Cosine):
            return q, k, q.shape[-1] ** -0.5
        q, k = qk_norm_rope(
            q,
            k,
            norm=Norm.L2,
            eps=COSINE_EPS,
            scales=(similarity.scale().expand(q.shape[-2] // heads, -1).flatten(), None),
            pairing=_pairing(tables),
            tables=tables,
        )
        return q, k, 1.0


class PackedAttention(HeadAttention):
    """Multi-head self-attention with rotary positions; every row sees one interval of keys.

    With fewer key heads than query heads, each serves a group of neighbouring query heads
    (Ainslie et al. 2023, arXiv:2305.13245).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int,
        q_norm: nn.Module,
        k_norm: nn.Module,
        similarity: nn.Module,
        beside: Beside = no_adapter,
    ) -> None:
        """Allocate four projections without biases; `heads` divides `width`, `kv_heads` heads.

        `beside` makes the adapters of q, k, v and out.
        """
        super().__init__()
        self.head_width = width // heads
        self.enter = nn.Identity()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.similarity = similarity
        self.out = nn.Linear(width, width, bias=False)
        self.q_lora = beside("q", self.q)
        self.k_lora = beside("k", self.k)
        self.v_lora = beside("v", self.v)
        self.out_lora = beside("out", self.out)

    def forward(
        self,
        x_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        keys: Keys,
        noise: RowNoise | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x_TD: normalised rows; under sequence parallelism this rank's rows, all T after `enter`.
            rotary: cosines and sines `[T, 1, K / 2]`.
            keys: what the rows see.
            noise: for the dropout of adapters.
        """
        x_TD = self.enter(x_TD)
        q, k, v = (
            adapted(project, adapter, x_TD, noise).view(len(x_TD), -1, self.head_width)
            for project, adapter in (
                (self.q, self.q_lora),
                (self.k, self.k_lora),
                (self.v, self.v_lora),
            )
        )
        q, k, scale = self.compared(q, k, rotary)
        attended = keys.attend(self, q, k, v, scale).flatten(-2)
        return adapted(self.out, self.out_lora, attended, noise)


_NORMS: dict[type[nn.Module], Norm] = {
    nn.Identity: Norm.NONE,
    RMSNorm: Norm.RMS,
    nn.LayerNorm: Norm.LAYER,
}


def _of_same_tokens(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
    """Queries and keys as `[T, heads, K]` with one T, as the op wants them; None if it cannot be.

    Where nothing depends on tokens but their heads, some tokens' heads may stand side by side.
    """
    q, k = (x.flatten(0, -3) for x in (q, k))
    if len(q) != len(k):
        tokens = math.gcd(len(q), len(k))
        q, k = (x.reshape(tokens, -1, x.shape[-1]) for x in (q, k))
    return (q, k) if max(q.shape[1], k.shape[1]) <= MOST_HEADS else None


def _pairing(tables: tuple[Tensor, Tensor] | None) -> Pairing:
    return Pairing.NONE if tables is None else Pairing.HALVES


def _own(module: nn.Module, name: str) -> Tensor | None:
    found: Tensor | None = getattr(module, name, None)
    return found
