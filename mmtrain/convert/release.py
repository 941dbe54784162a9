"""The Emu releases and the EVA-CLIP vision tower, to full tensors and back.

Emu (baaivision/Emu, Emu1): one file, either plain (pretrain) or with its language model wrapped by
PEFT (instruct: adapters beside the attention's linears). Both go through the names of the plain
release. What no model uses (a vision norm and head, a T5 token table, rotary buffers) is kept in
`dropped.safetensors`, so that the way back is equal to the bit; without that file it is made again,
since the released loader asks for every name.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.checkpoint.names import NameMap
from mmtrain.checkpoint.tensorfile import TensorInfo
from mmtrain.convert.canonical import (
    EVERYTHING,
    Canonical,
    describe,
    made_shapes,
    read_sizes,
    require_whole,
)
from mmtrain.convert.plan import Draft, Made, Plan, copy_of
from mmtrain.convert.sources import Source, open_source
from mmtrain.errors import ContentError
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.names import EVA, RELEASE, with_peft, without_peft
from mmtrain.models.emu.sizes import Sizes, expected_shapes
from mmtrain.nn.lora import LoraConfig, is_adapter

TOWER_HEAD, T5_WORDS = 1024, 32128  # rows of dead tensors of the release
_ROTARY = "decoder.lm.model.layers.{}.self_attn.rotary_emb.inv_freq"
_TABLE = "cformer.cformer.embed_tokens.weight"


class Adapters(Enum):
    """What becomes of adapters."""

    keep = "keep"  # they stay beside the weights they adapt
    merge = "merge"  # they are folded into them


def read_pretrained(path: Path, config: EmuConfig | None) -> Plan:
    """Emu's pretrain release to full tensors.

    Args:
        path: the file, or a folder with it.
        config: sizes it must have; None to read them off its shapes.

    Raises:
        ContentError: every name and shape that does not fit; it has adapters.
    """
    draft, sizes = _read(path, config)
    if sizes.config.lora.rank:
        raise ContentError(
            f"{path}: holds adapters, so it is no pretrain release; read it as kind emu-instruct"
        )
    return draft.plan(f"{path} -> full tensors", describe("emu", sizes, config))


def read_instruct(
    path: Path, config: EmuConfig | None, adapters: Adapters, alpha: float | None
) -> Plan:
    """Emu's instruct release to full tensors.

    Args:
        path: the file, or a folder with it.
        config: sizes it must have; None to read them off its shapes.
        adapters: kept or merged.
        alpha: of the adapters; None is the release's, 16.

    Raises:
        ContentError: every name and shape that does not fit.
    """
    draft, sizes = _read(path, config)
    _require_adapters(draft.source, sizes.config.lora)
    known = LoraConfig().alpha if alpha is None else alpha
    lora = replace(sizes.config.lora, alpha=known)
    kind = "emu-instruct"
    if adapters is Adapters.merge:
        draft.merge_adapters(lora.scale)
        kind, lora = "emu", LoraConfig()
    return draft.plan(f"{path} -> full tensors", describe(kind, sizes, config, lora))


def _read(path: Path, config: EmuConfig | None) -> tuple[Draft, Sizes]:
    source = open_source(path).renamed(without_peft)
    draft = Draft(source, RELEASE.release).read(RELEASE)
    rotary = source.infos.get(_ROTARY.format(0))
    sizes = read_sizes(draft, made_shapes(draft), 2 * rotary.shape[0] if rotary else None)
    draft.require(_expected(sizes, config, EVERYTHING), RELEASE.foreign_name)
    return draft, sizes


def read_tower(path: Path, config: EmuConfig | None) -> Plan:
    """An EVA-CLIP file's vision tower to full tensors; the text tower is left out.

    Raises:
        ContentError: every name and shape that does not fit.
    """
    source = open_source(path)
    draft = Draft(source, f"{EVA.release} (visual.*)").read(EVA)
    sizes = read_sizes(draft, made_shapes(draft))
    expected = _expected(sizes, config, ("vision",))
    draft.require(expected, EVA.foreign_name)
    return draft.plan(f"{path} -> full tensors of the vision tower", describe("eva", sizes, config))


def write_tower(folder: Canonical) -> Plan:
    """The vision tower under EVA-CLIP's names."""
    tower = folder.part(("vision",))
    sizes = require_whole(tower, ("vision",), EVA.release)
    draft = Draft(tower.source, EVA.release).write(EVA)
    _add_dead(draft, folder.dropped, sizes, EVA)
    return draft.plan(f"{folder.source.path} -> {EVA.release}", {})


def write_pretrained(folder: Canonical, adapters: Adapters, alpha: float | None) -> Plan:
    """The plain Emu release.

    Raises:
        ContentError: tensors are missing, or there are adapters that are not to be merged.
    """
    sizes = require_whole(folder, EVERYTHING, RELEASE.release)
    draft = Draft(folder.source, RELEASE.release)
    if any(map(is_adapter, folder.source.infos)):
        if adapters is Adapters.keep:
            raise ContentError(
                f"{folder.source.path}: holds adapters, and the plain release has no names for "
                "them; fold them in (--merge-lora) or write kind emu-instruct"
            )
        draft = Draft(merged_source(folder, alpha), RELEASE.release)
    draft.write(RELEASE)
    _add_dead(draft, folder.dropped, sizes, RELEASE)
    return draft.plan(f"{folder.source.path} -> {RELEASE.release}", {})


def write_instruct(folder: Canonical) -> Plan:
    """The instruct release: the plain one behind PEFT's prefixes, with its adapters."""
    sizes = require_whole(folder, EVERYTHING, RELEASE.release)
    _require_adapters(folder.source, sizes.config.lora)
    draft = Draft(folder.source, RELEASE.release).write(RELEASE)
    _add_dead(draft, folder.dropped, sizes, RELEASE)
    draft.made = {
        with_peft(name): Made(with_peft(name), made.info, made.make, made.sources, made.how)
        for name, made in draft.made.items()
    }
    return draft.plan(f"{folder.source.path} -> the Emu instruct release", {})


def merged_source(folder: Canonical, alpha: float | None) -> Source:
    """Full tensors of a folder with its adapters folded in, computed when they are asked for."""
    source = folder.source
    draft = Draft(source, "full tensors")
    for name in source.infos:
        draft.add(copy_of(source, name))
    draft.merge_adapters(folder.lora(alpha).scale)
    made = draft.made
    infos = {name: part.info for name, part in made.items()}
    return Source(source.path, infos, source.files, lambda name: made[name].make())


def _expected(
    sizes: Sizes, config: EmuConfig | None, parts: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes by the recipe when there is one, adapters by what the file holds."""
    expected = expected_shapes(config or sizes.config, parts)
    adapters = expected_shapes(sizes.config, parts) if config is not None else {}
    return expected | {name: shape for name, shape in adapters.items() if is_adapter(name)}


def _require_adapters(source: Source, lora: LoraConfig) -> None:
    if not lora.rank:
        raise ContentError(
            f"{source.path}: holds no adapters (lora_A, lora_B); a model without them is of kind "
            "emu, and there is nothing to merge"
        )


def _add_dead(draft: Draft, dropped: Source | None, sizes: Sizes, names: NameMap) -> None:
    """What the released loader asks for and no model uses: as kept, or made again."""
    if dropped is not None:
        for name in names.dropped(dropped.infos):
            draft.add(copy_of(dropped, name))
        return
    made = list(_dead_again(draft, sizes))
    for part in made:
        if names.rule_of(part.target) is not None:
            draft.add(part)
    draft.remarks.append(
        f"{draft.source.path} keeps no dropped.safetensors: tensors that no model uses but the "
        "released loader asks for are made again (rotary buffers computed, the others zero)"
    )


def _dead_again(draft: Draft, sizes: Sizes) -> list[Made]:
    config, made = sizes.config, draft.made
    vision, causal, language = config.vision, config.causal, config.language
    tower = made["visual.patch_embed.proj.weight"].info.dtype
    zeros = {
        "visual.norm.weight": (vision.width,),
        "visual.norm.bias": (vision.width,),
        "visual.head.weight": (TOWER_HEAD, vision.width),
        "visual.head.bias": (TOWER_HEAD,),
    }
    out = [_created(name, shape, tower, torch.zeros, "zeros") for name, shape in zeros.items()]
    if (queries := made.get("cformer.causal_tokens")) is not None:
        dtype = queries.info.dtype
        out.append(_created(_TABLE, (T5_WORDS, causal.width), dtype, torch.zeros, "zeros"))
    if (words := made.get("decoder.lm.model.embed_tokens.weight")) is not None:
        if "language.heads" in sizes.guesses:
            draft.remarks.append(
                f"rotary buffers are made for heads of {language.width // language.heads} channels"
            )
        width, theta = language.width // language.heads, language.rope_theta
        half = width // 2

        def frequencies(shape: tuple[int, ...]) -> Tensor:  # to the bit as transformers has it
            return 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))

        out += [
            _created(_ROTARY.format(i), (half,), words.info.dtype, frequencies, "theta^(-2i/K)")
            for i in range(language.layers)
        ]
    return out


def _created(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    make: Callable[[tuple[int, ...]], Tensor],
    how: str,
) -> Made:
    assert math.prod(shape) > 0, name
    return Made(name, TensorInfo(shape, dtype), lambda: make(shape).to(dtype), (), how)
