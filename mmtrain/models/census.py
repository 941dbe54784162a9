"""Every parameter of a model, counted on meta tensors: nothing is allocated."""

import math
from collections.abc import Callable
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


def forward_passes(census: list[LayerCensus], is_trained: Callable[[str], bool]) -> list[float]:
    """Forward-sized passes that a training step makes over each layer.

    One forward; one for the gradient of its input, once anything in it or below it is trained;
    and the trained share of its numbers for their own gradients. So 3 where everything is
    trained, about 2 where adapters are, 1 below them.
    """
    out, reached = [], False
    for layer in census:
        trained = sum(math.prod(s) for name, s in layer.shapes.items() if is_trained(name))
        reached = reached or trained > 0
        out.append(1.0 + reached + (trained / layer.count if layer.count else 0.0))
    return out


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
