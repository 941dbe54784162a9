"""A VAE with its critic as one layer: pictures in, the unreduced losses of both out.

The autoencoder is diffusers' `AutoencoderKL`, unchanged in its names (Rombach et al. 2022,
arXiv:2112.10752). Autoencoder and critic learn in the same step and by the same optimizer: the
autoencoder's term sees the critic with weights that get no gradient, the critic's term sees
pictures that get none. That is what two optimizers in turn do when both look at the weights from
before the step.

N pictures   S pixels a side   C latent channels, h x w size of latents
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.encoders.features import FeatureDistance, moco_distance, vgg_distance
from mmtrain.models.spec import Layer
from mmtrain.models.vae.config import CriticConfig, VaeConfig
from mmtrain.nn.flow import Flow
from mmtrain.nn.noise import mix, normals, seed_of

LAYER = "vae"
SEEDS = "seeds"  # field `[N]`: a number of each picture, which its latent is drawn by
JUDGED = "judged"  # field `[1]`: 1 where the critic takes part in the step, else 0
FIELDS = (SEEDS, JUDGED)
L1, PERCEPTUAL, IDENTITY, KL = "l1", "perceptual", "identity", "kl"
ADVERSARIAL, CRITIC = "adversarial", "critic"
LOSSES = (L1, PERCEPTUAL, IDENTITY, KL, ADVERSARIAL, CRITIC)
_LATENT = seed_of("vae", "latent")


class PatchCritic(nn.Sequential):
    """Convolutions that say of every patch how real it looks (arXiv:1611.07004, section 6.1.2).

    Normalised by groups of channels: batch statistics would depend on the layout of ranks.
    """

    def __init__(self, config: CriticConfig) -> None:
        """Allocate it."""
        widths = [config.channels * min(2**level, 8) for level in range(config.layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (inputs, width) in enumerate(pairwise(widths), 1):
            stride = 2 if level < config.layers else 1
            parts += [
                nn.Conv2d(inputs, width, 4, stride, 1),
                nn.GroupNorm(config.norm_groups, width),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))


class VaeWithCritic(nn.Module):
    """Autoencoder, critic, and the frozen networks that compare pictures."""

    def __init__(self, config: VaeConfig) -> None:
        """Allocate what is trained; frozen networks are read when they are first asked for."""
        super().__init__()
        self.config = config
        self.autoencoder: Any = build_autoencoder(config)
        self.critic = PatchCritic(config.critic)
        self._distances: dict[str, FeatureDistance] = {}

    def forward(self, flow: Flow) -> dict[str, Tensor]:
        """All losses of each picture.

        Args:
            flow: `hidden` `[N, 3, S, S]` in -1..1; fields `seeds` `[N]`, `judged` `[1]`.

        Returns:
            Float32 `[N]` each: `l1`, mean over pixel values; `perceptual` and `identity`, 0 without
            their network; `kl`, nats of a whole picture; `adversarial`, what the critic says
            against the reconstruction, and `critic`, its own hinge loss, 0 where it takes no part.
        """
        pixels = flow.hidden
        moments = self.moments(pixels).float()
        posterior = DiagonalGaussianDistribution(moments)
        noise = normals(mix(flow.fields[SEEDS] ^ _LATENT), posterior.mean[0].numel())
        latents = posterior.mean + posterior.std * noise.view_as(posterior.mean)
        found = self.decode(latents).float()
        adversarial, critic = self._judged(pixels, found, bool(flow.fields[JUDGED].any()))
        return {
            L1: (found - pixels).abs().mean((1, 2, 3)),
            PERCEPTUAL: self._distance(PERCEPTUAL, pixels, found),
            IDENTITY: self._distance(IDENTITY, pixels, found),
            KL: posterior.kl(),
            ADVERSARIAL: adversarial,
            CRITIC: critic,
        }

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log variance `[N, 2C, h, w]` of latents."""
        model = self.autoencoder
        out: Tensor = model.quant_conv(model.encoder(pixels.to(self._kind)))
        return out

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` of latents `[N, C, h, w]`."""
        model = self.autoencoder
        out: Tensor = model.decoder(model.post_quant_conv(latents.to(self._kind)))
        return out

    def judge(self, pixels: Tensor) -> Tensor:
        """How real each picture looks, float32 `[N, patches]`."""
        out: Tensor = self.critic(pixels.to(self._kind)).float().flatten(1)
        return out

    @property
    def _kind(self) -> torch.dtype:
        kind: torch.dtype = self.autoencoder.quant_conv.weight.dtype
        return kind

    def _judged(self, pixels: Tensor, found: Tensor, takes_part: bool) -> tuple[Tensor, Tensor]:
        """The autoencoder's term and the critic's (hinge loss, arXiv:1705.02894), `[N]` each."""
        if not takes_part:
            # one picture keeps its weights in the graph: gradients are 0, not missing
            nothing = 0.0 * self.judge(found[:1].detach()).sum()
            zero = torch.zeros(len(pixels), device=pixels.device)
            return zero, zero + nothing
        with _untrained(self.critic):
            against = -self.judge(found).mean(1)
        real, made = self.judge(torch.cat([pixels, found.detach()])).chunk(2)
        hinge = functional.relu(1 - real).mean(1) + functional.relu(1 + made).mean(1)
        return against, 0.5 * hinge

    def _distance(self, loss: str, pixels: Tensor, found: Tensor) -> Tensor:
        config = self.config
        path = config.vgg if loss == PERCEPTUAL else config.moco
        if path is None:
            return torch.zeros(len(pixels), device=pixels.device)
        if loss not in self._distances:
            if loss == IDENTITY:
                self._distances[loss] = moco_distance(Path(path))
            else:
                lpips = None if config.lpips is None else Path(config.lpips)
                self._distances[loss] = vgg_distance(Path(path), lpips)
        return self._distances[loss](pixels, found)


@contextmanager
def _untrained(module: nn.Module) -> Iterator[None]:
    """Calls of a module inside give no gradient to its parameters, only to its input."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def diffusers_config(config: VaeConfig) -> dict[str, Any]:
    """What diffusers calls the sizes; latents are not scaled (`scaling_factor` 1)."""
    down = {True: "AttnDownEncoderBlock2D", False: "DownEncoderBlock2D"}
    up = {True: "AttnUpDecoderBlock2D", False: "UpDecoderBlock2D"}
    return {
        "down_block_types": tuple(down[attends] for attends in config.encoder_attends),
        "up_block_types": tuple(up[attends] for attends in reversed(config.decoder_attends)),
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": config.size,
        "scaling_factor": 1.0,
    }


def build_autoencoder(config: VaeConfig) -> AutoencoderKL:
    """The autoencoder with torch's default weights, on the current default device."""
    return AutoencoderKL(**diffusers_config(config))


def layers(config: VaeConfig) -> list[Layer]:
    """The whole model: one layer."""
    return [Layer(LAYER, lambda: VaeWithCritic(config))]
