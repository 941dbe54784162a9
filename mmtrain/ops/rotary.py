"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), channels paired (k, k + R).

The pairing is that of the LLaMA release in Hugging Face form. Tables are float32: tables in
bfloat16 are off by up to 1.9 within 2,048 positions.
Written as one autograd function because its backward is the same turn by the opposite angle:
nothing but the tables is saved, and no `cat` or negation is materialised.

T tokens   H heads   K head width   R = K / 2
"""

from typing import Any

import torch
from torch import Tensor


def rotary_tables(positions_T: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, 1, R]` (float32) of each token's angles.

    Args:
        positions_T: integers, position of each token in its document.
        width: head width K.
        theta: base of the geometric series of wave lengths.
    """
    channel = torch.arange(0, width, 2, dtype=torch.int64, device=positions_T.device).float()
    angle_TR = positions_T.float()[:, None] * (1.0 / theta ** (channel / width))
    return angle_TR.cos()[:, None], angle_TR.sin()[:, None]


def rotate(x_THK: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Turn each channel pair of `x` by its token's angle; returns the type of `x`."""
    turned: Tensor = _Rotate.apply(x_THK, cos_T1R, sin_T1R)
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    wide = x.float()
    a, b = wide.chunk(2, -1)
    if torch.compiler.is_compiling():  # traces no results in views (2.14), and fuses this anyway
        sine = sign * sin
        return torch.cat([a * cos - b * sine, b * cos + a * sine], -1).to(x.dtype)
    out = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
    return out.to(x.dtype)
