"""EVA-CLIP vision tower (Sun et al. 2023, arXiv:2303.15389; EVA-01-CLIP g/14) as Flow layers.

Pre-norm transformer over a class token and row-major patches, learned absolute positions, erf
GELU, LayerNorm with biases. Queries and values have a bias, keys have none (the release stores a
fused qkv weight and two biases). The tower's own final norm and head are no part of it: Emu reads
the raw output of the last block. Dropout and drop path are 0 in the release and absent here.

N images   S tokens of an image (class token first)   C width   H heads   K head width
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.nn.flow import Flow
from mmtrain.nn.mlp import Mlp
from mmtrain.ops.dense_attention import dense_attention


class PatchStem(nn.Module):
    """Pixels to tokens: patch convolution, class token, positions."""

    def __init__(self, *, tokens: int, patch_size: int, width: int) -> None:
        """Allocate for `tokens` tokens an image, the class token included."""
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, flow: Flow) -> Flow:
        """`hidden [N, 3, H, W]` to `[N, S, C]`, in the weights' type."""
        patches_NSC = self.patch(flow.hidden.to(self.cls.dtype)).flatten(2).transpose(1, 2)
        cls_N1C = self.cls.expand(patches_NSC.shape[0], 1, -1)
        return flow.with_hidden(torch.cat([cls_N1C, patches_NSC], 1) + self.position)


class VisionAttention(nn.Module):
    """Every token of an image sees the whole image."""

    def __init__(self, width: int, heads: int) -> None:
        """Allocate the projections; `heads` divides `width`."""
        super().__init__()
        self.head_width = width // heads
        self.enter = nn.Identity()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NSC: Tensor) -> Tensor:
        """`[N, S, C]` to `[N, S, C]`."""
        x_NSC = self.enter(x_NSC)
        q, k, v = (
            project(x_NSC).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        mixed = dense_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed)
        return out


class VisionBlock(nn.Module):
    """`x + attention(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, *, width: int, heads: int, mlp_width: int, norm_eps: float) -> None:
        """Allocate one block."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attention = VisionAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = Mlp(nn.Linear(width, mlp_width), nn.Linear(mlp_width, width), functional.gelu)

    def forward(self, flow: Flow) -> Flow:
        """`hidden [N, S, C]` to `[N, S, C]`."""
        x = flow.hidden
        x = x + self.attention(self.norm1(x))
        return flow.with_hidden(x + self.mlp(self.norm2(x)))


class VisionNorm(nn.LayerNorm):
    """A LayerNorm over the tower's output, as a Flow layer (Emu's `ln_visual`)."""

    def forward(self, flow: Flow) -> Flow:  # type: ignore[override]  # a layer, not a function
        """`hidden [N, S, C]` to `[N, S, C]`."""
        return flow.with_hidden(super().forward(flow.hidden))
