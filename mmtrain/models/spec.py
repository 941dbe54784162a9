"""What a family declares: layers, tensor plan, initial weights, costs, losses.

A family is a row of `families.FAMILIES`; engine, loop, loader and checkpoints know only this.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain.data.batch import Batch
from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import ContentError, Problem
from mmtrain.layout.names import deciding
from mmtrain.layout.plan import TensorPlan
from mmtrain.models.writing import TrunkSampler
from mmtrain.nn.init import InitialRules


@dataclass(frozen=True)
class Layer:
    """One named layer: `build()` allocates it (call it under `torch.device("meta")`)."""

    name: str
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a micro-batch: packed tokens, and images (a mean may be broken)."""

    tokens: int
    images: float


def _everything(config: Any, name: str) -> bool:
    return True


def _no_patterns(config: Any) -> Mapping[str, tuple[str, ...]]:
    return {}


class Use(Enum):
    """What a micro-batch is for."""

    training = "training"
    heldout = "heldout"


def _as_it_is(
    config: Any, layout: SequenceFormat, device: torch.device, use: Use
) -> Callable[[Batch], Batch]:
    return lambda batch: batch


@dataclass(frozen=True)
class StoredLatents:
    """Where latents of all pictures lie that were made before, and what they must be.

    Attributes:
        folder: of the shards.
        vae: folder of the VAE that made them.
        form: channels (mean and log variance), height and width of a picture's numbers.
    """

    folder: Path
    vae: Path
    form: tuple[int, int, int]


def _nothing_stored(config: Any, folder: Path | None) -> StoredLatents | None:
    return None


def _settled_as_written(config: Any) -> Any:
    return config


def _writes_nothing(
    config: Any, layers: Mapping[str, nn.Module], form: SequenceFormat
) -> TrunkSampler:
    raise ContentError("this phase trains no model that writes; name a run of another phase")


def _nothing_missing(config: Any) -> Iterable[Problem]:
    return ()


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A family.

    Attributes:
        name: family name, as in a recipe.
        config_type: frozen dataclass of the `model:` section.
        problems: (config, tensor ranks) -> faults of the section, places start with `model.`.
        layers: config -> the whole model; its forward is the fold of this list. The last layer
            returns `{loss name: values}`, unreduced losses aligned with `Targets.weights`.
        plan: how tensor ranks share the layers.
        initial: config -> how each parameter is drawn.
        flops: (config, shape) -> forward floating-point operations of each layer.
        losses: names of the losses, e.g. `("text", "image")`.
        fields: names of the integer fields of the input flow, in order.
        sequence: config -> how documents become token rows.
        context: config -> positions of the longest document.
        vocabulary: config -> rows of the token table; a tokenizer may have fewer tokens.
        vocabulary_tables: parameters with one row for each token; a run that starts from a model
            with fewer tokens gets new rows there.
        trains: (config, canonical name) -> whether the parameter is trained by this phase.
        patterns: config -> name patterns in the section, by key; each must cover a parameter.
        prepare: (config, sequence format, device, use) -> what a rank makes of a micro-batch of
            the loader before the engine gets it: of pixels what the first layer takes, by frozen
            models and drawn noise. A function of the batch alone.
        stored: (config, folder) -> latents of all pictures that were made before, in the folder
            that the section names, or that shall be made in `folder`; None for a model that takes
            none. `prepare` finds them where pixels would be.
        settled: config -> the same with what the files it names decide written into it, so that
            the run's own recipe says it; raises RecipeError for one that is damaged.
        sampler: (config, layers by name, sequence format) -> what writes with trained layers.
        missing: config -> files that the section names and that are not there.
        schedulers: ways to draw pictures that the model draws itself; none = a decoder draws them.
    """

    name: str
    config_type: type
    problems: Callable[[Any, int], Iterable[Problem]]
    layers: Callable[[Any], list[Layer]]
    plan: TensorPlan
    initial: Callable[[Any], InitialRules]
    flops: Callable[[Any, BatchShape], list[float]]
    losses: tuple[str, ...]
    fields: tuple[str, ...]
    sequence: Callable[[Any, Mapping[str, int]], SequenceFormat]
    context: Callable[[Any], int]
    vocabulary: Callable[[Any], int]
    vocabulary_tables: tuple[str, ...] = ()
    trains: Callable[[Any, str], bool] = _everything
    patterns: Callable[[Any], Mapping[str, tuple[str, ...]]] = _no_patterns
    prepare: Callable[[Any, SequenceFormat, torch.device, Use], Callable[[Batch], Batch]] = (
        _as_it_is
    )
    stored: Callable[[Any, Path | None], StoredLatents | None] = _nothing_stored
    settled: Callable[[Any], Any] = _settled_as_written
    sampler: Callable[[Any, Mapping[str, nn.Module], SequenceFormat], TrunkSampler] = (
        _writes_nothing
    )
    missing: Callable[[Any], Iterable[Problem]] = _nothing_missing
    schedulers: tuple[str, ...] = ()

    def is_trained(self, config: Any, freeze: Iterable[str], name: str) -> bool:
        """Whether a run trains a parameter: the phase does, and no pattern of `freeze` covers it.

        Args:
            config: the `model:` section.
            freeze: `train.freeze` of the recipe.
            name: canonical name.
        """
        return self.trains(config, name) and deciding(freeze, name) is None
