"""Noise of the visual decoder: how pictures are mixed with it, and how they are drawn out of it.

The step tables and the solvers are diffusers' (DDPM, Ho et al. 2020, arXiv:2006.11239; PNDM,
arXiv:2202.09778; DDIM, arXiv:2010.02502; DPM-Solver++, arXiv:2211.01095). SD-1.5, and so Emu:
scaled_linear from 0.00085 to 0.012 over 1,000 steps, the noise is predicted.

N samples   C channels, h x w size of what is diffused
"""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
)
from torch import Tensor

from mmtrain.settings import DecoderConfig, Prediction, Scheduler


class Diffusion:
    """The noise of one recipe."""

    def __init__(self, config: DecoderConfig) -> None:
        """Make the step table."""
        self.steps = config.noise_steps
        self._prediction = config.prediction
        self._limit = config.snr_limit
        self._table = {
            "num_train_timesteps": config.noise_steps,
            "beta_schedule": config.beta_schedule.value,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "prediction_type": config.prediction.value,
        }
        self._kept: Tensor = DDPMScheduler(**self._table).alphas_cumprod

    def mix(self, clean: Tensor, noise: Tensor, timesteps_N: Tensor) -> Tensor:
        """Noisy pictures beside the answer that is wanted of them, `[N, 2C, h, w]`.

        The answer is the noise, v = sqrt(a) noise - sqrt(1 - a) clean (arXiv:2202.00512), or the
        clean picture.
        """
        kept = self._kept.to(clean.device)[timesteps_N].view(-1, 1, 1, 1)
        signal, spoilt = kept.sqrt(), (1 - kept).sqrt()
        noisy = signal * clean + spoilt * noise
        wanted = noise
        if self._prediction is Prediction.v_prediction:
            wanted = signal * noise - spoilt * clean
        elif self._prediction is Prediction.sample:
            wanted = clean
        return torch.cat([noisy, wanted], 1)

    def weights(self, timesteps_N: Tensor) -> Tensor:
        """How much the answer at each timestep counts, float32 `[N]`.

        An error of the clean picture counts min(1 + snr, limit) (Salimans & Ho 2022,
        arXiv:2202.00512, section 4, cut off as in arXiv:2303.09556); in terms of the noise that is
        divided by the snr, in terms of v by 1 + snr.
        """
        if not self._limit:
            return torch.ones(len(timesteps_N))
        kept = self._kept[timesteps_N.cpu()]
        snr = kept / (1 - kept)
        clean = (1 + snr).clamp(max=self._limit)
        if self._prediction is Prediction.sample:
            return clean
        return clean / (snr if self._prediction is Prediction.epsilon else 1 + snr)

    def solver(self, scheduler: Scheduler, steps: int, limited: Any = None) -> Any:
        """A diffusers scheduler, ready for `steps` steps.

        Args:
            scheduler: which one.
            steps: how many evaluations of the decoder (PNDM takes one more).
            limited: greatest value of a clean picture (1 for pixels); None for latents, which
                have no bounds. Where there is a bound, guesses are kept inside it.
        """
        made: Any
        if scheduler is Scheduler.pndm:
            table = {**self._table, "prediction_type": self._spoken(scheduler).value}
            made = PNDMScheduler(
                **table, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
            )
        elif scheduler is Scheduler.ddim:
            bounds = {"clip_sample": limited is not None, "clip_sample_range": limited or 1.0}
            made = DDIMScheduler(**self._table, **bounds, set_alpha_to_one=False, steps_offset=1)
        else:
            bounds = {"thresholding": limited is not None, "sample_max_value": limited or 1.0}
            made = DPMSolverMultistepScheduler(
                **self._table, **bounds, algorithm_type="dpmsolver++", solver_order=2
            )
        made.set_timesteps(steps)
        return made

    def _spoken(self, scheduler: Scheduler) -> Prediction:
        """The kind of answer a solver is given: PNDM of diffusers 0.39 takes no clean picture."""
        if scheduler is Scheduler.pndm and self._prediction is Prediction.sample:
            return Prediction.epsilon
        return self._prediction

    def spoken(
        self, scheduler: Scheduler, answer: Tensor, noisy: Tensor, timestep: Tensor
    ) -> Tensor:
        """The decoder's answer in the kind that a solver takes."""
        if self._spoken(scheduler) is self._prediction:
            return answer
        kept = self._kept.to(noisy.device)[timestep.to(noisy.device)]
        return (noisy - kept.sqrt() * answer) / (1 - kept).sqrt()
