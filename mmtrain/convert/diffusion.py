"""Diffusers folders: a UNet to full tensors and back, a VAE checked and copied, or written.

Emu's visual decoder is SD 1.5's UNet that attends to visual embeddings instead of CLIP's text: keys
and values of every cross-attention (`attn2.to_k`, `attn2.to_v`) read another width, so they are
drawn anew, as torch draws a linear, by name and seed. All else is kept.

What a folder must hold is what diffusers' own class has for its `config.json`, built without
numbers. The VAE stays a diffusers folder, for training too; older names of its attention are
brought up to date. One that was trained here becomes such a folder.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from mmtrain.checkpoint.portable import DESCRIPTION, Description
from mmtrain.checkpoint.tensorfile import TensorInfo
from mmtrain.convert.canonical import Canonical
from mmtrain.convert.plan import Draft, Made, Plan, copy_of
from mmtrain.convert.sources import Source, open_source, read_json
from mmtrain.errors import ContentError
from mmtrain.nn.init import draw_by_name, uniform

PREFIX = "unet."
AUTOENCODER, CRITIC = "vae.autoencoder.", "vae.critic."
STEMS = ("diffusion_pytorch_model",)
WEIGHTS = "diffusion_pytorch_model.safetensors"
_CROSS = re.compile(r".+\.attn2\.to_[kv]\.weight")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def read_unet(path: Path, width: int | None, seed: int) -> Plan:
    """A UNet folder to full tensors.

    Args:
        path: folder with `config.json`.
        width: of the embeddings that cross-attention shall read; None keeps what it reads.
        seed: of the projections that are drawn anew.

    Raises:
        ContentError: names and shapes are not those of diffusers' class.
    """
    config = read_json(path / "config.json")
    source = open_source(path, STEMS)
    before = unet_shapes(config, path)
    found = config.get("cross_attention_dim")
    if not isinstance(found, int):
        raise ContentError(
            f"{path / 'config.json'}: cross_attention_dim is {found!r}, expected one whole number, "
            "as SD 1.5 has"
        )
    width = width or found
    after = unet_shapes(config | {"cross_attention_dim": width}, path)
    draft = _read(source, before, "the UNet of its config.json", PREFIX)
    for name, shape in after.items():
        if shape != before[name] and PREFIX + name in draft.made:
            _redraw(draft, name, shape, seed)
    config = config | {"cross_attention_dim": width}
    description = Description(kind="unet", model={}, foreign={"config": config})
    title = f"{path} -> full tensors of the UNet"
    return draft.plan(title, {DESCRIPTION: description.text()})


def _described(folder: Canonical, kind: str, name: str) -> dict[str, Any]:
    """The configuration that the folder of a `kind` says it holds."""
    config: dict[str, Any] | None = (folder.description.foreign or {}).get("config")
    if folder.description.kind != kind or config is None:
        raise ContentError(
            f"{folder.source.path}: its kind is {folder.description.kind}, expected {kind} with "
            f"the {name}'s configuration in {DESCRIPTION}"
        )
    return config


def write_unet(folder: Canonical) -> Plan:
    """Full tensors of a UNet to a diffusers folder.

    Raises:
        ContentError: the folder does not say its configuration, or does not hold what it says.
    """
    config = _described(folder, "unet", "UNet")
    shapes = unet_shapes(config, folder.source.path)
    source = folder.source.renamed(lambda name: name.removeprefix(PREFIX))
    draft = _read(source, shapes, "the UNet of its description", "")
    texts = {"config.json": _config_text(config)}
    return draft.plan(f"{folder.source.path} -> a diffusers UNet", texts)


def read_vae(path: Path) -> Plan:
    """A VAE folder to a VAE folder, checked, in safetensors, under today's names."""
    config = read_json(path / "config.json")
    source = open_source(path, STEMS).renamed(_todays_name)
    shapes = _shapes(AutoencoderKL, "AutoencoderKL", config, path)
    draft = _read(source, shapes, "the VAE of its config.json", "")
    return draft.plan(f"{path} -> a diffusers VAE", {"config.json": _config_text(config)})


def write_vae(folder: Canonical) -> Plan:
    """Full tensors of a trained VAE to a diffusers folder; its critic is left out.

    Raises:
        ContentError: the folder does not say its configuration, or does not hold what it says.
    """
    config = _described(folder, "vae", "VAE")
    shapes = _shapes(AutoencoderKL, "AutoencoderKL", config, folder.source.path)
    source = folder.source.renamed(lambda name: name.removeprefix(AUTOENCODER))
    critic = [name for name in source.infos if name.startswith(CRITIC)]
    draft = _read(source, shapes, "the VAE of its description", "", critic)
    for name in critic:
        draft.leave_out(name, "of the critic, which serves training alone")
    texts = {"config.json": _config_text(config)}
    return draft.plan(f"{folder.source.path} -> a diffusers VAE", texts)


def unet_shapes(config: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the UNet of a configuration, by diffusers' names."""
    return _shapes(UNet2DConditionModel, "UNet2DConditionModel", config, path)


def _shapes(kind: Any, name: str, config: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    if (found := config.get("_class_name", name)) != name:
        raise ContentError(f"{path / 'config.json'}: _class_name is {found}, expected {name}")
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ContentError(
            f"{path / 'config.json'}: diffusers cannot build a {name} of it: {error}"
        ) from error
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _read(
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    what: str,
    prefix: str,
    beside: Sequence[str] = (),
) -> Draft:
    draft = Draft(source, what)
    draft.unknown([name for name in source.infos if name not in shapes and name not in beside])
    for name in source.infos.keys() & shapes.keys():
        draft.add(copy_of(source, name, prefix + name))
    expected = {prefix + name: shape for name, shape in shapes.items()}
    return draft.require(expected, lambda name: name.removeprefix(prefix))


def _redraw(draft: Draft, name: str, shape: tuple[int, ...], seed: int) -> None:
    assert _CROSS.fullmatch(name), name
    old = draft.made.pop(PREFIX + name)
    info = TensorInfo(shape, old.info.dtype)
    rules = [(PREFIX + name, uniform(shape[1] ** -0.5))]

    def make() -> Tensor:
        return draw_by_name(PREFIX + name, shape, rules, seed).to(info.dtype)

    reason = f"reads {old.info.shape[1]} channels of text; drawn anew for {shape[1]} of embeddings"
    draft.leave_out(name, reason)
    draft.add(Made(PREFIX + name, info, make, (), f"uniform +-1/sqrt({shape[1]}), seed {seed}"))


def _todays_name(name: str) -> str:
    hit = _OLD_NAME.fullmatch(name)
    return f"{hit[1]}.{_OLD_ATTENTION[hit[2]]}.{hit[3]}" if hit else name


def _config_text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"
