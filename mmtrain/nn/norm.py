"""Root-mean-square norm as a module: weight only, statistics in float32 (LLaMA, T5)."""

import torch
from torch import Tensor, nn

from mmtrain.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dim of `[..., D]`."""

    def __init__(self, width: int, eps: float) -> None:
        """Allocate the weight `[width]`, ones."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim."""
        return rms_norm(x, self.weight, self.eps)
