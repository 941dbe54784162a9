"""Drawing with a trained visual decoder: visual rows in, pictures out.

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) as released for Emu: answer =
null + guidance * (conditioned - null). Every picture starts from noise of its own seed and every
solver is deterministic, so neither the batch nor the order of prompts changes a picture.

B pictures   Q condition rows a picture   D their width   C channels, h x w size of what is diffused
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mmtrain.encoders.vae import Vae
from mmtrain.models.emu.decoder import DecoderUNet, UNetConfig
from mmtrain.models.emu.diffusion import Diffusion
from mmtrain.settings import DecoderConfig, Scheduler

_BATCH = 16  # pictures drawn at a time


@dataclass(frozen=True)
class EmuDrawer:
    """A visual decoder on one device.

    Attributes:
        unet: the decoder, in evaluation mode.
        sizes: of the UNet.
        config: how it was trained: scale of the conditions, noise, null, defaults of drawing.
        vae: of latents; None when pixels are diffused.
    """

    unet: DecoderUNet
    sizes: UNetConfig
    config: DecoderConfig
    vae: Vae | None

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        found: torch.device = self.unet.conv_in.weight.device
        return found

    @torch.no_grad()
    def draw(
        self,
        embeddings_BQD: Tensor,
        *,
        null_QD: Tensor | None,
        scheduler: str,
        steps: int,
        guidance: float,
        seeds: Sequence[int],
    ) -> list[Image.Image]:
        """One picture for each embedding.

        Args:
            embeddings_BQD: as the frozen model writes them, not scaled.
            null_QD: what stands for no condition; None = zeros. Of use when `guidance` is not 1.
            scheduler: pndm, ddim or dpm.
            steps: of the scheduler.
            guidance: 1 = the conditioned answer alone.
            seeds: one a picture.
        """
        assert len(seeds) == len(embeddings_BQD), (len(seeds), len(embeddings_BQD))
        null_QD = torch.zeros_like(embeddings_BQD[0]) if null_QD is None else null_QD
        pictures: list[Image.Image] = []
        for start in range(0, len(seeds), _BATCH):
            told_BQD = embeddings_BQD[start : start + _BATCH].to(self.device).float()
            nothing_BQD = null_QD.to(self.device).float().expand_as(told_BQD)
            conditions = torch.cat([told_BQD, nothing_BQD]) * self.config.condition_scale
            noise = torch.stack([self._noise(seed) for seed in seeds[start : start + _BATCH]])
            solver = Solving(self, Scheduler(scheduler), steps, guidance)
            pictures += to_pictures(self._pixels(solver.run(noise, conditions)))
        return pictures

    def _noise(self, seed: int) -> Tensor:
        side = self.sizes.sample_size
        generator = torch.Generator().manual_seed(seed)  # of the host: the same on every device
        return torch.randn(self.sizes.sample_channels, side, side, generator=generator)

    def _pixels(self, clean: Tensor) -> Tensor:
        return clean if self.vae is None else self.vae.decode(clean)


@dataclass(frozen=True)
class Solving:
    """One way of going from noise to pictures."""

    drawer: EmuDrawer
    scheduler: Scheduler
    steps: int
    guidance: float

    def run(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Clean `[B, C, h, w]` of noise `[B, C, h, w]` and conditions, then nulls, `[2B, Q, D]`."""
        drawer = self.drawer
        limit = 1.0 if drawer.vae is None else None
        diffusion = Diffusion(drawer.config)
        solver = diffusion.solver(self.scheduler, self.steps, limit)
        x: Tensor = noise.to(drawer.device) * solver.init_noise_sigma
        guided = self.guidance != 1.0
        conditions = conditions if guided else conditions[: len(x)]
        for timestep in solver.timesteps:
            scaled = solver.scale_model_input(x, timestep)
            doubled = torch.cat([scaled, scaled]) if guided else scaled
            at = timestep.to(drawer.device).expand(len(doubled))
            answer = drawer.unet.predict(doubled, at, conditions).float()
            if guided:
                told, nothing = answer.chunk(2)
                answer = nothing + self.guidance * (told - nothing)
            answer = diffusion.spoken(self.scheduler, answer, scaled, timestep)
            x = solver.step(answer, timestep, x, return_dict=False)[0]
        return x


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """RGB pictures of pixels `[B, 3, S, S]` in -1..1."""
    bytes_BHW3 = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture.numpy()) for picture in bytes_BHW3.cpu()]
