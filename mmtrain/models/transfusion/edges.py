"""Between latents and trunk rows: a linear edge, and a U-Net cut in two.

The paper (arXiv:2408.11039) gives parameter shares alone; they are met by a DiT time perceptron in
trunk width beside two linear layers, and by ADM blocks of 576 and 1,152 channels with attention on
both levels and skips (0.27B). An edge hands on rows, and beside them what its other half needs:
nothing, or the skips and the embedded time.

N images   C channels, h x w size of latents   n rows an image, D wide   S numbers beside an image
"""

import math
from collections.abc import Sequence

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.models.transfusion.config import Edge, ImageConfig
from mmtrain.nn.patches import patchify, unpatchify

_WAVES = 256  # of the sinusoids that tell the time


class TimeMlp(nn.Module):
    """Sinusoids of the time through two layers (Peebles & Xie 2022, arXiv:2212.09748)."""

    def __init__(self, waves: int, width: int) -> None:
        """Allocate `waves` -> `width` -> `width`."""
        super().__init__()
        self.waves = waves
        self.up = nn.Linear(waves, width)
        self.out = nn.Linear(width, width)

    def forward(self, times_N: Tensor) -> Tensor:
        """`[N]` to `[N, width]`."""
        waves = get_timestep_embedding(
            times_N, self.waves, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        out: Tensor = self.out(functional.silu(self.up(waves.to(self.up.weight.dtype))))
        return out


class LinearIn(nn.Module):
    """A square of latents times a matrix, plus the embedded time."""

    def __init__(self, config: ImageConfig, width: int) -> None:
        """Allocate for trunk rows of `width`."""
        super().__init__()
        self.patch = config.patch
        self.project = nn.Linear(config.values, width)
        self.time = TimeMlp(_WAVES, width)

    def forward(self, noisy: Tensor, times_N: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[N, C, h, w]` to rows `[N, n, D]`, and nothing beside them."""
        rows = self.project(patchify(noisy.to(self.project.weight.dtype), self.patch))
        rows = rows + self.time(times_N)[:, None]
        return rows, rows.new_zeros(len(rows), 0)


class LinearOut(nn.Module):
    """Trunk rows times a matrix; its first answer is 0."""

    def __init__(self, config: ImageConfig, width: int) -> None:
        """Allocate for trunk rows of `width`."""
        super().__init__()
        self.patch = config.patch
        self.project = nn.Linear(width, config.values)

    def forward(self, rows: Tensor, beside: Tensor) -> Tensor:
        """Rows `[N, n, D]` to an answer `[N, C, h, w]`."""
        return unpatchify(self.project(rows), self.patch)


class UnetIn(nn.Module):
    """The down half: residual blocks with attention on every level, then trunk width."""

    def __init__(self, config: ImageConfig, width: int) -> None:
        """Allocate for trunk rows of `width`."""
        super().__init__()
        first, told = config.unet_channels[0], 4 * config.unet_channels[0]
        self.time = TimeMlp(first, told)
        self.enter = nn.Conv2d(config.channels, first, 3, padding=1)
        self.down = nn.ModuleList()
        inputs = first
        for level, channels in enumerate(config.unet_channels):
            last = level == len(config.unet_channels) - 1
            self.down.append(
                AttnDownBlock2D(
                    in_channels=inputs,
                    out_channels=channels,
                    temb_channels=told,
                    num_layers=config.unet_blocks,
                    resnet_groups=config.norm_groups,
                    attention_head_dim=config.unet_head_width,
                    downsample_type=None if last else "conv",
                )
            )
            inputs = channels
        self.project = nn.Linear(inputs, width)

    def forward(self, noisy: Tensor, times_N: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[N, C, h, w]` to rows `[N, n, D]`; beside them skips and embedded time."""
        told = self.time(times_N)
        x = self.enter(noisy.to(self.enter.weight.dtype))
        skips = [x]
        for block in self.down:
            x, states = block(x, told)
            skips += states
        beside = torch.cat([told, *(skip.flatten(1) for skip in skips)], 1)
        return self.project(x.flatten(2).transpose(1, 2)), beside


class UnetOut(nn.Module):
    """The up half: what the trunk says, met by the skips of the down half."""

    def __init__(self, config: ImageConfig, width: int) -> None:
        """Allocate for trunk rows of `width`."""
        super().__init__()
        levels = config.unet_channels
        self.told = 4 * levels[0]
        self.shapes = skip_shapes(config)
        self.project = nn.Linear(width, levels[-1])
        self.up = nn.ModuleList()
        before = levels[-1]
        for level in reversed(range(len(levels))):
            self.up.append(
                AttnUpBlock2D(
                    in_channels=levels[max(level - 1, 0)],
                    out_channels=levels[level],
                    prev_output_channel=before,
                    temb_channels=self.told,
                    num_layers=config.unet_blocks + 1,
                    resnet_groups=config.norm_groups,
                    attention_head_dim=config.unet_head_width,
                    upsample_type="conv" if level else None,
                )
            )
            before = levels[level]
        self.norm = nn.GroupNorm(config.norm_groups, levels[0])
        self.leave = nn.Conv2d(levels[0], config.channels, 3, padding=1)

    def forward(self, rows: Tensor, beside: Tensor) -> Tensor:
        """Rows `[N, n, D]` and what the down half left to an answer `[N, C, h, w]`."""
        told, *flat = torch.split(beside, [self.told, *map(math.prod, self.shapes)], 1)
        skips = [skip.view(-1, *shape) for skip, shape in zip(flat, self.shapes, strict=True)]
        side = math.isqrt(rows.shape[1])
        x = self.project(rows).transpose(1, 2).reshape(len(rows), -1, side, side)
        count = len(self.shapes) // len(self.up)
        for block in self.up:
            x = block(x, tuple(skips[-count:]), told)
            skips = skips[:-count]
        out: Tensor = self.leave(functional.silu(self.norm(x)))
        return out


def skip_shapes(config: ImageConfig) -> list[tuple[int, int, int]]:
    """Channels and size of every skip, in the order of the down half."""
    side, levels = config.size, config.unet_channels
    shapes = [(levels[0], side, side)]
    for level, channels in enumerate(levels):
        shapes += [(channels, side, side)] * config.unet_blocks
        if level < len(levels) - 1:
            side //= 2
            shapes.append((channels, side, side))
    return shapes


def beside_numbers(config: ImageConfig) -> int:
    """S: numbers that cross from one half of the edge to the other."""
    if config.edge is Edge.linear:
        return 0
    return 4 * config.unet_channels[0] + sum(map(math.prod, skip_shapes(config)))


def edge_in(config: ImageConfig, width: int) -> nn.Module:
    """The half before the trunk."""
    return LinearIn(config, width) if config.edge is Edge.linear else UnetIn(config, width)


def edge_out(config: ImageConfig, width: int) -> nn.Module:
    """The half behind the trunk."""
    return LinearOut(config, width) if config.edge is Edge.linear else UnetOut(config, width)


def as_rows(parts: Sequence[Tensor], width: int) -> Tensor:
    """Numbers of each image `[N, ...]` as rows `[N r, D]`, filled up with 0."""
    flat = torch.cat([part.flatten(1) for part in parts], 1)
    rows = rows_of(flat.shape[1], width)
    return functional.pad(flat, (0, rows * width - flat.shape[1])).view(-1, width)


def rows_of(numbers: int, width: int) -> int:
    """r: rows of `width` that hold so many numbers."""
    return -(-numbers // width)
