"""The frozen autoencoder of a latent diffusion model: pixels to latents and back.

Diffusers' `AutoencoderKL`, read from its own folder and never trained (Rombach et al. 2022,
arXiv:2112.10752). Latents are multiplied by the scale in its config (0.18215 for SD-1.5), so that
they have about unit variance.

N pictures   S pixels a side   C latent channels   s = S / factor
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mmtrain.checkpoint.manifest import sampled_hash
from mmtrain.errors import ContentError, MissingError

_CONFIG = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_BATCH = 16  # pictures at a time: a 512 px picture takes about 1 GB of activations


@dataclass(frozen=True)
class VaeFacts:
    """What the config of a VAE folder says.

    Attributes:
        channels: C.
        factor: pixels a latent stands for, each way.
        scale: what latents are multiplied by.
    """

    channels: int
    factor: int
    scale: float


def read_facts(folder: Path) -> VaeFacts:
    """Sizes of a VAE without its weights.

    Raises:
        MissingError: no config or no weights.
        ContentError: the config is of another kind of model.
    """
    path = folder / _CONFIG
    if not path.is_file() or not any((folder / name).is_file() for name in _WEIGHTS):
        raise MissingError(
            f"{folder} is no VAE folder of diffusers; expected {_CONFIG} and {_WEIGHTS[0]}"
        )
    try:
        config = json.loads(path.read_text())
        return VaeFacts(
            channels=int(config["latent_channels"]),
            factor=2 ** (len(config["block_out_channels"]) - 1),
            scale=float(config.get("scaling_factor", 0.18215)),  # absent in early releases
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ContentError(f"{path} describes no AutoencoderKL ({error!r})") from error


def identity(folder: Path) -> str:
    """Hex hash by which a VAE is told from another."""
    files = [folder / name for name in (_CONFIG, *_WEIGHTS)]
    return sampled_hash([path for path in files if path.is_file()])


class Vae:
    """A frozen VAE on one device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Read it; nothing is fetched from anywhere.

        Raises:
            MissingError, ContentError: the folder is not there, or holds something else.
        """
        self.facts = read_facts(folder)
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        try:
            model: Any = AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ContentError(f"{folder}: the VAE cannot be loaded: {error}") from error
        self.device = device
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Mean and logarithm of the variance, `[N, 2C, s, s]`, of pixels `[N, 3, S, S]` in -1..1.

        Both are for scaled latents: `draw` and `mode` need no scale.
        """
        parts = []
        for chunk in torch.split(pixels, _BATCH):
            found = self._model.encode(chunk.to(self.device, self._model.dtype)).latent_dist
            scale = torch.tensor(self.facts.scale, device=self.device)
            mean, spread = found.mean * scale, found.logvar + 2 * scale.log()
            parts.append(torch.cat([mean, spread], 1).float())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` in about -1..1 of scaled latents `[N, C, s, s]`."""
        parts = [
            self._model.decode(
                chunk.to(self.device, self._model.dtype) / self.facts.scale, return_dict=False
            )[0].float()
            for chunk in torch.split(latents, _BATCH)
        ]
        return torch.cat(parts)


def mode(moments: Tensor) -> Tensor:
    """The likeliest latents `[N, C, s, s]`."""
    return moments.chunk(2, 1)[0]


def draw(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents `[N, C, s, s]` drawn with standard normal `noise`."""
    mean, spread = moments.chunk(2, 1)
    return mean + torch.exp(0.5 * spread) * noise
