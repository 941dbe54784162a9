"""Sizes of a VAE in training; the defaults are those of Transfusion's (arXiv:2408.11039, app. A).

Given there: 86M parameters, 8 channels, 8 pixels a latent, 256 pixels a side. Stable Diffusion's
widths with attention on the encoder's lowest level have 85.8M.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The patch discriminator (Isola et al. 2017, arXiv:1611.07004)."""

    channels: int = 64  # of its first convolution; doubled by each of the others, up to 8 times
    layers: int = 3  # convolutions that halve the picture
    norm_groups: int = 32
    from_step: int = 50000  # it learns, and is listened to, from this step on


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The `model:` section of the family `vae`."""

    size: int = 256  # pixels a side of the pictures
    latent_channels: int = 8
    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level; each but the last halves
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    encoder_attends: tuple[bool, ...] = (False, False, False, True)  # levels with self-attention
    decoder_attends: tuple[bool, ...] = (False, False, False, False)  # from high to low as well
    norm_groups: int = 32
    critic: CriticConfig = field(default_factory=CriticConfig)
    # weights of frozen networks whose features are compared; null = that loss is left out
    vgg: str | None = None  # torchvision's VGG-16: the loss `perceptual`
    lpips: str | None = None  # LPIPS's own weights of VGG's channels; null = all count alike
    moco: str | None = None  # MoCo-v2's ResNet-50: the loss `identity`

    @property
    def factor(self) -> int:
        """Pixels that a latent stands for, each way."""
        return 1 << (len(self.channels) - 1)
