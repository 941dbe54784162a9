"""Which rank holds the others up: its own work of a step, compared with its peers'.

Own work is the wait for data and the forward pass of the rank's modules. Backward pass and
optimizer step are left out, because they wait for other ranks; so does a forward pass where ranks
communicate in it: tensor ranks wait for each other, data ranks under ZeRO-3 too. A slow rank then
shows as a slow tensor group, or in its wait for data alone. Peers are the ranks of one pipeline
stage, whose work is the same. The median over `_WINDOW` steps counts, not single pauses.

Cost: two clock readings (events on a GPU, read at the end of the window) a micro-batch; one gather
of a number and a name every `_WINDOW` steps.
"""

import logging
import socket
from statistics import median
from time import perf_counter
from typing import Any

import torch

from mmtrain.train.engine import Engine

log = logging.getLogger(__name__)

_WINDOW = 50  # steps


class Pace:
    """Times this rank's own work and names ranks that are slow."""

    def __init__(self, engine: Engine, limit: float) -> None:
        """Watch the forward passes of `engine.model` from now on.

        Args:
            engine: whose steps are timed.
            limit: times the median of its peers beyond which a rank is named.
        """
        self._mesh, self._limit = engine.mesh, limit
        self._cuda = engine.mesh.device.type == "cuda"
        self._began: Any = None
        self._passes: list[tuple[Any, Any]] = []  # of this step
        self._steps: list[tuple[float, list[tuple[Any, Any]]]] = []  # data wait, passes
        self._named: set[int] = set()
        engine.model.register_forward_pre_hook(self._begin)
        engine.model.register_forward_hook(self._end)

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _begin(self, module: torch.nn.Module, *_: Any) -> None:
        self._began = self._now() if module.training else None

    def _end(self, module: torch.nn.Module, *_: Any) -> None:
        if self._began is not None:
            self._passes.append((self._began, self._now()))

    def _seconds(self, passes: list[tuple[Any, Any]]) -> float:
        if self._cuda:
            return float(sum(begin.elapsed_time(end) for begin, end in passes) / 1e3)
        return float(sum(end - begin for begin, end in passes))

    def step(self, number: int, data_seconds: float) -> float | None:
        """Count a step; a collective at the end of each window.

        Args:
            number: of the step, for the log.
            data_seconds: what this rank waited for data.

        Returns:
            Own work of the slowest rank over the median of its peers; None within a window.
        """
        self._steps.append((data_seconds, self._passes))
        self._passes = []
        if len(self._steps) < _WINDOW:
            return None
        if self._cuda:
            torch.cuda.synchronize()
        own = median(waited + self._seconds(passes) for waited, passes in self._steps)
        self._steps = []
        seen: list[tuple[float, str]] = self._mesh.gather((own, socket.gethostname()))
        stages = [self._mesh.dims.coord(rank)[0] for rank in range(len(seen))]
        ratios = slowness([seconds for seconds, _ in seen], stages)
        for rank, ratio in enumerate(ratios):
            if ratio > self._limit and rank not in self._named:
                self._named.add(rank)
                if self._mesh.rank == 0:
                    log.warning(
                        "step %d: rank %d on %s is slow: its own work takes %.0f ms a step, %.2f "
                        "times that of its peers (watch.slow_rank = %g; told once)",
                        number,
                        rank,
                        seen[rank][1],
                        1e3 * seen[rank][0],
                        ratio,
                        self._limit,
                    )
        return max(ratios)


def slowness(seconds: list[float], stages: list[int]) -> list[float]:
    """Of each rank: its time over the median of the other ranks of its stage; 1 without others."""
    out = []
    for rank, own in enumerate(seconds):
        others = [
            time
            for other, time in enumerate(seconds)
            if other != rank and stages[other] == stages[rank]
        ]
        out.append(own / max(median(others), 1e-9) if others else 1.0)
    return out
