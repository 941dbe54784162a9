"""What Emu declares to the platform: plan, initial weights, costs, faults, sequence format.

Sources: arXiv:2307.05222 and the released modules (baaivision/Emu, Emu1/models).
"""

import math
from collections.abc import Iterator, Mapping

from mmtrain.data.packed import FIELDS
from mmtrain.data.tokens import SPECIAL_TOKENS, SequenceFormat
from mmtrain.errors import Problem
from mmtrain.layout.names import deciding
from mmtrain.layout.plan import Cut, TensorPlan
from mmtrain.models.emu.config import CausalConfig, EmuConfig, VisionConfig
from mmtrain.models.emu.generate import EmuSampler
from mmtrain.models.emu.model import layers
from mmtrain.models.spec import BatchShape, ModelSpec
from mmtrain.nn import lora
from mmtrain.nn.init import InitialRules, constant, normal, truncated_normal, uniform
from mmtrain.nn.lora import LoraConfig
from mmtrain.nn.trunk import (
    HEAD_PLAN,
    TRUNK_PLAN,
    block_flops,
    divides,
    positive,
    trunk_problems,
    trunk_rules,
    trunk_split_lengths,
)

TRUNK_LINEARS = ("q", "k", "v", "out", "gate", "up", "down")  # what adapters may stand beside

PLAN = TensorPlan(
    {
        "vision.blocks.*.{attention,mlp}.enter": Cut.ENTER,
        "vision.blocks.*.attention.{q,k,v}": Cut.COLUMN,
        "vision.blocks.*.attention.out": Cut.ROW,
        "vision.blocks.*.mlp.up": Cut.COLUMN,
        "vision.blocks.*.mlp.down": Cut.ROW,
        "causal.blocks.*.{self_attention,cross_attention,mlp}.enter": Cut.ENTER,
        "causal.blocks.*.cross_attention.enter_memory": Cut.ENTER,
        "causal.blocks.*.{self_attention,cross_attention}.{q,k,v}": Cut.COLUMN,
        "causal.blocks.*.{self_attention,cross_attention}.out": Cut.ROW,
        "causal.blocks.*.mlp.up": Cut.COLUMN,
        "causal.blocks.*.mlp.down": Cut.ROW,
        "causal.relative_bias": Cut.HEADS_1,
        **TRUNK_PLAN,
        "blocks.*.{attention,mlp}.{q,k,v,gate,up}_lora.a": Cut.SHARED,
        "blocks.*.{attention,mlp}.{q,k,v,gate,up}_lora.b": Cut.COLUMN,
        "blocks.*.{attention,mlp}.{out,down}_lora.drop": Cut.CHANNELS,
        "blocks.*.{attention,mlp}.{out,down}_lora.a": Cut.ROW_SCATTERED,
        "blocks.*.{attention,mlp}.{out,down}_lora.b": Cut.ROWWISE,
        **HEAD_PLAN,
        "head.regress": Cut.COLUMN_GATHERED,
    }
)


def initial(config: EmuConfig) -> InitialRules:
    """How the reference draws each parameter when nothing is loaded."""
    language = config.language
    return [
        *_vision_rules(config.vision),
        *_causal_rules(config),
        *trunk_rules(),
        # the regression head keeps torch's default
        ("head.regress.weight", uniform(language.width**-0.5)),
        *lora.initial_rules("blocks.*.attention.{q,k,v,out}", language.width),
        *lora.initial_rules("blocks.*.mlp.{gate,up}", language.width),
        *lora.initial_rules("blocks.*.mlp.down", language.mlp_width),
    ]


def trains(config: EmuConfig, name: str) -> bool:
    """Adapters and what `lora.also_train` names, when there are adapters; else everything."""
    if config.lora.rank == 0:
        return True
    return lora.is_adapter(name) or deciding(config.lora.also_train, name) is not None


def _vision_rules(config: VisionConfig) -> InitialRules:
    """EVA: truncated normal 0.02, residual outputs of layer i divided by sqrt(2 (i + 1))."""
    draw = truncated_normal(0.02)
    outputs = [
        (
            f"vision.blocks.{i}.{{attention.out,mlp.down}}.weight",
            truncated_normal(0.02 / math.sqrt(2 * (i + 1))),
        )
        for i in range(config.layers)
    ]
    return [
        # the convolution keeps torch's default: U(+- 1 / sqrt(inputs))
        ("vision.stem.patch.{weight,bias}", uniform((3 * config.patch_size**2) ** -0.5)),
        ("vision.stem.cls", draw),
        ("vision.stem.position", truncated_normal(config.position_std)),
        *outputs,
        ("vision.blocks.*.{attention,mlp}.{q,k,v,up}.weight", draw),
        ("vision.blocks.*.{attention,mlp}.{q,v,out,up,down}.bias", constant(0.0)),
        ("vision.blocks.*.{norm1,norm2}.weight", constant(1.0)),
        ("vision.blocks.*.{norm1,norm2}.bias", constant(0.0)),
        ("vision_norm.weight", constant(1.0)),
        ("vision_norm.bias", constant(0.0)),
    ]


def _causal_rules(config: EmuConfig) -> InitialRules:
    """T5 with factor 1; the queries of q make up for the unscaled logits."""
    causal = config.causal
    width, narrow = causal.width**-0.5, (causal.width * causal.head_width) ** -0.5
    attention = "causal.blocks.*.{self_attention,cross_attention}"
    return [
        ("causal.queries", normal(causal.query_std)),
        ("causal.relative_bias", normal(width)),
        (f"{attention}.q.weight", normal(narrow)),
        (f"{attention}.{{k,v}}.weight", normal(width)),
        (f"{attention}.out.weight", normal((causal.heads * causal.head_width) ** -0.5)),
        ("causal.blocks.*.mlp.up.weight", normal(width)),
        ("causal.blocks.*.mlp.down.weight", normal(causal.mlp_width**-0.5)),
        ("causal.blocks.*.{norm1,norm2,norm3}.weight", constant(1.0)),
        ("causal.norm.weight", constant(1.0)),
        ("causal.projection.{weight,bias}", uniform(width)),
    ]


def flops(config: EmuConfig, shape: BatchShape) -> list[float]:
    """Forward matrix-product operations (a multiply-add is 2) of each layer, in order.

    Attention counts 4 x width x visible pairs. A trunk row is taken to see the documents of a pack
    as long as the context allows: an upper bound, since shorter documents see less.
    """
    vision, causal, language = config.vision, config.causal, config.language
    stem = 2.0 * shape.images * (vision.tokens - 1) * 3 * vision.patch_size**2 * vision.width
    return [
        stem,
        *[_vision_block_flops(vision, shape.images)] * vision.layers,
        0.0,
        _causal_flops(causal, vision, language.width, shape.images),
        0.0,
        *[block_flops(language, config.lora, shape.tokens)] * language.layers,
        2.0 * shape.tokens * language.width * language.vocabulary
        + 2.0 * shape.images * (causal.queries + 1) * language.width**2,
    ]


def _vision_block_flops(config: VisionConfig, images: float) -> float:
    tokens, width = config.tokens, config.width
    weights = 4 * width**2 + 2 * width * config.mlp_width
    return images * (2.0 * tokens * weights + 4.0 * tokens**2 * width)


def _causal_flops(
    config: CausalConfig, vision: VisionConfig, output_width: int, images: float
) -> float:
    queries, width, inner = config.queries, config.width, config.heads * config.head_width
    on_queries = 6 * width * inner + 2 * width * config.mlp_width  # 4 of self, 2 of cross-attention
    on_memory = 2 * vision.width * inner
    # self-attention is computed in full and then masked
    pairs = queries**2 + queries * vision.tokens
    block = 2.0 * (queries * on_queries + vision.tokens * on_memory) + 4.0 * pairs * inner
    return images * (config.layers * block + 2.0 * queries * width * output_width)


def problems(config: EmuConfig, tensor: int) -> Iterator[Problem]:
    """Faults of the `model:` section under `tensor` tensor ranks."""
    vision, causal, language = config.vision, config.causal, config.language
    yield from positive("model.vision", vision)
    yield from positive("model.causal", causal)
    yield from trunk_problems(language, SPECIAL_TOKENS)
    yield from divides(
        "model.vision.image_size", vision.image_size, "patch_size", vision.patch_size
    )
    yield from divides("model.vision.width", vision.width, "heads", vision.heads)
    if causal.relative_buckets % 2 or causal.relative_distance <= causal.relative_buckets // 2:
        yield Problem(
            "model.causal.relative_buckets",
            f"found {causal.relative_buckets} with relative_distance {causal.relative_distance}; "
            "it must be even, and half of it below relative_distance",
        )
    if language.context < causal.queries + 4:
        yield Problem(
            "model.language.context",
            f"found {language.context}; one image with <s> and </s> takes causal.queries + 4 = "
            f"{causal.queries + 4} positions",
        )
    yield from _adapters(config.lora)
    for place, value in _split_lengths(config):
        yield from divides(place, value, "parallel.tensor", tensor)


def _adapters(config: LoraConfig) -> Iterator[Problem]:
    if config.rank < 0:
        yield Problem("model.lora.rank", f"found {config.rank}; use 0 for none, or 1 and more")
    if not config.alpha > 0:
        yield Problem("model.lora.alpha", f"found {config.alpha}; allowed: above 0, as in 16")
    if not 0 <= config.dropout < 1:
        yield Problem("model.lora.dropout", f"found {config.dropout}; allowed: 0 or more, below 1")
    unknown = [name for name in config.targets if name not in TRUNK_LINEARS]
    if unknown or not config.targets or len(set(config.targets)) < len(config.targets):
        yield Problem(
            "model.lora.targets",
            f"found [{', '.join(config.targets)}]; wanted: some of {', '.join(TRUNK_LINEARS)}, "
            "each once",
        )
    if config.also_train and config.rank == 0:
        yield Problem(
            "model.lora.also_train",
            "given with model.lora.rank = 0, where everything is trained anyway; set the rank, or "
            "name what stays as it is in train.freeze",
        )


def _split_lengths(config: EmuConfig) -> list[tuple[str, int]]:
    """Lengths that tensor ranks share in equal parts; the vocabulary is padded instead."""
    return [
        ("model.vision.heads", config.vision.heads),
        ("model.vision.mlp_width", config.vision.mlp_width),
        ("model.causal.heads", config.causal.heads),
        ("model.causal.mlp_width", config.causal.mlp_width),
        *trunk_split_lengths(config.language),
    ]


def sequence(config: EmuConfig, ids: Mapping[str, int]) -> SequenceFormat:
    """How documents become token rows.

    Args:
        config: the model.
        ids: id of each of `SPECIAL_TOKENS`.
    """
    return SequenceFormat.of(
        ids,
        visual_tokens=config.causal.queries,
        image_size=config.vision.image_size,
    )


EMU = ModelSpec(
    name="emu",
    config_type=EmuConfig,
    problems=problems,
    layers=layers,
    plan=PLAN,
    initial=initial,
    flops=flops,
    losses=("text", "image"),
    fields=FIELDS,
    sequence=sequence,
    trains=trains,
    sampler=lambda config, layers, form: EmuSampler(layers, form),
    patterns=lambda config: {"model.lora.also_train": config.lora.also_train},
    vocabulary_tables=("embed.tokens.weight", "head.unembed.weight"),
    context=lambda config: int(config.language.context),
    vocabulary=lambda config: int(config.language.vocabulary),
)
