"""Sizes of an Emu model; the defaults are the 14B release (baaivision/Emu, Emu1/models)."""

from dataclasses import dataclass, field

from mmtrain.nn.lora import LoraConfig
from mmtrain.nn.trunk import TrunkConfig


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """EVA-CLIP tower (eva_clip.py)."""

    image_size: int = 224  # pixels a side
    patch_size: int = 14
    layers: int = 40
    width: int = 1408
    heads: int = 16
    mlp_width: int = 6144  # int(1408 * 4.3637)
    norm_eps: float = 1e-6
    # of initial positions, as in EVA; a tower that starts from nothing learns places sooner when
    # they are as large as its patches (docs/losses.md)
    position_std: float = 0.02

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """Causal transformer (a T5 decoder stack over learned queries)."""

    queries: int = 32
    layers: int = 12
    width: int = 768
    heads: int = 12
    head_width: int = 64
    mlp_width: int = 3072
    relative_buckets: int = 32
    relative_distance: int = 128
    norm_eps: float = 1e-6
    query_std: float = 0.02  # of initial queries; larger ones part sooner, as for positions


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(TrunkConfig):
    """LLaMA trunk with a language head and a regression head; LLaMA 13B by default."""

    layers: int = 40
    width: int = 5120
    heads: int = 40
    mlp_width: int = 13824
    context: int = 2048  # longest document, in positions


@dataclass(frozen=True, kw_only=True)
class EmuConfig:
    """The `model:` section of an Emu recipe."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)  # beside linears of the trunk
