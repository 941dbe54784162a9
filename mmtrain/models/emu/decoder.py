"""The visual decoder of Emu: a UNet that is told by the visual rows a frozen Emu writes.

Diffusers' `UNet2DConditionModel`, unchanged in its names, so that Stable Diffusion's folders go in
and out by renaming alone (arXiv:2307.05222, section 2.3: SD-1.5 with its cross-attention keys and
values made anew for 5120-wide rows). The whole UNet is one layer: it trains data parallel, with
ZeRO 0 to 3. What diffusion is, it does not know: it gets a noisy picture and what it should have
answered, and returns one squared error a sample (`data.pairs` draws, `diffusion` mixes).

Cost: 968,146,884 parameters at SD-1.5's sizes; 0.8 TFLOP forward for 64 x 64 latents.

N samples   Q condition rows a sample   D their width   C channels, h x w size of what is diffused
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import Problem
from mmtrain.layout.plan import TensorPlan
from mmtrain.models.spec import BatchShape, Layer, ModelSpec
from mmtrain.nn.flow import Flow
from mmtrain.nn.init import InitialRules, torch_defaults
from mmtrain.nn.products import flops_of

LAYER = "unet"
LOSS = "noise"
FIELDS = ("timesteps",)
_UNBOUNDED = 1 << 30


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The `model:` section of the decoder phase; the defaults are SD-1.5 under Emu's rows."""

    sample_channels: int = 4  # of latents; 3 diffuses pixels
    sample_size: int = 64  # latents (or pixels) a side
    patch: int = 1  # a side of the squares that are one position of the UNet; 1 = as in SD-1.5
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level; each halves the size
    attends: tuple[bool, ...] = (True, True, True, False)  # levels with cross-attention
    layers_per_block: int = 2
    heads: int = 8  # of every attention
    norm_groups: int = 32
    conditions: int = 32  # rows of the frozen model for one picture
    condition_width: int = 5120


class DecoderUNet(UNet2DConditionModel):  # type: ignore[misc]
    """The whole decoder as one layer of the fold."""

    def forward(self, flow: Flow) -> dict[str, Tensor]:
        """Mean squared error of each sample.

        Args:
            flow: `hidden` `[N, 2C, h, w]`: the noisy picture, then the answer that is wanted of
                it; `carried` `[N * Q, D]`: conditions; field `timesteps` `[N]`.

        Returns:
            `{"noise": float32 [N]}`, mean over C, h and w.
        """
        noisy, wanted = flow.hidden.chunk(2, 1)
        assert flow.carried is not None
        conditions_NQD = flow.carried.view(len(noisy), -1, flow.carried.shape[-1])
        answer = self.predict(noisy, flow.fields["timesteps"], conditions_NQD)
        return {LOSS: (answer.float() - wanted.float()).square().mean((1, 2, 3))}

    def predict(self, noisy: Tensor, timesteps_N: Tensor, conditions_NQD: Tensor) -> Tensor:
        """The answer `[N, C, h, w]` to noisy pictures, in the precision of the weights."""
        kind = self.conv_in.weight.dtype
        # a patch of 1 leaves everything in place
        patch = math.isqrt(self.conv_in.in_channels // noisy.shape[1])
        out: Tensor = super().forward(
            pixel_unshuffle(noisy.to(kind), patch),
            timesteps_N,
            encoder_hidden_states=conditions_NQD.to(kind),
            return_dict=False,
        )[0]
        return pixel_shuffle(out, patch)


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """What diffusers calls the sizes of a UNet; what is not named keeps its SD-1.5 default."""
    down = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
    up = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
    return {
        "sample_size": config.sample_size // config.patch,
        "in_channels": config.sample_channels * config.patch**2,
        "out_channels": config.sample_channels * config.patch**2,
        "down_block_types": tuple(down[attends] for attends in config.attends),
        "up_block_types": tuple(up[attends] for attends in reversed(config.attends)),
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": config.heads,  # diffusers' name; in SD-1.5 it is the number of heads
        "norm_num_groups": config.norm_groups,
        "cross_attention_dim": config.condition_width,
    }


def build_unet(config: UNetConfig) -> DecoderUNet:
    """The UNet with torch's default weights, on the current default device."""
    return DecoderUNet(**diffusers_config(config))


def layers(config: UNetConfig) -> list[Layer]:
    """The whole model: one layer."""
    return [Layer(LAYER, lambda: build_unet(config))]


@lru_cache(maxsize=8)
def initial(config: UNetConfig) -> InitialRules:
    """How diffusers draws each parameter: torch's defaults."""
    with torch.device("meta"):
        return torch_defaults(build_unet(config), LAYER)


def flops(config: UNetConfig, shape: BatchShape) -> list[float]:
    """Forward operations of the UNet on `shape.images` samples."""
    return [shape.images * _sample_flops(config)]


@lru_cache(maxsize=8)
def _sample_flops(config: UNetConfig) -> float:
    side = config.sample_size

    def run(unet: DecoderUNet) -> Tensor:
        return unet.predict(
            torch.empty(1, config.sample_channels, side, side),
            torch.zeros(1, dtype=torch.int64),
            torch.empty(1, config.conditions, config.condition_width),
        )

    return flops_of(lambda: build_unet(config), run)


def problems(config: UNetConfig, tensor: int) -> Iterator[Problem]:
    """Faults of the `model:` section; tensor ranks are refused elsewhere."""
    for key, value in vars(config).items():
        if isinstance(value, int) and value <= 0:
            yield Problem(f"model.{key}", f"found {value}; it must be positive")
    if not config.channels or min(config.channels) <= 0:
        yield Problem("model.channels", f"found {list(config.channels)}; wanted: positive numbers")
        return
    if len(config.attends) != len(config.channels):
        yield Problem(
            "model.attends",
            f"{len(config.attends)} levels, model.channels has {len(config.channels)}; say true or "
            "false for each level",
        )
    for key, divisor in (("norm_groups", config.norm_groups), ("heads", config.heads)):
        odd = [width for width in config.channels if divisor > 0 and width % divisor]
        if odd:
            common = math.gcd(*config.channels)
            yield Problem(
                f"model.{key}",
                f"{divisor} does not divide model.channels {odd}; use a divisor of {common}",
            )
    halved = config.patch * 2 ** (len(config.channels) - 1)
    if min(config.sample_size, config.patch) > 0 and config.sample_size % halved:
        yield Problem(
            "model.sample_size",
            f"{config.sample_size} in patches of model.patch = {config.patch} cannot be halved "
            f"{len(config.channels) - 1} times, once for every level of model.channels but the "
            f"last; use a multiple of {halved}",
        )


def sequence(config: UNetConfig, ids: Mapping[str, int]) -> SequenceFormat:
    """How a picture and its text count as a row of the frozen model."""
    return SequenceFormat.of(
        ids,
        visual_tokens=config.conditions,
        image_size=config.sample_size,
    )


EMU_DECODER = ModelSpec(
    name="emu",
    config_type=UNetConfig,
    problems=problems,
    layers=layers,
    plan=TensorPlan({}),
    initial=initial,
    flops=flops,
    losses=(LOSS,),
    fields=FIELDS,
    sequence=sequence,
    # the frozen model's own limits are held by its recipe, which is checked beside this one
    context=lambda config: _UNBOUNDED,
    vocabulary=lambda config: _UNBOUNDED,
)
