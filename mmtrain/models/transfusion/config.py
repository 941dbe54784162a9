"""Sizes of a Transfusion model; the defaults are the 7B of arXiv:2408.11039 with linear edges."""

import math
from dataclasses import dataclass, field
from enum import Enum

from mmtrain.nn.diffusion import Answer, Path, Solver, Times
from mmtrain.nn.trunk import TrunkConfig


class Edge(Enum):
    """What stands between latents and trunk rows."""

    linear = "linear"
    unet = "unet"  # down blocks before the trunk, up blocks behind it, joined by their skips


class ImageAttention(Enum):
    """What a row of an image sees of its own image."""

    image = "image"  # all of it
    causal = "causal"  # what stands before it, as in text


class Positions(Enum):
    """Rotary positions of the rows of an image."""

    raster = "raster"  # one after another, as text
    shared = "shared"  # one for the whole image, whose lines and columns are told by learned tables


class Context(Enum):
    """What rows behind an image see of it in training; writing always sees the clean picture."""

    noised = "noised"  # its noised rows (published)
    # some first images of a document are clean and not learnt (Show-o2, arXiv:2506.15564)
    prefix_clean = "prefix_clean"
    # a clean copy beside every image, which alone is seen (BAGEL, arXiv:2505.14683)
    copies = "copies"


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Latents of an image, and how they become rows."""

    channels: int = 8  # of latents; 3 diffuses pixels
    size: int = 32  # latents (or pixels) a side
    factor: int = 8  # pixels that a latent stands for, each way; 1 = pixels are diffused
    patch: int = 2  # k: k x k latents are one row
    edge: Edge = Edge.linear
    # of learned tables of lines and columns, added to the rows of an image; null = none, as
    # published, where `positions` are those of a raster, and 0.02 where they are shared. Little
    # models do not learn from distances along the raster which squares lie side by side
    position_std: float | None = None
    attention: ImageAttention = ImageAttention.image
    positions: Positions = Positions.raster
    unet_channels: tuple[int, ...] = (576, 1152)  # of each level; each halves the size; log2(k) + 1
    unet_blocks: int = 2  # down a level; one more up
    unet_head_width: int = 64
    norm_groups: int = 32
    latents: str | None = None  # folder written by tools/encode_latents.py; null = made in the run
    vae: str | None = None  # diffusers folder of the frozen VAE; null = pixels are diffused
    # of each channel of the VAE's latents, which are normalised by them; empty = as recorded with
    # `latents`, else latents stay as the VAE makes them
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    @property
    def rows(self) -> int:
        """Trunk rows of an image."""
        return self.side**2

    @property
    def side(self) -> int:
        """Trunk rows of an image, each way."""
        return self.size // self.patch

    @property
    def tables_std(self) -> float | None:
        """Of the tables of lines and columns; None where there are none."""
        if self.position_std is None and self.positions is Positions.shared:
            return 0.02
        return self.position_std

    @property
    def values(self) -> int:
        """Numbers of a row's latents."""
        return self.channels * self.patch**2

    @property
    def levels(self) -> int:
        """Levels that a U-Net edge needs to reach the trunk's grid."""
        return int(math.log2(self.patch)) + 1


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How images are noised in training, and how they are drawn."""

    path: Path = Path.cosine
    answer: Answer = Answer.epsilon
    times: Times = Times.uniform
    # greatest weight of an error of the clean picture, where it would be 1 + its signal-to-noise
    # ratio (Min-SNR, arXiv:2303.09556); 0 = the answer's own error, as published
    snr_limit: float = 0.0
    steps: int = 1000  # T
    limit: int = 500  # greatest time of an image that is seen by text behind it
    context: Context = Context.noised
    all_noised: float = 0.3  # share of documents without a clean image, under prefix_clean
    drop: float = 0.1  # share of images that do not see what stands before them (guidance)
    # greatest size of a guessed clean latent while drawing: the cosine path divides by 5e-5 at T
    clean_limit: float = 5.0
    solver: Solver = Solver.ddpm
    solver_steps: int = 250
    guidance: float = 5.0  # unconditional + guidance * (conditional - unconditional)


@dataclass(frozen=True, kw_only=True)
class TransfusionConfig:
    """The `model:` section of a Transfusion recipe."""

    language: TrunkConfig = field(default_factory=TrunkConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    @property
    def copies(self) -> int:
        """Times that the rows of an image stand in a training sequence."""
        return 2 if self.noise.context is Context.copies else 1

    @property
    def group_rows(self) -> int:
        """Rows between the begin and end tokens of an image in a training sequence."""
        return self.copies * self.image.rows
