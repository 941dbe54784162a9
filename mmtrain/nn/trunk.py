"""The decoder-only trunk that families share: sizes, blocks, tensor plan, first weights, cost.

LLaMA (Touvron et al. 2023, arXiv:2302.13971): pre-norm blocks of rotary self-attention over
intervals of keys and a gated perceptron, no biases. Queries and keys may be normalised per head,
keys shared by groups of heads, logits cosines instead of scaled products.

T tokens   D width
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn

from mmtrain.errors import Problem
from mmtrain.layout.plan import Cut
from mmtrain.nn.attention import Cosine, DotProduct, PackedAttention
from mmtrain.nn.block import TransformerBlock
from mmtrain.nn.init import InitialRules, constant, normal
from mmtrain.nn.lora import LoraConfig, adapters
from mmtrain.nn.mlp import GatedMlp
from mmtrain.nn.norm import RMSNorm


class QkNorm(Enum):
    """Normalisation of queries and keys per head, before the rotary embedding."""

    none = "none"
    rms = "rms"
    layer = "layer"


class AttentionKind(Enum):
    """Logits are scaled dot products, or cosines times a learned scale per head."""

    dot = "dot"
    cosine = "cosine"


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Sizes of a trunk; the defaults are those of LLaMA 7B with four special tokens."""

    vocabulary: int = 32004  # special tokens included
    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 0  # heads of keys and values, each shared by heads / kv_heads; 0 = heads
    mlp_width: int = 11008
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    context: int = 4096  # longest document, in positions
    qk_norm: QkNorm = QkNorm.none
    attention: AttentionKind = AttentionKind.dot

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads


# the trunk's rows of a tensor plan; a family writes its own for what stands around them
TRUNK_PLAN = {
    "embed.tokens": Cut.VOCAB,
    "embed.scatter": Cut.SCATTER_ROWS,
    "blocks.*.{norm1,norm2}.weight": Cut.ROWWISE,
    "blocks.*.{attention,mlp}.enter": Cut.ENTER_ROWS,
    "blocks.*.attention.{q,k,v}": Cut.COLUMN,
    "blocks.*.attention.{q_norm,k_norm}.{weight,bias}": Cut.SHARED,
    "blocks.*.attention.similarity.log_scale": Cut.HEADS_0,
    "blocks.*.attention.out": Cut.ROW_SCATTERED,
    "blocks.*.mlp.{gate,up}": Cut.COLUMN,
    "blocks.*.mlp.down": Cut.ROW_SCATTERED,
}
HEAD_PLAN = {
    "head.norm.weight": Cut.ROWWISE,
    "head.enter": Cut.ENTER_ROWS,
    "head.unembed": Cut.VOCAB_COLUMN,
    "head.cross_entropy": Cut.VOCAB_LOSS,
}


def trunk_block(config: TrunkConfig, lora: LoraConfig, name: str) -> TransformerBlock:
    """One block, with torch's default weights.

    Args:
        config: sizes.
        lora: adapters beside its linears.
        name: canonical name, which seeds the adapters' dropout.
    """
    head_width = config.width // config.heads
    norm = _QK_NORMS[config.qk_norm]
    return TransformerBlock(
        norm1=RMSNorm(config.width, config.norm_eps),
        attention=PackedAttention(
            config.width,
            config.heads,
            kv_heads=config.key_heads,
            q_norm=norm(head_width, config.norm_eps),
            k_norm=norm(head_width, config.norm_eps),
            similarity=_SIMILARITIES[config.attention](config.heads),
            beside=adapters(lora, f"{name}.attention"),
        ),
        norm2=RMSNorm(config.width, config.norm_eps),
        mlp=GatedMlp(config.width, config.mlp_width, adapters(lora, f"{name}.mlp")),
        rope_theta=config.rope_theta,
    )


def trunk_rules() -> InitialRules:
    """LLaMA: normal 0.02; tables, blocks and language head."""
    draw = normal(0.02)
    return [
        ("embed.tokens.weight", draw),
        ("blocks.*.{norm1,norm2}.weight", constant(1.0)),
        ("blocks.*.attention.{q,k,v,out}.weight", draw),
        ("blocks.*.attention.{q_norm,k_norm}.weight", constant(1.0)),
        ("blocks.*.attention.{q_norm,k_norm}.bias", constant(0.0)),
        ("blocks.*.attention.similarity.log_scale", constant(math.log(10.0))),
        ("blocks.*.mlp.{gate,up,down}.weight", draw),
        ("head.norm.weight", constant(1.0)),
        ("head.unembed.weight", draw),
    ]


def block_flops(config: TrunkConfig, lora: LoraConfig, tokens: int) -> float:
    """Forward matrix-product operations of a block (a multiply-add is 2).

    A row is taken to see the documents of a pack as long as the context allows: an upper bound,
    since shorter documents see less.
    """
    width = config.width
    documents, rest = divmod(tokens, config.context)
    pairs = documents * config.context * (config.context + 1) // 2 + rest * (rest + 1) // 2
    keys = width * config.key_heads // config.heads
    weights = 2 * width * (width + keys) + 3 * width * config.mlp_width
    ends = {"k": width + keys, "v": width + keys, "q": 2 * width, "out": 2 * width}
    beside = sum(ends.get(name, width + config.mlp_width) for name in lora.targets)
    weights += lora.rank * beside
    return 2.0 * tokens * weights + 4.0 * pairs * width


def trunk_problems(config: TrunkConfig, special_tokens: tuple[str, ...]) -> Iterator[Problem]:
    """Faults of `model.language` in itself."""
    yield from positive("model.language", config)
    yield from divides("model.language.width", config.width, "heads", config.heads)
    if config.kv_heads > 0:
        yield from divides("model.language.heads", config.heads, "kv_heads", config.kv_heads)
    if config.heads > 0 and (config.width // config.heads) % 2:
        width = config.width // config.heads
        yield Problem(
            "model.language.heads",
            f"head width {width} is odd; rotary positions pair channels, choose width / heads even",
        )
    if config.vocabulary < len(special_tokens) + 1:
        yield Problem(
            "model.language.vocabulary",
            f"found {config.vocabulary}; it must hold the special tokens "
            f"{', '.join(special_tokens)} and at least one word",
        )


def trunk_split_lengths(config: TrunkConfig) -> list[tuple[str, int]]:
    """Lengths that tensor ranks share in equal parts; the vocabulary is padded instead."""
    return [
        ("model.language.heads", config.heads),
        ("model.language.kv_heads", config.kv_heads),
        ("model.language.mlp_width", config.mlp_width),
        ("model.language.width", config.width),
    ]


def positive(place: str, section: object) -> Iterable[Problem]:
    """Numbers of a section that are not above 0."""
    for key, value in vars(section).items():
        if key == "kv_heads" and value == 0:
            continue  # as many as heads
        if isinstance(value, int | float) and value <= 0:
            yield Problem(f"{place}.{key}", f"found {value}; it must be positive")


def divides(place: str, value: int, divisor_name: str, divisor: int) -> Iterable[Problem]:
    """The fault of a length that cannot be shared in equal parts."""
    if value > 0 and divisor > 0 and value % divisor:
        allowed = ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)
        yield Problem(
            place, f"{divisor_name} = {divisor} does not divide {value}; it may be {allowed}"
        )


_QK_NORMS: dict[QkNorm, Callable[[int, float], nn.Module]] = {
    QkNorm.none: lambda width, eps: nn.Identity(),
    QkNorm.rms: RMSNorm,
    QkNorm.layer: nn.LayerNorm,
}
_SIMILARITIES: dict[AttentionKind, Callable[[int], nn.Module]] = {
    AttentionKind.dot: lambda heads: DotProduct(),
    AttentionKind.cosine: Cosine,
}
