"""LoRA adapters as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

The folder holds adapters alone, named for a `LlamaForCausalLM`; PEFT of any version reads it.
Coming in, they are full tensors of kind `lora`, or stand in a copy of the base they belong to.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.portable import DESCRIPTION, Description
from mmtrain.convert.canonical import Canonical, described_lora, made_shapes, shapes_of
from mmtrain.convert.plan import Draft, Plan, copy_of, raise_faults
from mmtrain.convert.release import Adapters
from mmtrain.convert.sources import open_source, read_json
from mmtrain.errors import ContentError
from mmtrain.models.emu.names import LINEARS, LLAMA, PEFT_PREFIX, without_peft
from mmtrain.models.emu.sizes import lora_of
from mmtrain.nn.lora import LoraConfig, adapted_weights, is_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TARGETS = {theirs.partition(".")[2]: ours.partition(".")[2] for theirs, ours in LINEARS.items()}
# settings that change what an adapter computes, and the value that means a plain one
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "trainable_token_indices": None,
}


def read_adapters(path: Path, base: Canonical | None, adapters: Adapters) -> Plan:
    """A PEFT folder to full tensors: adapters alone, beside their base, or merged into it.

    Args:
        path: the folder.
        base: full tensors they are put beside, or None.
        adapters: kept or merged, where there is a base.

    Raises:
        ContentError: they are not plain LoRA of a LLaMA's linears, or do not fit the base.
    """
    config = read_json(path / CONFIG)
    lora = _lora(config, path / CONFIG)
    source = open_source(path, ("adapter_model",)).renamed(without_peft)
    draft = Draft(source, "a LoRA adapter of a LLaMA").read(LLAMA)
    _check_adapters(draft, lora)
    lora = replace(lora, targets=lora_of(made_shapes(draft)).targets)
    if base is None:
        if adapters is Adapters.merge:
            raise ContentError(f"{path}: nothing to merge into; name the base (--base FOLDER)")
        description = Description(
            kind="lora", model={}, lora=described_lora(lora), foreign={"config": config}
        )
    else:
        _check_base(draft, base)
        for name in base.source.infos:
            draft.add(copy_of(base.source, name))
        description = replace(base.description, lora=described_lora(lora))
        if adapters is Adapters.merge:
            draft.merge_adapters(lora.scale)
            description = replace(description, lora=None)
    plan = draft.plan(f"{path} -> full tensors", {DESCRIPTION: description.text()})
    if base is None or base.dropped is None:
        return plan
    return replace(plan, kept=tuple(copy_of(base.dropped, n) for n in base.dropped.infos))


def write_adapters(folder: Canonical, alpha: float | None) -> Plan:
    """The adapters of a folder as a PEFT folder.

    Raises:
        ContentError: it has none.
    """
    infos = {n: info for n, info in folder.source.infos.items() if is_adapter(n)}
    if not infos:
        raise ContentError(
            f"{folder.source.path}: holds no adapters; its kind is {folder.description.kind}"
        )
    source = replace(folder.source, infos=infos)
    lora = folder.lora(alpha)
    draft = Draft(source, "a PEFT adapter").write(LLAMA)
    draft.made = {
        (name := PEFT_PREFIX + theirs.replace(".default.", ".")): replace(made, target=name)
        for theirs, made in draft.made.items()
    }
    if alpha is None and not (folder.description.lora or {}).get("alpha"):
        draft.remarks.append(
            f"nothing tells alpha of the adapters, {lora.alpha:g} is taken; --alpha sets it"
        )
    known = (folder.description.foreign or {}).get("config", {})
    config = known | {
        "peft_type": "LORA",
        "task_type": known.get("task_type", "CAUSAL_LM"),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": known.get("lora_dropout", lora.dropout),
        "bias": "none",
        "target_modules": [t for t, ours in _TARGETS.items() if ours in lora.targets],
        "inference_mode": True,
    }
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
    return draft.plan(f"{folder.source.path} -> a PEFT adapter", texts)


def _lora(config: Mapping[str, Any], path: Path) -> LoraConfig:
    faults = [
        f"{key} is {config[key]!r}, a plain adapter has {plain!r}"
        for key, plain in _PLAIN.items()
        if config.get(key, plain) != plain and (config[key] or plain)
    ]
    if faults:
        raise ContentError(f"{path}: not an adapter the trunk can have: {'; '.join(faults)}")
    try:
        return LoraConfig(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0.0)),
        )
    except KeyError as error:
        raise ContentError(f"{path}: {error.args[0]} is missing") from error


def _check_adapters(draft: Draft, lora: LoraConfig) -> None:
    """Every adapter has both halves, of the rank that the configuration says."""
    foreign = [name for name in draft.made if not is_adapter(name)]
    draft.faults += [
        f"{', '.join(draft.made[name].sources)}: not an adapter's half" for name in foreign
    ]
    for base, (a, b) in adapted_weights(draft.made).items():
        for name, dim in ((a, 0), (b, 1)):
            made = draft.made.get(name)
            if made is None:
                draft.faults.append(f"{base}: half of its adapter is missing ({name})")
            elif made.info.shape[dim] != lora.rank:
                draft.faults.append(
                    f"{made.sources[0]}: shape {made.info.shape}, {CONFIG} says rank {lora.rank}"
                )


def _check_base(draft: Draft, base: Canonical) -> None:
    """Adapters fit the weights of the base."""
    here = shapes_of(base.source)
    if any(map(is_adapter, here)):
        raise_faults(base.source, "a base of adapters", ["it has adapters already; merge them"])
    made = made_shapes(draft)
    for weight, (a, b) in adapted_weights(made).items():
        if a not in made or b not in made:
            continue
        wanted = (made[b][0], made[a][1])
        if here.get(weight) != wanted:
            draft.faults.append(
                f"{LLAMA.foreign_name(a)}: adapts {weight} of shape {wanted}, the base has "
                f"{here.get(weight)}"
            )
