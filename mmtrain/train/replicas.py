"""Whether ranks that must hold the same weights do: one 64-bit checksum a parameter, compared.

Data ranks hold the same weights below ZeRO-3 (there each holds a part of its own), tensor ranks the
parameters that the tensor plan leaves whole, under ZeRO-3 the same part of them. Ranks drift apart
by a fault of memory or network, or by a bug: BLOOM-176B's layer norms differed between tensor ranks
because of one in clipping. Weights are compared bit by bit.

Cost: one pass over the weights, 1 ms for 1M numbers on one CPU thread, and a gather of 8 bytes a
parameter.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.errors import DivergedError
from mmtrain.layout.plan import TensorPlan
from mmtrain.parallel.build import canonical_parameters
from mmtrain.train.ema import local_part
from mmtrain.train.engine import Engine

_CHUNK = 1 << 18  # numbers at a time: 2 MB of factors and as much of products
_MIX = -7046029254386353131  # 2^64 / golden ratio as a signed number; odd
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(x: Tensor, factors: Tensor) -> Tensor:
    """Checksum of the bits of `x` and their order, an int64 scalar on its device.

    Odd factors are invertible modulo 2^64, so a change of one number always changes it.

    Args:
        x: of any type and shape.
        factors: from `odd_factors`, on the device of `x`.
    """
    flat = x.detach().contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in torch.split(bits, len(factors)):
        total = total * _MIX + (part.long() * factors[: len(part)]).sum()
    return total


def odd_factors(device: torch.device, count: int = _CHUNK) -> Tensor:
    """Distinct odd numbers, int64 `[count]`."""
    numbers = torch.arange(count, dtype=torch.int64, device=device)
    return (2 * numbers + 1) * _MIX


class Replicas:
    """Compares the weights of an engine with those of its replicas."""

    def __init__(self, engine: Engine, plan: TensorPlan) -> None:
        """Nothing is compared yet."""
        self._engine, self._plan = engine, plan

    def compare(self, step: int) -> None:
        """Compare; a collective over all ranks.

        Raises:
            DivergedError: on all ranks, naming the first parameter that differs and the ranks.
        """
        mesh = self._engine.mesh
        names, sums = self._checksums()
        whole = [n for n, name in enumerate(names) if self._plan.slice_of(name) is None]
        replicated = range(len(names)) if mesh.dims.zero_stage < 3 else ()
        found = {}
        for axis, numbers, group in (
            ("data", replicated, mesh.data_group),
            ("tensor", whole, mesh.tensor_group),
        ):
            first = _first_difference(sums[list(numbers)], group)
            found[axis] = None if first is None else (names[numbers[first[0]]], first[1])
        count = sum(difference is not None for difference in found.values())
        if not mesh.sum_over_world(torch.tensor([float(count)])).item():
            return
        faults = [_described(axis, mesh.gather(found[axis])) for axis in found]
        text = "; ".join(fault for fault in faults if fault)
        raise DivergedError(
            f"step {step}: weights that must be equal are not: {text}. Nothing was saved since; "
            "start again from the last checkpoint, without the odd rank's device if it comes back"
        )

    def _checksums(self) -> tuple[list[str], Tensor]:
        """Names of this rank's parameters, and int64 `[names]`."""
        device = self._engine.mesh.device
        factors = odd_factors(device)
        named = list(canonical_parameters(self._engine.named_layers()))
        sums = torch.zeros(len(named), dtype=torch.int64, device=device)
        for number, (_, parameter) in enumerate(named):
            sums[number] = checksum(local_part(parameter), factors)
        return [name for name, _ in named], sums


def _first_difference(sums: Tensor, group: dist.ProcessGroup) -> tuple[int, int] | None:
    """Number of the first parameter that is not the same in the whole group; checksum here."""
    if group.size() == 1 or not len(sums):
        return None
    gathered = [torch.empty_like(sums) for _ in range(group.size())]
    dist.all_gather(gathered, sums, group=group)
    differing = (torch.stack(gathered) != sums).any(0).nonzero()
    if not len(differing):
        return None
    first = int(differing[0])
    return first, int(sums[first])


def _described(axis: str, found: Iterable[tuple[str, int] | None]) -> str:
    """Who holds what of the first differing parameter of some ranks' groups."""
    holders: dict[int, list[int]] = {}
    first: str | None = None
    for rank, difference in enumerate(found):
        if difference is not None and first in (None, difference[0]):
            first = difference[0]
            holders.setdefault(difference[1], []).append(rank)
    if first is None:
        return ""
    held = ", ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: "
        f"{value & (2**64 - 1):016x}"
        for value, ranks in sorted(holders.items(), key=lambda entry: len(entry[1]))
    )
    return f"{first} between {axis} ranks ({held})"
