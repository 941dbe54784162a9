"""Sizes of an Emu, or of a part of one, read off the shapes of its tensors.

Widths come from vectors, which have no dims to swap, and other sizes from counts of numbers; where
every block votes, the majority decides. So a tensor with swapped dims is found to be wrong, and
does not make all others look wrong. Head counts leave no trace in shapes: they are known from a
configuration, from a stored rotary buffer, or guessed and named as guesses.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mmtrain.models.emu.config import CausalConfig, EmuConfig, LanguageConfig, VisionConfig
from mmtrain.models.emu.spec import EMU
from mmtrain.nn.lora import LoraConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH = 128  # of every LLaMA
VISION_HEADS = {1408: 16}  # of EVA-CLIP g by its width (head width 88)
TRUNK = ("embed", "blocks", "head")
TOWER = ("vision",)


@dataclass(frozen=True)
class Sizes:
    """What shapes say.

    Attributes:
        config: a model of these sizes; sections that are not there have their defaults.
        sections: names of the sections that are there.
        guesses: dotted keys of the config that shapes do not tell.
    """

    config: EmuConfig
    sections: tuple[str, ...]
    guesses: frozenset[str] = field(default_factory=frozenset)

    def described(self) -> dict[str, Any]:
        """The `model:` section as far as it is known."""
        return {
            name: {
                key: getattr(value, "value", value)
                for key, value in asdict(getattr(self.config, name)).items()
                if f"{name}.{key}" not in self.guesses
            }
            for name in self.sections
        }


def sizes_of(shapes: Shapes, head_width: int | None = None) -> Sizes:
    """Read sizes off canonical names and shapes.

    Args:
        shapes: of the whole model, of its trunk or of its vision tower.
        head_width: of the trunk, where it is known.

    Raises:
        KeyError: a tensor that tells a size is not there; the message is its name.
    """
    sections: dict[str, Any] = {}
    guesses: set[str] = set()
    if any(name.startswith("vision.") for name in shapes):
        sections["vision"] = _vision(shapes, guesses)
    if any(name.startswith("causal.") for name in shapes):
        sections["causal"] = _causal(shapes)
    if any(name.startswith("blocks.") for name in shapes):
        sections["language"] = _language(shapes, head_width, guesses)
    found = tuple(sections)
    sections["lora"] = lora_of(shapes)
    return Sizes(EmuConfig(**sections), found, frozenset(guesses))


def expected_shapes(config: EmuConfig, parts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the named parts (first component of a layer's name)."""
    out, wanted = {}, set(parts)
    for layer in EMU.layers(config):
        if layer.name.partition(".")[0] not in wanted:
            continue
        with torch.device("meta"):
            module = layer.build()
        out.update({f"{layer.name}.{n}": tuple(p.shape) for n, p in module.named_parameters()})
    return out


def _vision(shapes: Shapes, guesses: set[str]) -> VisionConfig:
    block = r"vision\.blocks\.\d+\."
    width = _majority(shapes, rf"{block}norm1\.weight")
    patch = math.isqrt(_count(shapes, "vision.stem.patch.weight") // (3 * width))
    tokens = _count(shapes, "vision.stem.position") // width
    if width not in VISION_HEADS:
        guesses.add("vision.heads")
    return VisionConfig(
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        layers=_layers(shapes, r"vision\.blocks\.(\d+)\..+"),
        width=width,
        heads=VISION_HEADS.get(width, 1),
        mlp_width=_majority(shapes, rf"{block}mlp\.up\.weight") // width,
    )


def _causal(shapes: Shapes) -> CausalConfig:
    block = r"causal\.blocks\.\d+\."
    width = _majority(shapes, rf"{block}norm1\.weight")
    inner = _majority(shapes, rf"{block}self_attention\.q\.weight") // width
    buckets, heads = shapes["causal.relative_bias"]
    return CausalConfig(
        queries=_count(shapes, "causal.queries") // width,
        layers=_layers(shapes, r"causal\.blocks\.(\d+)\..+"),
        width=width,
        heads=heads,
        head_width=inner // heads,
        mlp_width=_majority(shapes, rf"{block}mlp\.up\.weight") // width,
        relative_buckets=buckets,
    )


def _language(shapes: Shapes, head_width: int | None, guesses: set[str]) -> LanguageConfig:
    block = r"blocks\.\d+\."
    width = _majority(shapes, rf"{block}norm1\.weight")
    keys = _majority(shapes, rf"{block}attention\.k\.weight") // width
    if head_width is None:
        guesses |= {"language.heads", "language.kv_heads"}
        head_width = HEAD_WIDTH if keys % HEAD_WIDTH == 0 else math.gcd(width, keys)
    heads, key_heads = width // head_width, keys // head_width
    return LanguageConfig(
        vocabulary=_count(shapes, "embed.tokens.weight") // width,
        layers=_layers(shapes, r"blocks\.(\d+)\..+"),
        width=width,
        heads=heads,
        kv_heads=0 if key_heads == heads else key_heads,
        mlp_width=_majority(shapes, rf"{block}mlp\.gate\.weight") // width,
    )


def lora_of(shapes: Shapes) -> LoraConfig:
    """Rank and targets of the adapters among these names; A is [rank, inputs]."""
    pattern = r"blocks\.\d+\.\w+\.(\w+)_lora\.a\.weight"
    found = {name: hit[1] for name in shapes if (hit := re.fullmatch(pattern, name))}
    if not found:
        return LoraConfig()
    order = ("q", "k", "v", "out", "gate", "up", "down")
    targets = tuple(name for name in order if name in found.values())
    ranks = Counter(min(shapes[name]) for name in found)
    return LoraConfig(rank=ranks.most_common(1)[0][0], targets=targets)


def _count(shapes: Shapes, name: str) -> int:
    return math.prod(shapes[name])


def _majority(shapes: Shapes, pattern: str) -> int:
    """The count of numbers that most tensors of a pattern have."""
    counts = Counter(math.prod(s) for name, s in shapes.items() if re.fullmatch(pattern, name))
    if not counts:
        raise KeyError(pattern.replace(r"\d+", "N").replace("\\", ""))
    return counts.most_common(1)[0][0]


def _layers(shapes: Shapes, pattern: str) -> int:
    hits = (re.fullmatch(pattern, name) for name in shapes)
    return 1 + max(int(hit[1]) for hit in hits if hit)
