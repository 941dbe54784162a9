"""Scaled cosine attention with a learned scale per head (Liu et al. 2021, arXiv:2111.09883).

    out_i = sum_j softmax_j(s_h cos(q_i, k_j) + bias_ij) v_j        s_h = exp(min(log_scale_h, max))

A vector no longer than `eps` is divided by `eps`. A row that sees no key has output zero, logsumexp
-inf and no gradient.

Two ways to compute it, chosen by size (`cosine_path`):

- fused: `mmtrain::cosine_attention`, on a GPU the kernels of `kernels/csrc/cosine_attention.cu`.
  Raw 16-bit rows are multiplied and both lengths divided out in float32 (logits exact to 1e-5,
  where rounding q / |q| first costs 0.1 at scale 100); nothing is written but the output and one
  number a row; the gradient of the scale falls out of that of the queries. Everywhere else the
  formulas below serve, with the same contract, in float32 and with the logits in memory.
- composed: queries (times s) and keys of unit length, then attention over key intervals by the best
  backend of `mmtrain.ops.attention`. Costs a pass over q and k in each direction: 2 F / (bandwidth
  S) of the attention itself at its rate F, 13 % at 4,096 keys of a causal layer, 45 % at 1,024.

B batches   T query rows   S keys   H heads   K head width   P biases
"""

import math
from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtrain.ops.attention import IntervalPlan, interval_attention, repeat_heads
from mmtrain.ops.extension import LIBRARY, NAMESPACE, define
from mmtrain.ops.intervals import KeyIntervals
from mmtrain.ops.qk_norm_rope import Norm, qk_norm_rope, vector_ready
from mmtrain.ops.select import QkBackend, qk_backend

LOG_SCALE_MAX = math.log(100.0)  # Swin v2, section 3.3
EPS = 1e-6  # 1e-12, the default of torch, blows up gradients of zero rows
KERNEL_TYPES = (torch.bfloat16, torch.float16)
WIDEST = 128  # head width of the kernels; a multiple of 8
RESIDENT_ROWS = 64  # query rows that stay in one block while all keys stream by
FUSED_ROWS = 1024  # at most so many rows and keys are fused; above, the pass over q and k is cheap

define(
    "cosine_attention(Tensor q, Tensor k, Tensor v, Tensor log_scale, Tensor? bias, Tensor? lo, "
    "Tensor? hi, Tensor? first, Tensor? last, Tensor? key_lengths, float log_scale_max, float eps) "
    "-> (Tensor, Tensor)"
)
define(
    "cosine_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor lse, Tensor log_scale, Tensor? bias, Tensor? lo, Tensor? hi, "
    "Tensor? first, Tensor? last, Tensor? key_lengths, float log_scale_max, float eps, "
    "bool bias_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class CosinePath(Enum):
    """Ways to compute cosine attention."""

    FUSED = "fused"  # `cosine_attention`
    COMPOSED = "composed"  # `composed_cosine_attention`


def cosine_path(q_THK: Tensor, keys: int) -> CosinePath:
    """The faster way for queries `[..., T, H, K]` over `keys` keys.

    Fused where the kernels run, in 16 bits, for few queries over any number of keys (a perceiver)
    and for up to `FUSED_ROWS` of both (windows, pictures). Composed for long rows, for float32 and
    on a CPU, where the fused op holds all logits.
    """
    rows, width = q_THK.shape[-3], q_THK.shape[-1]
    served = qk_backend(q_THK.device) is QkBackend.KERNEL
    if not served or q_THK.dtype not in KERNEL_TYPES or width > WIDEST or width % 8:
        return CosinePath.COMPOSED
    few = rows <= RESIDENT_ROWS or max(rows, keys) <= FUSED_ROWS
    return CosinePath.FUSED if few else CosinePath.COMPOSED


def cosine_attention(
    q_BTHK: Tensor,
    k_BSHK: Tensor,
    v_BSHK: Tensor,
    log_scale_H: Tensor,
    *,
    bias_PHTS: Tensor | None = None,
    intervals: KeyIntervals | None = None,
    key_lengths_B: Tensor | None = None,
    log_scale_max: float = LOG_SCALE_MAX,
    eps: float = EPS,
) -> Tensor:
    """Fused cosine attention of each query row over the keys it sees.

    Args:
        q_BTHK: queries, any strides with channels side by side (packed projections need no copy).
        k_BSHK: keys; with fewer heads than queries each serves a group of neighbouring heads.
        v_BSHK: values, as many heads as keys.
        log_scale_H: logarithm of the factor on the cosines, float32.
        bias_PHTS: added to the logits, float32; batch b reads number b % P (P windows of a picture,
            or 1). -inf hides a key.
        intervals: keys that rows see, or None for all.
        key_lengths_B: int32, keys from here on are padding and may hold anything.
        log_scale_max: above it `log_scale` has no effect and no gradient.
        eps: length below which a vector counts as zero.

    Returns:
        `[B, T, H, K]`, contiguous, in the queries' type (under autocast: in autocast's; the scale
        and the bias stay in theirs).
    """
    kind = q_BTHK.device.type
    if torch.is_autocast_enabled(kind):  # torch's own register_autocast would round the scale
        dtype = torch.get_autocast_dtype(kind)
        q_BTHK, k_BSHK, v_BSHK = (x.to(dtype) for x in (q_BTHK, k_BSHK, v_BSHK))
    k_BSHK, v_BSHK = (repeat_heads(x, q_BTHK.shape[-2]) for x in (k_BSHK, v_BSHK))
    q_BTHK, k_BSHK, v_BSHK = (vector_ready(x) for x in (q_BTHK, k_BSHK, v_BSHK))
    mask: tuple[Tensor | None, ...] = (None,) * 4
    if intervals is not None:
        mask = (intervals.lo_BT, intervals.hi_BT, intervals.first_BS, intervals.last_BS)
    bias = None if bias_PHTS is None else bias_PHTS.contiguous()
    out: Tensor = torch.ops.mmtrain.cosine_attention(
        q_BTHK, k_BSHK, v_BSHK, log_scale_H, bias, *mask, key_lengths_B, log_scale_max, eps
    )[0]
    return out


def composed_cosine_attention(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHK: Tensor,
    log_scale_H: Tensor,
    plan: IntervalPlan,
    *,
    log_scale_max: float = LOG_SCALE_MAX,
    eps: float = EPS,
) -> Tensor:
    """Cosine attention of packed rows by normalised queries and keys and interval attention.

    Args:
        q_THK: queries.
        k_SHK: keys, with as many or fewer heads.
        v_SHK: values, as many heads as keys.
        log_scale_H: logarithm of the factor on the cosines.
        plan: `plan_intervals` of this micro-batch.
        log_scale_max: above it `log_scale` has no effect and no gradient.
        eps: length below which a vector counts as zero.
    """
    scale_H = log_scale_H.float().clamp(max=log_scale_max).exp()
    if len(q_THK) == len(k_SHK):
        q, k = qk_norm_rope(q_THK, k_SHK, norm=Norm.L2, eps=eps, scales=(scale_H, None))
    else:  # the op takes queries and keys of the same tokens
        q, k = (normalize(x.float(), dim=-1, eps=eps) for x in (q_THK, k_SHK))
        q, k = (q * scale_H[:, None]).to(v_SHK.dtype), k.to(v_SHK.dtype)
    return interval_attention(q, k, v_SHK.to(q.dtype), plan, 1.0)


# --- The torch implementation -------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """Heads before rows, in the type of the arithmetic."""
    return (x if x.dtype == torch.float64 else x.float()).transpose(1, 2)


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Directions and reciprocal lengths of rows."""
    reciprocal = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps).reciprocal()
    return x * reciprocal, reciprocal


def _logits(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, seen: Tensor | None
) -> Tensor:
    """`[B, H, T, S]` of directions; -inf where a row does not see a key."""
    z = (q * scale) @ k.mT
    if bias is not None:
        z = (z.view(-1, *bias.shape) + bias).flatten(0, 1)
    return z if seen is None else z.masked_fill(~seen, -torch.inf)


def _scale(log_scale: Tensor, log_scale_max: float) -> Tensor:
    return log_scale.clamp(max=log_scale_max).exp()[:, None, None]


def _seen(
    keys: int, lo: Tensor | None, hi: Tensor | None, key_lengths: Tensor | None
) -> Tensor | None:
    """Boolean, broadcasts to `[B, H, T, S]`; None when every row sees every key."""
    seen = None
    if key_lengths is not None:
        key = torch.arange(keys, device=key_lengths.device)
        seen = key < key_lengths[:, None, None, None]
    if lo is not None and hi is not None:
        key = torch.arange(keys, device=lo.device)
        inside = (lo[:, None, :, None] <= key) & (key < hi[:, None, :, None])
        seen = inside if seen is None else seen & inside
    return seen


def _without_padding(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Rows `[B, H, S, K]` past the key length as zeros: they may hold NaN, and 0 NaN is NaN."""
    if key_lengths is None:
        return x
    key = torch.arange(x.shape[-2], device=x.device)[:, None]
    return x.masked_fill(key >= key_lengths[:, None, None, None], 0.0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, bias: Tensor | None, lo: Tensor | None,
    hi: Tensor | None, first: Tensor | None, last: Tensor | None, key_lengths: Tensor | None,
    log_scale_max: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide_q = _unit(_wide(q), eps)[0]
    wide_k = _unit(_without_padding(_wide(k), key_lengths), eps)[0]
    seen = _seen(k.shape[1], lo, hi, key_lengths)
    scale = _scale(log_scale, log_scale_max).to(wide_q.dtype)
    z = _logits(wide_q, wide_k, scale, bias, seen)
    lse = z.logsumexp(-1)
    p = _probabilities(z, lse)
    out = (p @ _without_padding(_wide(v), key_lengths)).transpose(1, 2)
    return out.to(q.dtype).contiguous(), lse


def _probabilities(z: Tensor, lse: Tensor) -> Tensor:
    """Softmax; zeros for a row that sees no key, whose logsumexp is -inf."""
    return (z - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp()


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    log_scale: Tensor, bias: Tensor | None, lo: Tensor | None, hi: Tensor | None,
    first: Tensor | None, last: Tensor | None, key_lengths: Tensor | None, log_scale_max: float,
    eps: float, bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    unit_q, shrink_q = _unit(_wide(q), eps)
    unit_k, shrink_k = _unit(_without_padding(_wide(k), key_lengths), eps)
    scale = _scale(log_scale, log_scale_max).to(unit_q.dtype)
    seen = _seen(k.shape[1], lo, hi, key_lengths)
    p = _probabilities(_logits(unit_q, unit_k, scale, bias, seen), lse)
    wide_dout = _wide(dout)
    delta = (wide_dout * _wide(out)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    dz = p * (wide_dout @ _without_padding(_wide(v), key_lengths).mT - delta)
    to_q, to_k = scale * (dz @ unit_k), scale * (dz.mT @ unit_q)
    turned = (unit_q * to_q).sum(-1)
    dlog_scale = turned.sum((0, 2)) * (log_scale <= log_scale_max)
    dbias = q.new_empty(0, dtype=torch.float32)
    if bias_gradient and bias is not None:
        dbias = dz.view(-1, *bias.shape).sum(0).to(bias.dtype)
    return (
        _project(to_q, unit_q, shrink_q, eps).transpose(1, 2).to(q.dtype).contiguous(),
        _project(to_k, unit_k, shrink_k, eps).transpose(1, 2).to(k.dtype).contiguous(),
        (p.mT @ wide_dout).transpose(1, 2).to(v.dtype).contiguous(),
        dlog_scale.to(log_scale.dtype),
        dbias,
    )


def _project(to_unit: Tensor, unit: Tensor, reciprocal: Tensor, eps: float) -> Tensor:
    """Gradient of rows from that of their directions; rows no longer than eps have a constant."""
    along = (unit * to_unit).sum(-1, keepdim=True).masked_fill(reciprocal * eps >= 1.0, 0.0)
    return reciprocal * (to_unit - unit * along)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=kind)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    log_scale: Tensor, bias: Tensor | None, lo: Tensor | None, hi: Tensor | None,
    first: Tensor | None, last: Tensor | None, key_lengths: Tensor | None, log_scale_max: float,
    eps: float, bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = q.new_empty(0, dtype=torch.float32)
    if bias_gradient and bias is not None:
        dbias = bias.new_empty(bias.shape)
    dq, dk, dv, dlog_scale = (x.new_empty(x.shape) for x in (q, k, v, log_scale))
    return dq, dk, dv, dlog_scale, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.log_scale_max, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dout is None and dlse is None:
        return (None,) * 12
    q, k, v, log_scale, bias, *mask, out, lse = ctx.saved_tensors
    wants_bias = bias is not None and ctx.needs_input_grad[4]
    dout = torch.zeros_like(out) if dout is None else vector_ready(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dlog_scale, dbias = torch.ops.mmtrain.cosine_attention_backward(
        dout, dlse, q, k, v, out, lse, log_scale, bias, *mask, ctx.log_scale_max, ctx.eps,
        wants_bias,
    )  # fmt: skip
    return dq, dk, dv, dlog_scale, dbias if wants_bias else None, *(None,) * 7


def _in_own_type(formulas: Callable[..., Any]) -> Callable[..., Any]:
    """The formulas with autocast off: it would round products of float32 again."""

    @wraps(formulas)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return formulas(first, *rest)

    return run


LIBRARY.impl("cosine_attention", _in_own_type(_forward), "CompositeExplicitAutograd")
LIBRARY.impl("cosine_attention_backward", _in_own_type(_backward), "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::cosine_attention", _fake_forward)
torch.library.register_fake(f"{NAMESPACE}::cosine_attention_backward", _fake_backward)
torch.library.register_autograd(
    f"{NAMESPACE}::cosine_attention", _differentiate, setup_context=_save
)
