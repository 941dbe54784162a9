"""A running mean of the weights: shadow = decay * shadow + (1 - decay) * weight, after each step.

Kept in float32 on each rank beside what it holds of the weights (under ZeRO-3 its partition), so
nothing is communicated. The first steps count more: the decay of step n is at most
(1 + n) / (10 + n), as in diffusers' `EMAModel`; it is a function of the step, so a resumed run
goes on bit for bit.

Cost: 4 bytes a trained number held, one pass over the weights a step.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.parallel.build import canonical_parameters
from mmtrain.parallel.mesh import Mesh
from mmtrain.train.engine import Engine


def local_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: all of it, or its ZeRO-3 partition."""
    held: Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    return held.data


class Ema:
    """The running means of an engine's trained weights, by canonical name."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """Begin at the weights as they are.

        Args:
            engine: whose weights.
            decay: of the mean, below 1.
        """
        self.decay = decay
        self._parameters = {
            name: parameter
            for name, parameter in canonical_parameters(engine.named_layers())
            if parameter.requires_grad
        }
        self.means = {name: self._weight(name).clone() for name in self._parameters}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Count the weights after optimizer step `step` (from 1 on)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [self._weight(name) for name in self._parameters]
        torch._foreach_lerp_(list(self.means.values()), weights, 1 - decay)

    def _weight(self, name: str) -> Tensor:
        return local_part(self._parameters[name]).float()


def held_weights(engine: Engine, ema: Ema | None) -> dict[str, Tensor]:
    """This rank's part of what a run draws with: running means, or weights where none are kept."""
    named = canonical_parameters(engine.named_layers())
    weights = {name: local_part(parameter) for name, parameter in named}
    return weights if ema is None else weights | ema.means


def full_tensors(
    local: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> dict[str, Tensor]:
    """Full tensors on rank 0 of what data ranks hold (weights or means); empty on the others.

    A collective under ZeRO-3, where a data rank holds an equal, flat part of each tensor. Tensor
    and pipeline ranks are not joined.
    """
    assert mesh.dims.tensor == mesh.dims.pipeline == 1, mesh.dims
    if mesh.dims.zero_stage < 3:
        return dict(local) if mesh.rank == 0 else {}
    out = {}
    for name, part in local.items():
        flat = part.flatten()
        parts = [torch.empty_like(flat) for _ in range(mesh.dims.data)]
        dist.all_gather(parts, flat, group=mesh.data_group)
        if mesh.rank == 0:
            out[name] = torch.cat(parts)[: math.prod(shapes[name])].view(shapes[name])
    return out
