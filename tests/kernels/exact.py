"""Norm and rotary embedding of queries and keys in float64, as the formulas are printed.

Independent of `mmtrain.ops` on purpose: kernels and the torch reference are both held to it.
"""

from dataclasses import replace

import torch
from emulated import Inputs, Outputs
from torch import Tensor


def normalise(x: Tensor, inputs: Inputs, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm without its per-head scale."""
    eps, mean = inputs.eps, x.mean(-1, keepdim=True)
    match inputs.norm:
        case "rms":
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        case "layer":
            x = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
        case "l2":
            x = torch.nn.functional.normalize(x, dim=-1, eps=eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rotate(n: Tensor, inputs: Inputs) -> Tensor:
    """The rotary embedding by rows of the tables."""
    if inputs.pairing == "none":
        return n
    assert inputs.cosine is not None and inputs.sine is not None
    rows = inputs.positions
    if rows is None:
        rows = torch.arange(n.shape[0]) % inputs.cosine.shape[0]
    c, s = (table[rows.long()][:, None] for table in (inputs.cosine, inputs.sine))
    if inputs.pairing == "halves":
        a, b = n.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)
    a, b = n[..., 0::2], n[..., 1::2]
    return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)


def run(inputs: Inputs) -> tuple[Outputs, Outputs]:
    """Outputs and gradients in float64, from the inputs as they are rounded."""
    double = replace(
        inputs,
        cosine=None if inputs.cosine is None else inputs.cosine.double(),
        sine=None if inputs.sine is None else inputs.sine.double(),
    )
    found = (Outputs(), Outputs())
    for i in range(2):
        leaves = {
            name: value.double().requires_grad_()
            for name in ("x", "weight", "bias", "scale")
            if (value := getattr(inputs, name)[i]) is not None
        }
        n = normalise(leaves["x"], double, leaves.get("weight"), leaves.get("bias"))
        if "scale" in leaves:
            n = n * leaves["scale"][:, None]
        y = rotate(n, double)
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy[i].double())
        names = ["dx", *(f"d_{name}" for name in leaves if name != "x")]
        found[i].values = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
    return found
