"""The table of conversions: what comes in, what goes out, and which options each takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from mmtrain.checkpoint.portable import Description
from mmtrain.convert import adapters, diffusion, llama, meta_llama, release, writing
from mmtrain.convert.canonical import Canonical, open_canonical
from mmtrain.convert.plan import Plan
from mmtrain.convert.release import Adapters
from mmtrain.errors import ContentError
from mmtrain.models.emu.config import EmuConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may say; a kind names those it looks at.

    Attributes:
        config: model of a recipe, whose sizes the source must have.
        adapters: kept or merged.
        alpha: of the adapters; None as described.
        base: full tensors that adapters are put beside.
        width: of what a UNet's cross-attention reads; None as it is.
        heads: of a LLaMA; None as described.
        seed: of what is drawn.
    """

    config: EmuConfig | None = None
    adapters: Adapters = Adapters.keep
    alpha: float | None = None
    base: Canonical | None = None
    width: int | None = None
    heads: int | None = None
    seed: int = 0


class Form(Enum):
    """How a plan is laid out on disk."""

    shards = "folder of shards"
    single = "folder with one weight file"
    file = "one weight file"


@dataclass(frozen=True)
class Import:
    """Other people's weights to full tensors.

    Attributes:
        summary: what comes in.
        plan: (path, options) -> the plan.
        options: names of the options it looks at.
        form: of what is written.
    """

    summary: str
    plan: Callable[[Path, Options], Plan]
    options: tuple[str, ...] = ()
    form: Form = Form.shards


@dataclass(frozen=True)
class Export:
    """Full tensors to other people's weights.

    Attributes:
        summary: what goes out.
        plan: (full tensors, options) -> the plan.
        options: names of the options it looks at.
        form: of what is written.
        name: of the weight file, when the form is a folder with one.
        averaged: whether a run's running means are taken where it keeps them (`train.ema`).
    """

    summary: str
    plan: Callable[[Canonical, Options], Plan]
    options: tuple[str, ...] = ()
    form: Form = Form.shards
    name: str = ""
    averaged: bool = False


IMPORTS: Mapping[str, Import] = {
    "llama": Import(
        "a Hugging Face LLaMA folder (config.json; safetensors or .bin, sharded or not)",
        lambda path, options: llama.read_llama(path),
    ),
    "meta-llama": Import(
        "a LLaMA folder of Meta's (params.json, consolidated.*.pth)",
        lambda path, options: meta_llama.read_meta(path),
    ),
    "eva": Import(
        "an EVA-CLIP file, its vision tower",
        lambda path, options: release.read_tower(path, options.config),
        ("recipe",),
    ),
    "emu": Import(
        "the Emu pretrain release (pytorch_model.bin)",
        lambda path, options: release.read_pretrained(path, options.config),
        ("recipe",),
    ),
    "emu-instruct": Import(
        "the Emu instruct release (Emu-instruct.pt), PEFT names old and new",
        lambda path, options: release.read_instruct(
            path, options.config, options.adapters, options.alpha
        ),
        ("recipe", "merge-lora", "alpha"),
    ),
    "peft": Import(
        "a PEFT adapter folder of a LLaMA",
        lambda path, options: adapters.read_adapters(path, options.base, options.adapters),
        ("base", "merge-lora"),
    ),
    "unet": Import(
        "a diffusers UNet folder (SD 1.5)",
        lambda path, options: diffusion.read_unet(path, options.width, options.seed),
        ("width", "seed"),
    ),
    "vae": Import(
        "a diffusers VAE folder, which stays one (training reads it so)",
        lambda path, options: diffusion.read_vae(path),
        form=Form.single,
    ),
}

EXPORTS: Mapping[str, Export] = {
    "llama": Export(
        "a Hugging Face LLaMA folder; what is not the trunk is left out",
        lambda folder, options: llama.write_llama(
            folder, options.adapters, options.alpha, options.heads
        ),
        ("merge-lora", "alpha", "heads"),
    ),
    "eva": Export(
        "the vision tower of an EVA-CLIP file",
        lambda folder, options: release.write_tower(folder),
        form=Form.file,
    ),
    "emu": Export(
        "the Emu pretrain release, one file",
        lambda folder, options: release.write_pretrained(folder, options.adapters, options.alpha),
        ("merge-lora", "alpha"),
        Form.file,
    ),
    "emu-instruct": Export(
        "the Emu instruct release, one file",
        lambda folder, options: release.write_instruct(folder),
        form=Form.file,
    ),
    "peft": Export(
        "a PEFT adapter folder",
        lambda folder, options: adapters.write_adapters(folder, options.alpha),
        ("alpha",),
        Form.single,
        adapters.WEIGHTS,
    ),
    "unet": Export(
        "a diffusers UNet folder",
        lambda folder, options: diffusion.write_unet(folder),
        form=Form.single,
        name=diffusion.WEIGHTS,
    ),
    "vae": Export(
        "a diffusers VAE folder, as model.image.vae and decoder.vae read it",
        lambda folder, options: diffusion.write_vae(folder),
        form=Form.single,
        name=diffusion.WEIGHTS,
        averaged=True,
    ),
}

# kinds of which not every form can be made, whatever names their tensors have
_FORMS: Mapping[str, tuple[str, ...]] = {"transfusion": (), "vae": ("vae",)}


def open_for(form: str, path: Path, description: Description | None) -> Canonical:
    """Open full tensors, a run or a checkpoint to write it in a form.

    Args:
        form: a name of `EXPORTS`.
        path: the folder.
        description: of the weights; None to read the folder's own.

    Raises:
        MissingError: nothing of the kind is there.
        ContentError: its files are damaged, or weights of its kind have no such form.
    """
    folder = open_canonical(path, description, averaged=EXPORTS[form].averaged)
    kind = folder.description.kind
    forms = _FORMS.get(kind, (form,))
    if form not in forms:
        others = f"{', '.join(forms)}, or " if forms else ""
        raise ContentError(
            f"{path}: weights of the kind {kind} cannot be written as {form}; their forms: "
            f"{others}full tensors by canonical name (mmtrain convert without --as)"
        )
    return folder


def convert(
    plan: Plan, form: Form, name: str, out: Path, dtype: torch.dtype | None, limit_bytes: int
) -> None:
    """Write a plan.

    Args:
        plan: what to write.
        form: how it is laid out.
        name: of the weight file in a folder with one.
        out: folder or file to make.
        dtype: of the weights; None keeps each as it is.
        limit_bytes: of one shard.
    """
    plan = plan.to(dtype)
    match form:
        case Form.shards:
            writing.write_folder(plan, out, limit_bytes)
        case Form.single:
            writing.write_single(plan, out, name or diffusion.WEIGHTS)
        case Form.file:
            writing.write_file(plan, out)
