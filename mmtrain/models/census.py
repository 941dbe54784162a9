"""Every parameter of a model, counted on meta tensors: nothing is allocated."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from mmtrain.models.spec import ModelSpec


@dataclass(frozen=True)
class LayerCensus:
    """The parameters of one layer.

    Attributes:
        name: canonical prefix of the layer.
        shapes: full canonical name -> shape of the full tensor.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def take_census(spec: ModelSpec, config: Any) -> list[LayerCensus]:
    """Build every layer on meta and list its parameters, in the order of the layers."""
    out = []
    for layer in spec.layers(config):
        with torch.device("meta"):
            module = layer.build()
        shapes = {f"{layer.name}.{n}": tuple(p.shape) for n, p in module.named_parameters()}
        out.append(LayerCensus(layer.name, shapes))
    return out


def count_by_part(census: list[LayerCensus]) -> dict[str, int]:
    """Numbers in each part: layers that share the first component of their name."""
    parts: dict[str, int] = {}
    for layer in census:
        part = layer.name.partition(".")[0]
        parts[part] = parts.get(part, 0) + layer.count
    return parts


def local_count(spec: ModelSpec, shapes: dict[str, tuple[int, ...]], tensor_ranks: int) -> int:
    """Numbers that one of `tensor_ranks` ranks holds of these parameters."""
    total = 0
    for name, shape in shapes.items():
        cut = spec.plan.slice_of(name) if tensor_ranks > 1 else None
        local = list(shape)
        if cut is not None:
            local[cut.dim] = cut.local_length(shape[cut.dim], tensor_ranks)
        total += math.prod(local)
    return total
