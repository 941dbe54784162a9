"""From pixels to what is diffused, and back.

N images   C channels, h x w size of latents   S pixels a side
"""

from pathlib import Path

import torch
from torch import Tensor

from mmtrain.encoders import vae as vaes
from mmtrain.encoders.vae import Vae
from mmtrain.errors import ContentError
from mmtrain.models.transfusion.config import TransfusionConfig
from mmtrain.nn.noise import normals


class Latents:
    """From pixels to what is diffused: by a frozen VAE, or as they are."""

    def __init__(self, config: TransfusionConfig, device: torch.device) -> None:
        """Nothing is read yet."""
        self.image, self.device = config.image, device
        self._vae: Vae | None = None
        self._told: Tensor | None = None  # mean and deviation of each channel
        if config.image.latent_std:
            told = [config.image.latent_mean, config.image.latent_std]
            self._told = torch.tensor(told, device=device).view(2, 1, -1, 1, 1)

    @property
    def vae(self) -> Vae | None:
        """The frozen VAE, read when it is first asked for; None when pixels are diffused.

        Raises:
            MissingError, ContentError: it is not there, or makes latents of another form.
        """
        if self._vae is None and self.image.vae is not None:
            self._vae = Vae(Path(self.image.vae), self.device)
            facts, image = self._vae.facts, self.image
            if (facts.channels, facts.factor) != (image.channels, image.factor):
                raise ContentError(
                    f"{image.vae}: makes {facts.channels} channels, {facts.factor} pixels a "
                    f"latent; model.image.channels is {image.channels} and model.image.factor "
                    f"{image.factor}: set them, or name another VAE"
                )
        return self._vae

    def of(self, pixels: Tensor, seeds_N: Tensor) -> Tensor:
        """Clean latents `[N, C, h, w]`, drawn from the posterior by a seed an image.

        Where latents were made before, their moments stand where pixels would.
        """
        if self.image.latents is not None:
            moments = pixels.to(self.device)
        elif self.vae is None:
            return pixels
        else:
            moments = self.moments(pixels)
        moments = self._normalised(moments)
        spread = normals(seeds_N, moments[0].numel() // 2)
        return vaes.draw(moments, spread.to(moments.device).view_as(vaes.mode(moments)))

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log variance `[N, 2C, h, w]` of the VAE's posterior."""
        assert self.vae is not None, "pixels are their own latents"
        return self.vae.encode(pixels)

    def likeliest(self, pixels: Tensor) -> Tensor:
        """Clean latents `[N, C, h, w]`, the mode of the posterior."""
        return pixels if self.vae is None else vaes.mode(self._normalised(self.vae.encode(pixels)))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` in about -1..1."""
        if self.vae is None:
            return latents
        if self._told is not None:
            latents = latents * self._told[1] + self._told[0]
        return self.vae.decode(latents)

    def _normalised(self, moments: Tensor) -> Tensor:
        """Moments of latents with mean 0 and deviation 1, where their statistics are known."""
        if self._told is None:
            return moments
        (mean, std), (found, spread) = self._told, moments.chunk(2, 1)
        return torch.cat([(found - mean) / std, spread - 2 * std.log()], 1)
