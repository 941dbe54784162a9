"""Cosine attention in float64 by autograd, as the formula is printed.

Independent of `mmtrain.ops` on purpose: kernels and the torch reference are both held to it.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize


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


def run(inputs: Problem) -> dict[str, Tensor]:
    """Results and gradients from the inputs as they are rounded; rows without keys are zero."""
    names = ["q", "k", "v", "log_scale", *(["bias"] if inputs.bias is not None else [])]
    leaves = [getattr(inputs, name).double().requires_grad_() for name in names]
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    most = float(torch.tensor(inputs.log_scale_max))  # as float32, the kernels' type
    scale = leaves[3].clamp(max=most).exp()[:, None, None]
    z = normalize(q, dim=-1, eps=inputs.eps) @ normalize(k, dim=-1, eps=inputs.eps).mT * scale
    if inputs.bias is not None:
        z = z + leaves[4].repeat(q.shape[0] // leaves[4].shape[0], 1, 1, 1)
    mask = seen(inputs)
    z = z.masked_fill(~mask, -torch.inf)
    blind = ~(z > -torch.inf).any(-1, keepdim=True)
    # a row of -inf has no softmax; zeros there, which the mask takes out again
    p = z.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    out = (p @ v.masked_fill(~mask.any(2)[..., None], 0.0)).transpose(1, 2)
    # of a row without keys: -inf, without the NaN of its derivative
    lse = z.masked_fill(blind, 0.0).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    outputs, upstream = [out], [inputs.dout.double()]
    if inputs.dlse is not None:
        outputs.append(lse)
        upstream.append(inputs.dlse.double())
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    results = {"out": out.detach(), "lse": lse.detach()}
    return results | {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
