"""The families a recipe may name, and what each of their phases trains."""

from collections.abc import Mapping

from mmtrain.models.emu.decoder import EMU_DECODER
from mmtrain.models.emu.spec import EMU
from mmtrain.models.spec import ModelSpec
from mmtrain.models.transfusion.spec import TRANSFUSION
from mmtrain.models.vae.spec import VAE
from mmtrain.settings import Phase

FAMILIES: Mapping[str, Mapping[Phase, ModelSpec]] = {
    "emu": {Phase.pretrain: EMU, Phase.instruct: EMU, Phase.decoder: EMU_DECODER},
    "transfusion": {Phase.pretrain: TRANSFUSION},
    "vae": {Phase.pretrain: VAE},
}


def spec_of(family: str, phase: Phase) -> ModelSpec:
    """What a phase of a family trains; `mmtrain.recipe` has checked that there is such a phase."""
    return FAMILIES[family][phase]
