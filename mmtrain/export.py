"""A run's weights in other forms: full tensors, or another release's files."""

import json
from pathlib import Path
from typing import Any

import torch

from mmtrain.checkpoint import portable
from mmtrain.checkpoint.portable import Description
from mmtrain.convert.canonical import described_lora
from mmtrain.convert.kinds import EXPORTS, Options, convert, open_for
from mmtrain.convert.release import Adapters
from mmtrain.convert.writing import SHARD_BYTES
from mmtrain.errors import ExitCode
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.decoder import UNetConfig, build_unet
from mmtrain.models.emu.sizes import Sizes
from mmtrain.models.transfusion.config import TransfusionConfig
from mmtrain.models.vae.config import VaeConfig
from mmtrain.models.vae.model import build_autoencoder
from mmtrain.recipe import read
from mmtrain.schema import to_plain

RECIPE = "recipe.yaml"


def export_tensors(run: Path, checkpoint: str | None, out: Path) -> int:
    """Write a checkpoint's full tensors as safetensors by canonical name."""
    source = folder_of(run, checkpoint)
    tensors = portable.open_tensors(source)
    for path in portable.export(tensors, out, described(source)):
        print(path)
    return ExitCode.DONE


def export_release(
    run: Path, checkpoint: str | None, out: Path, kind: str, adapters: Adapters
) -> int:
    """Write a checkpoint, or a folder of full tensors, as another release."""
    source = folder_of(run, checkpoint)
    chosen = EXPORTS[kind]
    folder = open_for(kind, source, described(source))
    plan = chosen.plan(folder, Options(adapters=adapters))
    convert(plan, chosen.form, chosen.name, out, None, SHARD_BYTES)
    for remark in plan.remarks:
        print(f"note: {remark}")
    left = f", {len(plan.left_out)} left out" if plan.left_out else ""
    print(f"{out}: {len(plan.made)} tensors{left}; {chosen.summary}")
    return ExitCode.DONE


def folder_of(run: Path, checkpoint: str | None) -> Path:
    """Where the weights are: the run (its newest checkpoint), or one checkpoint."""
    return run / "checkpoints" / checkpoint if checkpoint else run


def described(path: Path) -> Description | None:
    """What a folder holds, by its own description or by the recipe of the run it belongs to.

    Args:
        path: full tensors, a run, or a checkpoint of a run.

    Raises:
        ContentError: the description cannot be read.
        RecipeError: the run's recipe has faults.
    """
    found = Description.read(path)
    if found is not None:
        return found
    for folder in (path, path.parent.parent):
        if (folder / RECIPE).is_file():
            return describe(read(folder / RECIPE).model)
    return None


def describe(model: Any) -> Description | None:
    """The description of a model with these sizes."""
    if isinstance(model, UNetConfig):
        with torch.device("meta"):
            config = json.loads(build_unet(model).to_json_string())
        config["_class_name"] = "UNet2DConditionModel"  # what our subclass adds, diffusers lacks
        return Description(kind="unet", model={}, foreign={"config": config})
    if isinstance(model, VaeConfig):
        with torch.device("meta"):
            config = json.loads(build_autoencoder(model).to_json_string())
        return Description(kind="vae", model={}, foreign={"config": config})
    if isinstance(model, TransfusionConfig):
        return Description(kind="transfusion", model=to_plain(model))
    if isinstance(model, EmuConfig):
        sizes = Sizes(model, ("vision", "causal", "language"))
        lora = described_lora(model.lora) if model.lora.rank else None
        kind = "emu-instruct" if lora else "emu"
        return Description(kind=kind, model=sizes.described(), lora=lora)
    return None
