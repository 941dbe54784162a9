"""Gradient norms: the global one, and one per layer on request.

DeepSpeed reports the global norm under ZeRO; at stage 0 it clips without telling, so the norm is
computed here. Norms per layer are read from the engine's own gradient storage in the moment
between the last reduction and the optimizer step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.parallel.mesh import Mesh


class GradientNorms:
    """Watches the optimizer step of a DeepSpeed engine.

    Attributes:
        wanted: set to True before a step to get `by_layer` for it.
        total: global 2-norm of the last step, before clipping.
        by_layer: canonical layer prefix -> 2-norm; empty when not wanted.
    """

    def __init__(self, engine: Any, layers: Iterable[tuple[str, nn.Module]], mesh: Mesh) -> None:
        """Wrap `engine.optimizer.step`; `layers` are this rank's, by canonical prefix."""
        self.engine, self.mesh = engine, mesh
        self.layers = {id(p): name for name, module in layers for p in module.parameters()}
        self.wanted = False
        self.by_layer: dict[str, float] = {}
        self._own_total = 0.0
        self._measured = False  # by_layer is already that of the coming step
        self._step = engine.optimizer.step
        engine.optimizer.step = self._measured_step

    @property
    def total(self) -> float:
        """Global 2-norm of the last step's gradients, before clipping."""
        reported = self.engine.get_global_grad_norm()
        return self._own_total if reported is None else float(reported)

    def _measured_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self._measured:
            self._measure_layers()
        self._measured = False
        return self._step(*args, **kwargs)

    def _measure_layers(self) -> None:
        self.by_layer = {}
        if self.wanted:
            squares = self._squares()
            self.by_layer = {name: value**0.5 for name, value in squares.items()}

    def measure_whole(self) -> None:
        """Global norm of whole (not partitioned) gradients; ZeRO stage 0 before it clips."""
        square = sum((self._square(p, p.grad) for p in self.engine.module.parameters()), 0.0)
        share = torch.tensor([square / self.mesh.dims.data], dtype=torch.float64)
        self._own_total = float(self.mesh.sum_over_world(share)[0]) ** 0.5
        self._measure_layers()
        self._measured = True

    def _square(self, parameter: Tensor, gradient: Tensor | None) -> float:
        """Squared norm, counted on one tensor rank only when every rank holds it whole."""
        if gradient is None:
            return 0.0
        split = getattr(parameter, "tensor_model_parallel", False)
        if not split and self.mesh.tensor != 0:
            return 0.0
        return float(gradient.detach().double().pow(2).sum())

    def _squares(self) -> dict[str, float]:
        """Squared norm per layer over all ranks."""
        local: dict[str, float] = {}
        for parameter, gradient, copies in self._gradients():
            layer = self.layers.get(id(parameter))
            if layer is None:  # a filler of an empty optimizer group
                continue
            local[layer] = local.get(layer, 0.0) + self._square(parameter, gradient) / copies
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, local)
        out: dict[str, float] = {}
        for part in gathered:
            for layer, square in part.items():
                out[layer] = out.get(layer, 0.0) + square
        return dict(sorted(out.items()))

    def _gradients(self) -> Iterable[tuple[Tensor, Tensor | None, int]]:
        """(parameter, averaged gradient or this rank's part of it, how many ranks hold it)."""
        optimizer = self.engine.optimizer
        averaged = getattr(optimizer, "averaged_gradients", None)
        if not averaged:
            for parameter in self.engine.module.parameters():
                yield parameter, parameter.grad, self.mesh.dims.data
            return
        groups = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups
        for number, gradients in averaged.items():
            real = (g for g in gradients if not getattr(g, "_zero_padding", False))
            for parameter, gradient in zip(groups[number], real, strict=False):
                yield parameter, gradient, 1
