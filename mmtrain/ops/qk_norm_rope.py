"""Norm of queries and keys per head, then the rotary embedding, as one op.

On a GPU `mmtrain::qk_norm_rope` is the kernel of `kernels/csrc/qk_norm_rope.cuh`: each tensor is
read and written once, forward and backward, where a chain of torch ops takes several passes a step.
Everywhere else the torch formulas below serve, with the same contract. Arithmetic is float32
(float64 for float64); only the result is rounded, where a chain rounds after every op.

RMS (Zhang and Sennrich 2019, arXiv:1910.07467), layer norm (Ba et al. 2016, arXiv:1607.06450;
on queries and keys: Dehghani et al. 2023, arXiv:2302.05442), L2 with a scale per head (cosine
attention: Liu et al. 2021, arXiv:2111.09883), rotary embedding (Su et al. 2021, arXiv:2104.09864).
What varies between rotary embeddings (one dim or two, a class token, packed documents, scaled
resolution) is the table and the rows that tokens read; identity rows turn nothing.

Cost: 4 bytes an element forward and 6 backward in 16 bits; nothing is saved but the input and one
or two numbers a row.

T tokens   H heads   K head width   P rows of the tables   R = K / 2
"""

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mmtrain.ops.extension import LIBRARY, define


class Norm(IntEnum):
    """Of each head's row; the numbers are the kernel's."""

    NONE = 0
    RMS = 1
    LAYER = 2
    L2 = 3  # rows no longer than eps are divided by eps; 1e-12 blows up gradients of zero rows


class Pairing(IntEnum):
    """Which channels the rotary embedding turns together; the numbers are the kernel's."""

    NONE = 0
    HALVES = 1  # (k, k + R), as in the LLaMA release
    NEIGHBOURS = 2  # (2k, 2k + 1), as in GPT-J and EVA


WIDTHS = range(32, 257, 8)  # head widths of the kernel
MOST_HEADS = 1024  # of a token, in the kernel
ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)  # types of its queries and keys

define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, "
    "Tensor? k_bias, Tensor? q_scale, Tensor? k_scale, Tensor? cosine, Tensor? sine, "
    "Tensor? positions, int norm, int pairing, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
define(
    "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight, "
    "Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? q_scale, Tensor? k_scale, "
    "Tensor? cosine, Tensor? sine, Tensor? positions, Tensor q_inverse, Tensor k_inverse, "
    "Tensor q_mean, Tensor k_mean, int norm, int pairing, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def qk_norm_rope(
    q_THK: Tensor,
    k_THK: Tensor,
    *,
    norm: Norm,
    eps: float = 1e-6,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    pairing: Pairing = Pairing.NONE,
    tables: tuple[Tensor, Tensor] | None = None,
    positions_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys head by head and turn them by their tokens' angles.

    Args:
        q_THK: queries, any strides with channels side by side (packed projections need no copy).
        k_THK: keys; the number of heads may differ.
        norm: kind of norm.
        eps: added to the mean square (RMS, layer), or least length (L2).
        weights: of queries and keys, `[K]`; RMS and layer norm.
        biases: `[K]`; layer norm with weights.
        scales: a factor for each head, `[H]`; L2.
        pairing: of the rotary embedding.
        tables: cosines and sines `[P, R]`, float32.
        positions_T: integer row of the tables that each token reads; None: row t modulo P.

    Returns:
        Queries and keys, contiguous, in their own type (under autocast: in autocast's). Weights,
        biases and scales stay in theirs.
    """
    _check(norm, pairing, weights, biases, scales, tables)
    kind = q_THK.device.type
    if torch.is_autocast_enabled(kind):  # of torch's own register_autocast weights would be rounded
        dtype = torch.get_autocast_dtype(kind)
        q_THK, k_THK = q_THK.to(dtype), k_THK.to(dtype)
    cosine, sine = (None, None) if tables is None else tables
    found = torch.ops.mmtrain.qk_norm_rope(
        vector_ready(q_THK), vector_ready(k_THK), *weights, *biases, *scales, cosine, sine,
        positions_T, norm, pairing, eps,
    )  # fmt: skip
    return found[0], found[1]


def vector_ready(x: Tensor) -> Tensor:
    """`x`, or a copy where its rows cannot be read 16 bytes at a time.

    Compilers cannot trace the offset; if it is odd, the kernels refuse.
    """
    aligned = torch.compiler.is_compiling() or x.storage_offset() % 8 == 0
    aligned = aligned and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _check(
    norm: Norm,
    pairing: Pairing,
    weights: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    scales: tuple[Tensor | None, Tensor | None],
    tables: tuple[Tensor, Tensor] | None,
) -> None:
    given = [x is not None for pair in (weights, biases, scales) for x in pair]
    allowed = [norm in kinds for kinds in _TAKES for _ in range(2)]
    assert all(a for g, a in zip(given, allowed, strict=True) if g), (
        f"{norm.name} takes no such weights, biases or scales"
    )
    for weight, bias in zip(weights, biases, strict=True):
        assert bias is None or weight is not None, "a bias comes with a weight"
    assert (pairing is Pairing.NONE) == (tables is None), "a rotary embedding needs its tables"


_TAKES = ((Norm.RMS, Norm.LAYER), (Norm.LAYER,), (Norm.L2,))  # weights, biases, scales


# --- The torch implementation -------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _turn(x: Tensor, tables: tuple[Tensor, Tensor] | None, pairing: int, sign: float) -> Tensor:
    """Turn channel pairs by `sign` times the tokens' angles."""
    if tables is None:
        return x
    cosine, sine = tables[0], sign * tables[1]
    if pairing == Pairing.HALVES:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)


def _rows(
    cosine: Tensor | None, sine: Tensor | None, positions: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor] | None:
    """The tables' rows of all tokens, `[T, 1, R]`."""
    if cosine is None or sine is None:
        return None
    if positions is None:
        positions = torch.arange(tokens, device=cosine.device) % cosine.shape[0]
    return cosine[positions][:, None], sine[positions][:, None]


def _empty(x: Tensor) -> Tensor:
    """Stands for a result that there is not in this call."""
    return x.new_empty(0, dtype=torch.float32)


def _forward_side(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    norm: int,
    pairing: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, reciprocal norms and means of queries or of keys."""
    n = _wide(x)
    inverse, mean = _empty(x), _empty(x)  # two: outputs of an op must not share memory
    if norm == Norm.LAYER:
        mean = n.mean(-1)
        n = n - mean[..., None]
    if norm == Norm.L2:
        inverse = 1.0 / torch.linalg.vector_norm(n, dim=-1).clamp(min=eps)
    elif norm != Norm.NONE:
        inverse = (n.square().mean(-1) + eps).rsqrt()
    if norm != Norm.NONE:
        n = n * inverse[..., None]
    n = n if weight is None else n * weight
    n = n if bias is None else n + bias
    n = n if scale is None else n * scale[:, None]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out.copy_(_turn(n, rows, pairing, 1.0)), inverse, mean


def _backward_side(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    inverse: Tensor,
    mean: Tensor,
    norm: int,
    pairing: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and scale; those that the norm has not are not used."""
    g = _turn(_wide(upstream), rows, pairing, -1.0)
    none = _empty(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if norm == Norm.NONE:
        return dx.copy_(g), none, none, none
    unit = _wide(x) if norm != Norm.LAYER else _wide(x) - mean[..., None]
    unit = unit * inverse[..., None]
    product = g * unit
    d_weight, d_bias, d_scale = product.sum((0, 1)), g.sum((0, 1)), product.sum((0, 2))
    g = g if weight is None else g * weight
    g = g if scale is None else g * scale[:, None]
    along = (g * unit).sum(-1, keepdim=True)
    if norm == Norm.L2:
        projected = along.masked_fill((inverse >= 1.0 / eps)[..., None], 0.0)
        out = g - unit * projected
    else:
        out = g - unit * (along / x.shape[-1])
        out = out - g.mean(-1, keepdim=True) if norm == Norm.LAYER else out
    return dx.copy_(out * inverse[..., None]), d_weight, d_bias, d_scale


def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None,
    cosine: Tensor | None, sine: Tensor | None, positions: Tensor | None,
    norm: int, pairing: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = _rows(cosine, sine, positions, q.shape[0])
    queries = _forward_side(q, q_weight, q_bias, q_scale, rows, norm, pairing, eps)
    keys = _forward_side(k, k_weight, k_bias, k_scale, rows, norm, pairing, eps)
    return tuple(x for pair in zip(queries, keys, strict=True) for x in pair)


def _backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    q_scale: Tensor | None, k_scale: Tensor | None,
    cosine: Tensor | None, sine: Tensor | None, positions: Tensor | None,
    q_inverse: Tensor, k_inverse: Tensor, q_mean: Tensor, k_mean: Tensor,
    norm: int, pairing: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = _rows(cosine, sine, positions, q.shape[0])
    queries = _backward_side(
        dq_out, q, q_weight, q_scale, rows, q_inverse, q_mean, norm, pairing, eps
    )
    keys = _backward_side(dk_out, k, k_weight, k_scale, rows, k_inverse, k_mean, norm, pairing, eps)
    parameters = (q_weight, k_weight, q_bias, k_bias, q_scale, k_scale)
    pairs = [x for pair in zip(queries, keys, strict=True) for x in pair]
    gradients = (
        _empty(q) if parameter is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(parameters, pairs[2:], strict=True)
    )
    return (*pairs[:2], *gradients)


# --- Registration -------------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    norm = rest[-3]
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32

    def statistic(x: Tensor, wanted: bool) -> Tensor:
        return x.new_empty(x.shape[:2], dtype=kind) if wanted else _empty(x)

    outputs = [x.new_empty(x.shape) for x in (q, k)]
    inverses = [statistic(x, norm != Norm.NONE) for x in (q, k)]
    means = [statistic(x, norm == Norm.LAYER) for x in (q, k)]
    return (*outputs, *inverses, *means)


def _fake_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gradients = [_empty(q) if x is None else x.new_empty(x.shape) for x in rest[:6]]
    return (q.new_empty(q.shape), k.new_empty(k.shape), *gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:11], *output[2:])
    ctx.numbers = inputs[11:]


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = torch.ops.mmtrain.qk_norm_rope_backward(
        vector_ready(dq), vector_ready(dk), *saved, *ctx.numbers
    )
    parameters = zip(saved[2:8], found[2:], strict=True)
    gradients = (None if parameter is None else gradient for parameter, gradient in parameters)
    return (*found[:2], *gradients, None, None, None, None, None, None)


_BACKWARD = "qk_norm_rope_backward"
LIBRARY.impl("qk_norm_rope", _forward, "CompositeExplicitAutograd")
LIBRARY.impl(_BACKWARD, _backward, "CompositeExplicitAutograd")
torch.library.register_fake("mmtrain::qk_norm_rope", _fake_forward, lib=LIBRARY)
torch.library.register_fake(f"mmtrain::{_BACKWARD}", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "mmtrain::qk_norm_rope", _differentiate, setup_context=_setup, lib=LIBRARY
)
