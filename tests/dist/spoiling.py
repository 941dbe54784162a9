"""Ways to spoil the numbers of a run; called in the rank before its command.

Steps are counted from 1 by the calls of `train_step`, so they count batches of the data too.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from mmtrain.parallel.build import Fold, canonical_parameters
from mmtrain.train import engine as engines

_step = 0  # that is being made


def _count(after: Callable[[Any], None] = lambda engine: None) -> None:
    """Count steps; `after` is called with the engine at the end of each."""
    for kind in (engines.FoldEngine, engines.StageEngine):

        def counted(self: Any, *args: Any, plain: Any = kind.train_step) -> Any:
            global _step
            _step += 1
            report = plain(self, *args)
            after(self)
            return report

        kind.train_step = counted


def _change_losses(steps: set[int], change: Callable[[Any], Any]) -> None:
    plain = engines._Base.weighted_sum

    def weighted_sum(self: Any, values: Any, targets: Any) -> Any:
        if _step in steps:
            values = {name: change(value) for name, value in values.items()}
        return plain(self, values, targets)

    engines._Base.weighted_sum = weighted_sum


def _numbers(word: str) -> set[int]:
    return {int(number) for number in word.split(",")}


def infinite_loss(rank: int, word: str) -> None:
    """Infinite losses whose gradients are finite, on rank R at steps A,B,...: `R A,B`."""
    spoilt, steps = word.split()
    _count()
    if rank == int(spoilt):
        _change_losses(_numbers(steps), lambda value: value + float("inf"))


def loss_then_gradient(rank: int, word: str) -> None:
    """An infinite loss on rank R at step A, at step B one NaN gradient on rank 0: `R A B`."""
    spoilt, first, second = map(int, word.split())
    infinite_loss(rank, f"{spoilt} {first}")
    if rank != 0:
        return
    for kind in (engines.FoldEngine, engines.StageEngine):

        def spoilt_step(self: Any, *args: Any, plain: Any = kind.train_step) -> Any:
            if _step + 1 == second:  # `plain` counts
                name, parameter = next(
                    (n, p) for n, p in canonical_parameters(self.named_layers()) if p.requires_grad
                )
                hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
                print(f"spoils {name}")
                report = plain(self, *args)
                hook.remove()
                return report
            return plain(self, *args)

        kind.train_step = spoilt_step


def hundredfold_loss(rank: int, word: str) -> None:
    """A hundredfold loss on all ranks at steps A,B,...: `A,B`."""
    _count()
    _change_losses(_numbers(word), lambda value: value * 100)


def flipped_weight(rank: int, word: str) -> None:
    """One bit of parameter P flips on rank R after step A: `R A P`."""
    spoilt, step, name = word.split()

    def flip(engine: Any) -> None:
        if _step == int(step):
            parameter: Any = dict(canonical_parameters(engine.named_layers()))[name]
            held = getattr(parameter, "ds_tensor", parameter).data.view(-1)
            held[-1:] = torch.nextafter(held[-1:].clone(), torch.tensor(9e9))

    _count(flip if rank == int(spoilt) else lambda engine: None)


def slow_forward(rank: int, word: str) -> None:
    """Each forward pass of rank R takes M milliseconds more: `R M`."""
    slow, milliseconds = map(int, word.split())
    plain = Fold.forward

    def forward(self: Any, flow: Any) -> Any:
        time.sleep(milliseconds / 1e3)
        return plain(self, flow)

    if rank == slow:
        Fold.forward = forward
