"""What layers hand on: one float tensor, then integers of fixed shape.

A model is a list of layers, each `Flow -> Flow`. At a pipeline boundary DeepSpeed wants every
float to receive a gradient, so exactly one float crosses: `hidden`, with the `carried` rows
appended where a family has them (Emu's detached regression targets).

R rows   D width   P carried rows
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

Derived = TypeVar("Derived")
CARRY = "carry"  # integer field of length P: which row each carried row was copied from


@dataclass(frozen=True)
class Flow:
    """State between two layers of a model.

    Attributes:
        hidden: float; pixels `[N, 3, H, W]` before the first layer, `[N, S, C]` inside a vision
            tower, `[R, D]` in the trunk (rows are split under sequence parallelism).
        fields: integer tensors of fixed shape in fixed order.
        carried: float `[P, D]` rows that no layer changes, or None.
        derived: what layers computed from `fields` (rotary tables, attention plans), shared by
            all layers of a stage. It never crosses a stage boundary: the next stage derives anew.
    """

    hidden: Tensor
    fields: dict[str, Tensor]
    carried: Tensor | None = None
    derived: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def with_hidden(self, hidden: Tensor) -> Self:
        """The same flow with new hidden states."""
        return replace(self, hidden=hidden)

    def to(self, device: torch.device) -> Self:
        """The same flow with every tensor on `device`."""
        # from pinned memory a GPU copies while the host goes on
        return self._with_each(lambda t: t.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> Self:
        """The same flow in memory that a GPU copies from by itself."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            hidden=change(self.hidden),
            fields={name: change(field) for name, field in self.fields.items()},
            carried=None if self.carried is None else change(self.carried),
            derived={},
        )

    def derive(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """Return `make()`, computed at most once for this micro-batch on this stage."""
        if key not in self.derived:
            self.derived[key] = make()
        return cast(Derived, self.derived[key])

    def pack(self) -> tuple[Tensor, ...]:
        """The tuple that crosses a stage boundary: one float first, integers after."""
        hidden = self.hidden
        if self.carried is not None:
            hidden = torch.cat([hidden, self.carried])
        return (hidden, *self.fields.values())

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], names: tuple[str, ...]) -> Self:
        """Undo `pack`; `names` are the fields' names in order.

        Carried rows are there exactly when `hidden` has two dims and a `carry` field exists.
        """
        assert len(packed) == len(names) + 1, (len(packed), names)
        hidden, fields = packed[0], dict(zip(names, packed[1:], strict=True))
        if hidden.dim() != 2 or CARRY not in fields:
            return cls(hidden, fields)
        rows = hidden.shape[0] - fields[CARRY].shape[0]
        return cls(hidden[:rows], fields, hidden[rows:])
