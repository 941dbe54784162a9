"""The families a recipe may name."""

from collections.abc import Mapping

from mmtrain.models.emu.spec import EMU
from mmtrain.models.spec import ModelSpec

FAMILIES: Mapping[str, ModelSpec] = {"emu": EMU}
