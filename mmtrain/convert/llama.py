"""A Hugging Face LLaMA folder to full tensors of the trunk, and back.

Our trunk is a LLaMA without extras: what changes its numbers (scaled rotary positions, biases,
another activation) is refused by name. Grouped queries are read and written. Tied embeddings become
two tensors, and one again on the way back when they are still equal.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mmtrain.checkpoint.portable import DESCRIPTION, Description
from mmtrain.convert.canonical import Canonical, require_whole
from mmtrain.convert.plan import Draft, LeftOut, Plan, copy_of, short_name
from mmtrain.convert.release import Adapters, merged_source
from mmtrain.convert.sources import open_source, read_json
from mmtrain.errors import ContentError
from mmtrain.models.emu.config import EmuConfig, LanguageConfig
from mmtrain.models.emu.names import LLAMA
from mmtrain.models.emu.sizes import TRUNK, expected_shapes
from mmtrain.nn.lora import is_adapter

REGRESS = "head.regress.weight"  # Emu's own, no part of a LLaMA
_EMBED, _UNEMBED = "embed.tokens.weight", "head.unembed.weight"


def read_llama(path: Path) -> Plan:
    """A folder with `config.json` and weights to full tensors of the trunk.

    Raises:
        ContentError: it is no plain LLaMA, or names and shapes do not fit its configuration.
    """
    config = read_json(path / "config.json")
    language = language_of(config, path / "config.json")
    source = open_source(path, ("model", "pytorch_model"))
    draft = Draft(source, f"the LLaMA of {path / 'config.json'}").read(LLAMA)
    if config.get("tie_word_embeddings", False) and _UNEMBED not in draft.made:
        tied = draft.made.get(_EMBED)
        if tied is not None:
            draft.add(replace(tied, target=_UNEMBED, how="copy, embeddings are tied"))
    draft.require(trunk_shapes(language), LLAMA.foreign_name)
    return draft.plan(f"{path} -> full tensors of the trunk", described(language, config))


def described(language: LanguageConfig, config: dict[str, Any] | None) -> dict[str, str]:
    """The file `mmtrain.json` of a trunk; `config` is kept for the way back."""
    section = {key: getattr(value, "value", value) for key, value in asdict(language).items()}
    foreign = None if config is None else {"config": config}
    description = Description(kind="llama", model={"language": section}, foreign=foreign)
    return {DESCRIPTION: description.text()}


def trunk_shapes(language: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a LLaMA's parameters, canonical names."""
    shapes = expected_shapes(EmuConfig(language=language), TRUNK)
    return {name: shape for name, shape in shapes.items() if name != REGRESS}


def language_of(config: Mapping[str, Any], path: Path) -> LanguageConfig:
    """Sizes of a `config.json`.

    Raises:
        ContentError: it is not of a LLaMA, or of one our trunk cannot be.
    """
    heads = config.get("num_attention_heads", 0)
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    wants = {
        "model_type": (config.get("model_type"), "llama"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "rope_scaling": (rotary.get("rope_type", rotary.get("type", "default")), "default"),
        "head_dim": (config.get("head_dim") or 0, 0),
    }
    if heads and wants["head_dim"][0] == config.get("hidden_size", 0) // heads:
        wants.pop("head_dim")
    faults = [
        f"{key} is {found!r}, our trunk has {wanted!r}"
        for key, (found, wanted) in wants.items()
        if found != wanted
    ]
    if faults:
        raise ContentError(f"{path}: not a LLaMA the trunk can be: {'; '.join(faults)}")
    try:
        key_heads = config.get("num_key_value_heads") or heads
        return LanguageConfig(
            vocabulary=config["vocab_size"],
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=heads,
            kv_heads=0 if key_heads == heads else key_heads,
            mlp_width=config["intermediate_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=float(config.get("rope_theta", rotary.get("rope_theta", 10000.0))),
            context=config.get("max_position_embeddings", 2048),
        )
    except KeyError as error:
        raise ContentError(f"{path}: {error.args[0]} is missing; a LLaMA needs it") from error


def write_llama(
    folder: Canonical, adapters: Adapters, alpha: float | None, heads: int | None
) -> Plan:
    """The trunk as a folder that `LlamaForCausalLM.from_pretrained` reads.

    Args:
        folder: full tensors of a trunk or of a whole Emu, of which the rest is left out.
        adapters: merged, or kept, which a LLaMA cannot.
        alpha: of the adapters; None as the folder says.
        heads: of the trunk; None as the folder says.
    """
    if any(map(is_adapter, folder.source.infos)):
        if adapters is Adapters.keep:
            raise ContentError(
                f"{folder.source.path}: holds adapters; fold them in (--merge-lora), or write them "
                "alone (kind peft)"
            )
        folder = replace(folder, source=merged_source(folder, alpha))
    trunk = folder.part(TRUNK, without=(REGRESS,))
    language = _language(folder, heads)
    config = _foreign_config(folder, language, trunk)
    draft = Draft(trunk.source, "a Hugging Face LLaMA").write(LLAMA)
    if config["tie_word_embeddings"]:
        draft.made.pop("lm_head.weight")
    if folder.dropped is not None:
        for name in LLAMA.dropped(folder.dropped.infos):
            draft.add(copy_of(folder.dropped, name))
    outside = folder.source.infos.keys() - trunk.source.infos.keys()
    draft.left_out += [
        LeftOut(name, folder.source.infos[name], "not part of a LLaMA", kept=False)
        for name in sorted(outside)
    ]
    texts = {"config.json": json.dumps(config, indent=2) + "\n"}
    return draft.plan(f"{folder.source.path} -> a Hugging Face LLaMA", texts)


def _language(folder: Canonical, heads: int | None) -> LanguageConfig:
    """Sizes by shape, settings as described."""
    section = dict(folder.description.model.get("language", {}))
    if heads is not None:
        width = folder.source.infos["head.norm.weight"].shape[0]
        section |= {"heads": heads, "width": width}
        described_again = replace(folder.description, model={"language": section})
        folder = replace(folder, description=described_again)
    if not section.get("heads"):
        raise ContentError(
            f"{folder.source.path}: nothing there tells the number of attention heads; give it "
            "(--heads N)"
        )
    found = require_whole(folder, TRUNK, "a LLaMA", (REGRESS,)).config.language
    settings = ("norm_eps", "rope_theta", "context")
    return replace(found, **{key: section[key] for key in settings if key in section})


def _foreign_config(
    folder: Canonical, language: LanguageConfig, trunk: Canonical
) -> dict[str, Any]:
    """The configuration it came with where there is one, its sizes as they are now."""
    known = dict((folder.description.foreign or {}).get("config", {}))
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": language.vocabulary,
        "hidden_size": language.width,
        "intermediate_size": language.mlp_width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.key_heads,
        "rms_norm_eps": language.norm_eps,
        "max_position_embeddings": language.context,
        "hidden_act": "silu",
        "tie_word_embeddings": bool(known.get("tie_word_embeddings")) and _are_tied(trunk),
    }
    if "rope_parameters" not in known:
        sizes["rope_theta"] = language.rope_theta
    dtype = trunk.source.infos["blocks.0.attention.q.weight"].dtype
    extra = (
        {} if known else {"torch_dtype": short_name(dtype), "bos_token_id": 1, "eos_token_id": 2}
    )
    return known | sizes | extra


def _are_tied(trunk: Canonical) -> bool:
    return torch.equal(trunk.source.get(_EMBED), trunk.source.get(_UNEMBED))
