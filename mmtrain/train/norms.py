"""Gradient norms: the global one, and one per layer on request.

DeepSpeed reports the global norm under ZeRO; at stage 0 in float32 it clips without telling, by a
norm that is off by up to 8e-5 (one float32 sum over millions of squares), so norm and clipping are
done here. Norms per layer are read from the engine's own gradient storage in the moment between
the last reduction and the optimizer step.

A step whose norm is not finite is not made, on all ranks alike, because the norm is one number of
all ranks: DeepSpeed's optimizers drop their gradients by `zero_grad` and set `overflow` (0.19.8,
`step` of runtime/zero/stage_1_and_2.py and stage3.py, and of fp16/ for bf16 without ZeRO), torch's
is not called. A step is refused for other reasons by making one gradient NaN. Gradients that are to
be dropped are looked at first.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.parallel.mesh import Mesh
from mmtrain.train.state import Refusal


class GradientNorms:
    """Watches the optimizer step of a DeepSpeed engine.

    Attributes:
        wanted: set to True before a step to get `by_layer` for it.
        total: global 2-norm of the last step, before clipping.
        by_layer: canonical layer prefix -> 2-norm; empty when not wanted.
        skipped: why the last step was not made; None when it was.
        admits: asked before each optimizer step; False refuses it, on all ranks or on none.
    """

    def __init__(self, engine: Any, layers: Iterable[tuple[str, nn.Module]], mesh: Mesh) -> None:
        """Wrap `engine.optimizer.step`; `layers` are this rank's, by canonical prefix."""
        self.engine, self.mesh = engine, mesh
        self.layers = {id(p): name for name, module in layers for p in module.parameters()}
        self.parameters = tuple(engine.module.parameters())  # walking the modules takes 1 ms
        self.wanted = False
        self.by_layer: dict[str, float] = {}
        self.skipped: Refusal | None = None
        self.admits: Callable[[], bool] | None = None
        self._own_total = 0.0
        self._measured = False  # by_layer is already that of the coming step
        self._stepping = False
        self._step = engine.optimizer.step
        engine.optimizer.step = self._measured_step
        if hasattr(engine.optimizer, "overflow"):
            engine.optimizer.zero_grad = self._looking(engine.optimizer.zero_grad)

    @property
    def total(self) -> float:
        """Global 2-norm of the last step's gradients, before clipping."""
        reported = self.engine.get_global_grad_norm()
        return self._own_total if reported is None else float(reported)

    def _measured_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self._measured:
            self._measure_layers()
        self._measured = False
        self.skipped = None
        if self.admits is not None and not self.admits():
            self.skipped = Refusal("spike")
            self._spoil()
        if hasattr(self.engine.optimizer, "overflow"):
            self._stepping = True
            out = self._step(*args, **kwargs)
            self._stepping = False
            return out
        if self.skipped is None and not math.isfinite(self._own_total):
            self.skipped = self._look()
        return None if self.skipped is not None else self._step(*args, **kwargs)

    def _looking(self, discard: Callable[..., Any]) -> Callable[..., Any]:
        """`discard`, which looks at the gradients of a refused step first."""

        def look_and_discard(*args: Any, **kwargs: Any) -> Any:
            if self._stepping and self.engine.optimizer.overflow and self.skipped is None:
                self.skipped = self._look()
            return discard(*args, **kwargs)

        return look_and_discard

    def _look(self) -> Refusal:
        """Layers whose gradients are not finite; a collective."""
        squares = self._squares()
        spoilt = tuple(name for name, value in squares.items() if not math.isfinite(value))
        return Refusal("non-finite", spoilt, len(squares))

    def _spoil(self) -> None:
        """Make a gradient NaN, so that DeepSpeed's optimizers drop them all."""
        for parameter, gradient, _ in self._gradients():
            if gradient is not None and gradient.numel() and self._counts(parameter):
                gradient.detach()[(0,) * gradient.dim()] = math.nan
                return

    def _measure_layers(self) -> None:
        self.by_layer = {}
        if self.wanted:
            squares = self._squares()
            self.by_layer = {name: value**0.5 for name, value in sorted(squares.items())}

    def clip_whole(self, clip_norm: float) -> None:
        """Measure whole (not partitioned) gradients, then clip them; ZeRO stage 0 in float32.

        Args:
            clip_norm: global norm that the gradients keep at most; 0 = no limit.
        """
        found = [(p, p.grad) for p in self.parameters if p.grad is not None]
        square = sum_of_squares(g for p, g in found if self._counts(p))
        share = torch.tensor([square / self.mesh.dims.data], dtype=torch.float64)
        self._own_total = float(self.mesh.sum_over_world(share)[0]) ** 0.5
        self._measure_layers()
        self._measured = True
        if self._own_total > clip_norm > 0:
            torch._foreach_mul_([g for _, g in found], clip_norm / self._own_total)

    def _counts(self, parameter: Tensor) -> bool:
        """Whether this rank counts it: a parameter that every tensor rank holds counts once."""
        return self.mesh.tensor == 0 or bool(getattr(parameter, "tensor_model_parallel", False))

    def _squares(self) -> dict[str, float]:
        """Squared norm per layer over all ranks, in the order of the model."""
        local = dict.fromkeys(self.layers.values(), 0.0)
        for parameter, gradient, copies in self._gradients():
            layer = self.layers.get(id(parameter))
            if layer is None:  # a filler of an empty optimizer group
                continue
            if gradient is not None and self._counts(parameter):
                local[layer] += sum_of_squares([gradient]) / copies
        out: dict[str, float] = {}
        for part in self.mesh.gather(local):
            for layer, square in part.items():
                out[layer] = out.get(layer, 0.0) + square
        return out

    def _gradients(self) -> Iterable[tuple[Tensor, Tensor | None, int]]:
        """(parameter, averaged gradient or this rank's part of it, how many ranks hold it)."""
        optimizer = self.engine.optimizer
        averaged = getattr(optimizer, "averaged_gradients", None)
        if not averaged:
            for parameter in self.parameters:
                yield parameter, parameter.grad, self.mesh.dims.data
            return
        groups = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups
        for number, gradients in averaged.items():
            real = (g for g in gradients if not getattr(g, "_zero_padding", False))
            for parameter, gradient in zip(groups[number], real, strict=False):
                yield parameter, gradient, 1


def sum_of_squares(gradients: Iterable[Tensor]) -> float:
    """Sum of all squares, to about 1e-9: rows in float32, what they add up to in float64.

    One pass: 0.4 ms for 4M numbers, a copy in float64 takes 7 ms. Vectors, which may be long here
    (partitions), are summed in float64.
    """
    norms = [_row_norms(gradient.detach()) for gradient in gradients]
    return float(torch.cat(norms).square().sum()) if norms else 0.0


def _row_norms(x: Tensor) -> Tensor:
    """Norm of each row, float64 `[rows]`; a vector is one row."""
    if x.dim() < 2:
        whole: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
        return whole.view(1)
    rows: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return rows.flatten().double()
