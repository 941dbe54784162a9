"""Noise processes of a diffusing model behind one interface: mix, answer, undo, step.

Time is an integer t from 0 to T: 0 is the data, T is (almost) pure noise. That is the direction of
DDPM; rectified flow is often written the other way round (t = 1 at the data). At time t

    noisy = signal_t clean + spoilt_t noise          answer = p_t clean + q_t noise

    cosine   signal^2 = abar(t) of Nichol & Dhariwal 2021 (arXiv:2102.09672), spoilt^2 = 1 - abar
    linear   signal = 1 - t / T, spoilt = t / T: rectified flow (Liu et al. 2022, arXiv:2209.03003)
    epsilon  p = 0, q = 1: the noise
    velocity derivative along the path: p = -spoilt, q = signal under cosine (Salimans & Ho 2022,
             arXiv:2202.00512), p = -1, q = 1 under linear, as it is usually written
    clean    p = 1, q = 0: the picture, which is smooth where noise is not, so that little models
             need not carry noise through (Li & He 2025, arXiv:2511.13720)

The noise alone says nothing of the picture where the signal is 0, so linear goes with velocity.
Two equations give clean and noise back from noisy and answer, so one step serves all: deterministic
(DDIM, arXiv:2010.02502; under linear it is Euler's), or ancestral (DDPM, arXiv:2006.11239, with the
lower of its two fixed variances), over any falling times.

N samples   C channels, h x w size of what is diffused
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mmtrain.nn.noise import normals, uniforms

_OFFSET = 0.008  # s of the cosine schedule
_MOST = 0.999  # a step's beta at most


class Path(Enum):
    """How noise grows with time."""

    cosine = "cosine"
    linear = "linear"  # rectified flow


class Answer(Enum):
    """What the model answers to a noisy picture."""

    epsilon = "epsilon"
    velocity = "velocity"
    clean = "clean"  # the picture


class Times(Enum):
    """How training draws times."""

    uniform = "uniform"
    logit_normal = "logit_normal"  # sigmoid of a standard normal: the middle is drawn most


class Solver(Enum):
    """How a picture is drawn."""

    ddpm = "ddpm"  # ancestral: fresh noise at every step
    ddim = "ddim"  # deterministic; under the linear path Euler's method


@dataclass(frozen=True)
class NoiseProcess:
    """Tables over t = 0 .. T, float64.

    Attributes:
        signal: share of the data in a noisy picture.
        spoilt: share of the noise.
        clean_share: p, of the data in the answer.
        noise_share: q, of the noise in the answer.
    """

    signal: Tensor
    spoilt: Tensor
    clean_share: Tensor
    noise_share: Tensor

    @classmethod
    def of(cls, path: Path, answer: Answer, steps: int) -> "NoiseProcess":
        """The process of a path over T = `steps`, and what is answered."""
        assert (path, answer) != (Path.linear, Answer.epsilon), "nothing is left of the data at T"
        time = torch.arange(steps + 1, dtype=torch.float64)
        if path is Path.cosine:
            kept = cosine_kept(steps)
            signal, spoilt = kept.sqrt(), (1 - kept).sqrt()
        else:
            spoilt = time / steps
            signal = 1 - spoilt
        one = torch.ones_like(time)
        if answer is Answer.epsilon:
            return cls(signal, spoilt, torch.zeros_like(time), one)
        if answer is Answer.clean:
            return cls(signal, spoilt, one, torch.zeros_like(time))
        if path is Path.linear:
            return cls(signal, spoilt, -one, one)
        return cls(signal, spoilt, -spoilt, signal)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.signal) - 1

    def mix(self, clean: Tensor, noise: Tensor, times_N: Tensor) -> Tensor:
        """Noisy pictures, then the answers that are wanted of them, `[N, 2C, h, w]`."""
        signal, spoilt, p, q = self._at(times_N, clean)
        return torch.cat([signal * clean + spoilt * noise, p * clean + q * noise], 1)

    def weights(self, times_N: Tensor, limit: float) -> Tensor:
        """How much the squared error of an answer counts at each time, float32 `[N]`.

        An error of the clean picture counts min(1 / spoilt^2, limit), which is min(1 + snr, limit)
        under cosine (Salimans & Ho 2022, section 4, cut off as in arXiv:2303.09556). Without the
        limit that is the plain error of the velocity on both paths.

        Args:
            times_N: of the pictures, above 0.
            limit: greatest weight of an error of the clean picture; 0 = every answer counts 1.
        """
        if not limit:
            return torch.ones(len(times_N))
        signal, spoilt, p, q = (
            table[times_N.cpu()]
            for table in (self.signal, self.spoilt, self.clean_share, self.noise_share)
        )
        per_answer = spoilt / (signal * q - spoilt * p)  # error of the clean picture
        return (spoilt.pow(-2).clamp(max=limit) * per_answer.square()).float()

    def undo(self, noisy: Tensor, answer: Tensor, times_N: Tensor) -> tuple[Tensor, Tensor]:
        """Clean pictures and noise that an answer amounts to, in float32.

        At t = T under cosine the signal is 5e-5: a guess of the clean picture from the noise is
        divided by it.
        """
        noisy, answer = noisy.float(), answer.float()
        signal, spoilt, p, q = self._at(times_N, noisy)
        scale = 1 / (signal * q - spoilt * p)
        return (q * noisy - spoilt * answer) * scale, (signal * answer - p * noisy) * scale

    def step(
        self,
        noisy: Tensor,
        answer: Tensor,
        times: tuple[int, int],
        *,
        limit: float = math.inf,
        fresh: Tensor | None = None,
    ) -> Tensor:
        """Noisy pictures at an earlier time.

        Args:
            noisy: `[N, C, h, w]` at the first of `times`.
            answer: of the model.
            times: now and then, then < now; 0 gives the clean picture.
            limit: greatest size of a number of the guessed clean picture.
            fresh: standard normal noise of an ancestral step; None for a deterministic one.
        """
        now, then = times
        here = torch.full((len(noisy),), now, device=noisy.device)
        clean, noise = self.undo(noisy, answer, here)
        clean = clean.clamp(-limit, limit)
        if math.isfinite(limit):  # the noise must still explain what is seen
            noise = (noisy.float() - float(self.signal[now]) * clean) / float(self.spoilt[now])
        signal, spoilt = float(self.signal[then]), float(self.spoilt[then])
        if fresh is None:
            return signal * clean + spoilt * noise
        spread = self._spread(now, then)
        left = math.sqrt(max(spoilt**2 - spread**2, 0.0))
        return signal * clean + left * noise + spread * fresh

    def _spread(self, now: int, then: int) -> float:
        """Deviation of the posterior of `then`, given `now` and the clean picture."""
        ratio = float(self.signal[now] / self.signal[then])
        spoilt_now, spoilt_then = float(self.spoilt[now]), float(self.spoilt[then])
        between = max(spoilt_now**2 - (ratio * spoilt_then) ** 2, 0.0)
        return spoilt_then / spoilt_now * math.sqrt(between)

    def _at(self, times_N: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tables = (self.signal, self.spoilt, self.clean_share, self.noise_share)
        signal, spoilt, p, q = (
            table[times_N.cpu()].to(like.device, torch.float32).view(-1, 1, 1, 1)
            for table in tables
        )
        return signal, spoilt, p, q


def cosine_kept(steps: int) -> Tensor:
    """Share of the data's variance kept at t = 0 .. T, float64; abar of the cosine schedule."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((time + _OFFSET) / (1 + _OFFSET) * math.pi / 2).square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=_MOST)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])


def draw_times(seeds_N: Tensor, limits_N: Tensor, steps: int, times: Times) -> Tensor:
    """A time of each image, int64 `[N]` in 1 .. limit, a function of its seed alone.

    Args:
        seeds_N: int64, one number an image.
        limits_N: int64, greatest time of each image.
        steps: T.
        times: how they are spread; under logit_normal a limit shrinks the scale.
    """
    if times is Times.uniform:
        share_N = uniforms(seeds_N, 1)[:, 0]
    else:
        share_N = normals(seeds_N, 1)[:, 0].double().sigmoid()
    return 1 + (share_N * limits_N).long().clamp(max=limits_N - 1).clamp(max=steps - 1)


def spaced_times(steps: int, count: int) -> list[int]:
    """`count` + 1 times from T down to 0, evenly spaced, for a solver of `count` steps."""
    assert 0 < count <= steps, (count, steps)
    return [round(steps * (count - index) / count) for index in range(count + 1)]
