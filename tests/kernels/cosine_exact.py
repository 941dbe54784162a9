"""Cosine attention in float64 by autograd, as the formula is printed.

Independent of `mmtrain.ops` on purpose: kernels and the torch reference are both held to it.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

# of ||ours - exact|| / ||exact|| in bf16: twice the rounding of the output, and room for what
# gradients round besides (P, dz). fp16 has three bits more.
LIMITS = {"out": 6e-3, "dv": 6e-3, "dq": 1e-2, "dk": 1e-2, "dbias": 1e-2, "dlog_scale": 2e-2}
LSE = 1e-3
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
NOISE = 4.0  # times what `noise` expects


class Problem(Protocol):
    """The attributes of `cosine_emulated.Inputs`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    log_scale: Tensor
    dlse: Tensor | None
    bias: Tensor | None
    intervals: tuple[Tensor, Tensor] | None
    key_lengths: Tensor | None
    log_scale_max: float
    eps: float


def seen(inputs: Problem) -> Tensor:
    """Boolean `[B, 1, T, S]`."""
    batch, rows, keys = inputs.q.shape[0], inputs.q.shape[1], inputs.k.shape[1]
    key = torch.arange(keys)
    mask = torch.ones(batch, 1, rows, keys, dtype=torch.bool)
    if inputs.intervals is not None:
        lo, hi = (x[:, None, :, None] for x in inputs.intervals)
        mask = mask & (lo <= key) & (key < hi)
    if inputs.key_lengths is not None:
        mask = mask & (key < inputs.key_lengths[:, None, None, None])
    return mask


def run(inputs: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients from the inputs as they are rounded, and the `noise` of gradients.

    Rows without keys are zero.
    """
    names = ["q", "k", "v", "log_scale", *(["bias"] if inputs.bias is not None else [])]
    # what lies in padding, NaN in these tests, must not reach the sums
    leaves = [getattr(inputs, name).double().nan_to_num(neginf=-torch.inf) for name in names]
    leaves = [x.requires_grad_() for x in leaves]
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    most = float(torch.tensor(inputs.log_scale_max))  # as float32, the kernels' type
    # not clamp, whose gradient at its limit differs between versions of torch
    scale = torch.where(leaves[3] <= most, leaves[3], most).exp()[:, None, None]
    z = normalize(q, dim=-1, eps=inputs.eps) @ normalize(k, dim=-1, eps=inputs.eps).mT * scale
    if inputs.bias is not None:
        z = z + leaves[4].repeat(q.shape[0] // leaves[4].shape[0], 1, 1, 1)
    mask = seen(inputs)
    z = z.masked_fill(~mask, -torch.inf)
    blind = ~(z > -torch.inf).any(-1, keepdim=True)
    # a row of -inf has no softmax; zeros there, which the mask takes out again
    p = z.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    out = (p @ v).transpose(1, 2)
    # of a row without keys: -inf, without the NaN of its derivative
    lse = z.masked_fill(blind, 0.0).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    outputs, upstream = [out], [inputs.dout.double()]
    if inputs.dlse is not None:
        outputs.append(lse)
        upstream.append(inputs.dlse.double())
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    results = {"out": out.detach(), "lse": lse.detach()}
    results |= {f"d{name}": x for name, x in zip(names, gradients, strict=True)}
    return results, noise(inputs, p.detach(), z.detach())


def noise(inputs: Problem, p: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Expected error of gradients for each unit of rounding, beside that of a result's own size.

    dz_ij = P_ij (dP_ij - delta_i) may be much smaller than its two parts, and delta comes from the
    output, which is rounded and made of rounded P: nearly one-hot rows have little gradient and all
    of this error. The gradient of the scale sums terms of both signs: its error is that of the
    terms. Norms of tensors; `[H]` for the scale.
    """
    eps = inputs.eps
    q, k, v, dout = (
        x.double().transpose(1, 2).nan_to_num() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    scale = inputs.log_scale.double().clamp(max=inputs.log_scale_max).exp()[:, None, None]
    unit_q, unit_k = normalize(q, dim=-1, eps=eps), normalize(k, dim=-1, eps=eps)
    dp = dout @ v.mT
    of_out = (dout * (p @ v)).square().sum(-1, keepdim=True)
    of_delta = (of_out + (p * dp).square().sum(-1, keepdim=True)).sqrt()
    dz = p * (dp - (p * dp).sum(-1, keepdim=True))
    cosines = scale * (unit_q @ unit_k.mT)
    of_scale = (dz * cosines).square().sum((0, 2, 3))
    of_scale = of_scale + (of_delta * (p * cosines).sum(-1, keepdim=True)).square().sum((0, 2, 3))
    to_q = scale * of_delta * (p @ unit_k) / q.norm(dim=-1, keepdim=True).clamp(min=eps)
    to_k = scale * (of_delta * p).square().sum(-2).sqrt()[..., None]
    of_bias = (of_delta * p).square()
    if inputs.bias is not None:
        of_bias = of_bias.view(-1, *inputs.bias.shape)
    return {
        "dq": to_q.norm(),
        "dk": (to_k / k.norm(dim=-1, keepdim=True).clamp(min=eps)).norm(),
        "dbias": of_bias.sum().sqrt(),
        "dlog_scale": of_scale.sqrt(),
    }


def misses(inputs: Problem, found: dict[str, Tensor]) -> list[str]:
    """Results that are further from float64 than rounding explains."""
    exact, expected = run(inputs)
    rounding = ROUNDING[inputs.q.dtype]
    finer = rounding / ROUNDING[torch.bfloat16]
    seen = exact["lse"].isfinite()
    if not torch.equal(found["lse"].isfinite(), seen):
        return ["other rows see nothing"]
    missed = []
    if seen.any() and float((found["lse"] - exact["lse"])[seen].abs().max()) > LSE:
        missed.append("lse")
    for name, limit in LIMITS.items():
        if name not in exact:
            continue
        error, size = found[name].double() - exact[name], exact[name]
        if name != "dlog_scale":  # which is compared head by head
            error, size = error.norm(), size.norm()
        allowed = finer * limit * size.abs() + NOISE * rounding * expected.get(
            name, torch.zeros(())
        )
        if bool((error.abs() > allowed + 1e-6).any()):
            missed.append(f"{name} is off by {error}, allowed {allowed}")
    return missed
