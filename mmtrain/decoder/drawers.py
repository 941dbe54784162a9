"""A trained visual decoder, ready to draw; without the engines that trained it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmtrain import recipe as recipes
from mmtrain.checkpoint import portable
from mmtrain.encoders.vae import Vae
from mmtrain.errors import ContentError, MissingError
from mmtrain.models.emu.decoder import LAYER, DecoderUNet, UNetConfig, build_unet
from mmtrain.models.emu.drawing import EmuDrawer
from mmtrain.settings import DecoderConfig, Phase


def load_drawer(
    run: Path, device: torch.device | None = None, checkpoint: str | None = None
) -> EmuDrawer:
    """A run of the decoder phase, ready to draw; running means of its weights where it keeps them.

    Args:
        run: the run's folder.
        device: where to draw; None = CUDA if there is one.
        checkpoint: name of a checkpoint, or None for the newest.

    Raises:
        MissingError: a part of the run is not there.
        RecipeError: its recipe has faults.
        ContentError: it is a run of another phase, or its weights are others.
    """
    if not (run / "recipe.yaml").is_file():
        raise MissingError(f"{run}: holds no recipe.yaml; expected a run of the phase decoder")
    recipe = recipes.read(run / "recipe.yaml")
    if recipe.phase is not Phase.decoder:
        raise ContentError(
            f"{run} is a run of the phase {recipe.phase.value}; a decoder is trained with "
            "phase: decoder"
        )
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = portable.open_averaged(run / "checkpoints" / checkpoint if checkpoint else run)
    found = {name: tensors.get(name) for name in tensors.names()}
    vae = None if recipe.decoder.vae is None else Vae(Path(recipe.decoder.vae), device)
    return make_drawer(found, recipe.model, recipe.decoder, vae, device)


def make_drawer(
    tensors: Mapping[str, Tensor],
    sizes: UNetConfig,
    config: DecoderConfig,
    vae: Vae | None,
    device: torch.device,
) -> EmuDrawer:
    """A drawer with some weights (canonical name -> full tensor), copied in float32."""
    with torch.device("meta"):
        unet: DecoderUNet = build_unet(sizes)
    unet.to_empty(device=device)
    state = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in tensors.items()}
    try:
        unet.load_state_dict(state)
    except RuntimeError as error:
        raise ContentError(f"the weights do not fit the decoder's sizes: {error}") from error
    return EmuDrawer(unet.eval().requires_grad_(False), sizes, config, vae)
