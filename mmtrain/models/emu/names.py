"""Names of the Emu release, of its instruct form, and of a Hugging Face LLaMA.

Tables: the state dict of the released classes (baaivision/Emu at 13c395e, transformers 4.31).
"""

import re

from mmtrain.checkpoint.names import Dropped, Elsewhere, Fused, NameMap, Rule, Same

PEFT_PREFIX = "base_model.model."  # what the LoRA wrapper puts after `decoder.lm.`

# linears of a LLaMA block, theirs and ours: what adapters may stand beside
LINEARS = {
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}

_ROTARY = (
    "recomputed in float32: the stored buffer is rounded to bfloat16, and tables made of it are "
    "off by up to 1.9 within 2,048 positions"
)
_DEAD_TOWER = "never used: Emu reads the raw output of the last vision block"
_DEAD_TABLE = "never used: the T5 stack is fed with the learned queries"


def llama_rules(prefix: str) -> tuple[Rule, ...]:
    """Hugging Face LLaMA names behind `prefix`, adapters as PEFT 0.5 names them."""
    block, ours = f"{prefix}model.layers.*", "blocks.*"
    return (
        *(
            Same(
                f"{block}.{theirs}.lora_{part}.default.weight", f"{ours}.{name}_lora.{leaf}.weight"
            )
            for theirs, name in LINEARS.items()
            for part, leaf in (("A", "a"), ("B", "b"))
        ),
        Same(f"{prefix}model.embed_tokens.weight", "embed.tokens.weight"),
        Same(f"{block}.input_layernorm.weight", f"{ours}.norm1.weight"),
        *(
            Same(f"{block}.{theirs}.weight", f"{ours}.{name}.weight")
            for theirs, name in LINEARS.items()
        ),
        Same(f"{block}.post_attention_layernorm.weight", f"{ours}.norm2.weight"),
        Same(f"{prefix}model.norm.weight", "head.norm.weight"),
        Same(f"{prefix}lm_head.weight", "head.unembed.weight"),
        Dropped(f"{block}.self_attn.rotary_emb.inv_freq", _ROTARY),
    )


def vision_rules(prefix: str) -> tuple[Rule, ...]:
    """EVA-CLIP names behind `prefix` (the same in the EVA release and in Emu)."""
    block, ours = f"{prefix}blocks.*", "vision.blocks.*"
    qkv = tuple(f"{ours}.attention.{name}.weight" for name in ("q", "k", "v"))
    paired = {
        "norm1": "norm1",
        "attn.proj": "attention.out",
        "norm2": "norm2",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    return (
        Same(f"{prefix}cls_token", "vision.stem.cls", leading=2),
        Same(f"{prefix}pos_embed", "vision.stem.position", leading=1),
        *_weight_and_bias(f"{prefix}patch_embed.proj", "vision.stem.patch"),
        Fused(f"{block}.attn.qkv.weight", qkv),
        Same(f"{block}.attn.q_bias", f"{ours}.attention.q.bias"),
        Same(f"{block}.attn.v_bias", f"{ours}.attention.v.bias"),
        *(
            rule
            for foreign, canonical in paired.items()
            for rule in _weight_and_bias(f"{block}.{foreign}", f"{ours}.{canonical}")
        ),
        *(Dropped(f"{prefix}norm.{leaf}", _DEAD_TOWER) for leaf in ("weight", "bias")),
        *(Dropped(f"{prefix}head.{leaf}", _DEAD_TOWER) for leaf in ("weight", "bias")),
    )


def causal_rules(prefix: str) -> tuple[Rule, ...]:
    """Names of the T5 decoder stack behind `prefix`."""
    stack = f"{prefix}cformer"
    block, ours = f"{stack}.block.*.layer", "causal.blocks.*"
    table = "0.SelfAttention.relative_attention_bias.weight"
    projections = {"q": "q", "k": "k", "v": "v", "o": "out"}
    return (
        Same(f"{prefix}causal_tokens", "causal.queries", leading=1),
        Same(f"{stack}.block.0.layer.{table}", "causal.relative_bias"),
        *(
            Same(f"{block}.{theirs}.{short}.weight", f"{ours}.{part}.{name}.weight")
            for theirs, part in (
                ("0.SelfAttention", "self_attention"),
                ("1.EncDecAttention", "cross_attention"),
            )
            for short, name in projections.items()
        ),
        Same(f"{block}.2.DenseReluDense.wi.weight", f"{ours}.mlp.up.weight"),
        Same(f"{block}.2.DenseReluDense.wo.weight", f"{ours}.mlp.down.weight"),
        *(Same(f"{block}.{i}.layer_norm.weight", f"{ours}.norm{i + 1}.weight") for i in range(3)),
        Same(f"{stack}.final_layer_norm.weight", "causal.norm.weight"),
        *_weight_and_bias(f"{prefix}projection", "causal.projection"),
        Dropped(f"{stack}.embed_tokens.weight", _DEAD_TABLE),
    )


def _weight_and_bias(foreign: str, canonical: str) -> tuple[Rule, ...]:
    return tuple(Same(f"{foreign}.{leaf}", f"{canonical}.{leaf}") for leaf in ("weight", "bias"))


RELEASE = NameMap(
    "the Emu release",
    (
        *vision_rules("visual."),
        *_weight_and_bias("ln_visual", "vision_norm"),
        *causal_rules("cformer."),
        *llama_rules("decoder.lm."),
        Same("decoder.lm.stu_regress_head.weight", "head.regress.weight"),
    ),
)
LLAMA = NameMap("a Hugging Face LLaMA", llama_rules(""))
_TEXT = "the text tower of EVA-CLIP, which Emu does not have"
EVA = NameMap(
    "EVA-CLIP",
    (
        *vision_rules("visual."),
        Elsewhere("text.**", _TEXT),
        Elsewhere("logit_scale", _TEXT),
    ),
)
_ADAPTED = re.compile(r"(.+\.(?:self_attn|mlp)\.\w+_proj)\.base_layer\.weight")
_NAMELESS = re.compile(r"(.+\.lora_[AB])\.weight")


def without_peft(name: str) -> str:
    """The name a LoRA-wrapped tensor has in the plain release; adapters as PEFT 0.5 names them.

    The wrapper's prefix goes; `base_layer` (PEFT from 0.7 on) goes; adapters without an adapter's
    name (as in adapter folders) get `default`.
    """
    name = name.replace(f".{PEFT_PREFIX}", ".", 1).removeprefix(PEFT_PREFIX)
    if hit := _ADAPTED.fullmatch(name):
        return f"{hit[1]}.weight"
    if hit := _NAMELESS.fullmatch(name):
        return f"{hit[1]}.default.weight"
    return name


def with_peft(name: str) -> str:
    """The name a tensor of the plain release has in the LoRA-wrapped one (PEFT 0.5 and 0.6)."""
    stem = "decoder.lm."
    return f"{stem}{PEFT_PREFIX}{name.removeprefix(stem)}" if name.startswith(stem) else name
