"""What this rank holds of the model and its optimizer, by canonical name: live views.

The same list is what a checkpoint is written from and read into. DeepSpeed lays masters and moments
of many parameters in flat buffers, cut where the data ranks' parts end; its own maps say which
numbers of which parameter lie where (0.19.8):

    ZeRO-1, 2, stages  `parameter._hp_mapping` (utils/tensor_fragment.py), None = not on this rank
    ZeRO-3             `optimizer.grad_position` (runtime/zero/stage3.py), offsets in a sub-group
    bf16 under ZeRO-0  `fp32_groups` of runtime/fp16/unfused_optimizer.py, one copy a parameter, or
                       `fp32_groups_flat` of fused_optimizer.py (apex's and DeepSpeed's Adam)
    fp32 under ZeRO-0  torch's optimizer over the parameters themselves
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.pieces import MASTER, MEAN, MOMENT, WEIGHT
from mmtrain.parallel.build import canonical_parameters
from mmtrain.train.ema import Ema, local_part
from mmtrain.train.engine import Engine


@dataclass(frozen=True)
class Held:
    """Consecutive numbers of this tensor rank's slice of a parameter.

    Attributes:
        kind: as in `checkpoint.pieces.WEIGHT`.
        name: canonical name.
        start: place of the first number in the flattened slice.
        numbers: flat live view, on the device.
        shared: whether every data rank holds the same numbers.
    """

    kind: str
    name: str
    start: int
    numbers: Tensor
    shared: bool


def held(engine: Engine, ema: Ema | None) -> Iterator[Held]:
    """Weights, running means, masters and moments of this rank.

    Moments are there once the optimizer has made a step, or after `make_states`.
    """
    named = dict(canonical_parameters(engine.named_layers()))
    for name, parameter in named.items():
        yield _part(WEIGHT, name, parameter, local_part(parameter), engine)
    if ema is not None:
        for name, mean in ema.means.items():
            yield _part(MEAN, name, named[name], mean, engine)
    names = {id(parameter): name for name, parameter in named.items()}
    for slot in _slots(engine, names):
        if slot.is_copy:
            yield slot.of(MASTER, slot.master.detach())
        for key, state in _inner(engine).state[slot.master].items():
            if isinstance(state, Tensor) and state.shape == slot.master.shape:
                yield slot.of(MOMENT + key, state)


def optimizer_steps(engine: Engine) -> int:
    """Steps that the optimizer has counted, the same for every parameter."""
    inner = _inner(engine)
    counts = {int(state["step"]) for state in inner.state.values() if "step" in state}
    counts |= {int(g["step"]) for g in inner.param_groups if inner.state and "step" in g}
    assert len(counts) <= 1, f"parameters have made different numbers of steps: {counts}"
    return counts.pop() if counts else 0


def make_states(engine: Engine, steps: int) -> None:
    """Give every parameter optimizer states of zeros, as after `steps` steps."""
    inner = _inner(engine)
    for master, group in _masters(engine):
        state = inner.state[master]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(master)
        _set_steps(inner, group, state, master, steps)


def _masters(engine: Engine) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Every tensor that the inner optimizer updates, and its group."""
    optimizer = engine.deepspeed.optimizer
    groups = _inner(engine).param_groups
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3 fills groups in a step only
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield flat, groups[optimizer.sub_group_to_group_id[number]]
        return
    for group in groups:
        for master in group["params"]:
            yield master, group


def _set_steps(inner: Any, group: Any, state: Any, master: Tensor, steps: int) -> None:
    """Each AdamW counts in its own place: torch a tensor, DeepSpeed a number, apex the group."""
    if isinstance(inner, torch.optim.AdamW):
        on_device = group["fused"] or group["capturable"]
        device = master.device if on_device else torch.device("cpu")
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=device)
    elif type(inner).__module__.startswith("apex"):
        group["step"] = steps
    else:
        state["step"] = steps


def _inner(engine: Engine) -> Any:
    """The AdamW below DeepSpeed's wrapper."""
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def _part(kind: str, name: str, parameter: Any, numbers: Tensor, engine: Engine) -> Held:
    """A weight or a mean: whole, or the ZeRO-3 partition without its padding."""
    flat = numbers.detach().view(-1)
    if not hasattr(parameter, "ds_tensor"):
        return Held(kind, name, 0, flat, shared=True)
    start, count = _partition(parameter, engine)
    return Held(kind, name, start, flat[:count], shared=False)


def _partition(parameter: Any, engine: Engine) -> tuple[int, int]:
    """First number of a ZeRO-3 partition, and how many are not padding."""
    size = parameter.ds_tensor.ds_numel
    start = engine.mesh.data * size
    return start, max(0, min(size, parameter.ds_numel - start))


@dataclass(frozen=True)
class _Slot:
    """Where the optimizer keeps numbers of a parameter."""

    name: str
    start: int  # in the parameter's flattened slice
    master: Tensor  # the tensor that the inner optimizer updates
    offset: int  # in that tensor, flattened
    count: int
    is_copy: bool  # of a weight in another type or place
    shared: bool

    def of(self, kind: str, whole: Tensor) -> Held:
        """The numbers in a tensor of the master's shape."""
        numbers = whole.view(-1).narrow(0, self.offset, self.count)
        return Held(kind, self.name, self.start, numbers, self.shared)


def _slots(engine: Engine, names: dict[int, str]) -> Iterator[_Slot]:
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for parameters, flat in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            for parameter in parameters:
                place = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start, count = _partition(parameter, engine)
                yield _Slot(names[id(parameter)], start, flat, place[1], count, True, False)
        return
    for groups, flats in (
        ("bit16_groups", "single_partition_of_fp32_groups"),  # ZeRO-1 and 2
        ("bf16_groups", "fp32_groups_flat_partition"),  # bf16 stages
    ):
        if not hasattr(optimizer, flats):
            continue
        pairs = zip(getattr(optimizer, groups), getattr(optimizer, flats), strict=True)
        for parameters, flat in pairs:
            for parameter in parameters:
                name, mapped = names.get(id(parameter)), parameter._hp_mapping
                if name is None or mapped is None:  # a filler, or not on this rank
                    continue
                inside, outside = mapped.lp_fragment_address, mapped.hp_fragment_address
                yield _Slot(name, inside.start, flat, outside.start, outside.numel, True, False)
        return
    for parameter, master, offset, is_copy in _replicated(optimizer):
        name = names.get(id(parameter))
        if name is not None:
            yield _Slot(name, 0, master, offset, parameter.numel(), is_copy, True)


def _replicated(optimizer: Any) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
    """Without ZeRO: parameter, its master, its place there, and whether the master is a copy."""
    if hasattr(optimizer, "fp32_groups_flat"):
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in parameters:
                yield parameter, flat, offset, True
                offset += parameter.numel()
    elif hasattr(optimizer, "fp32_groups"):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                yield parameter, master, 0, True
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0, False
