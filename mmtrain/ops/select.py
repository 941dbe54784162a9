"""Which implementation of an op runs on a device.

One place decides, so that a kernel that comes later is one more row here and nothing else
changes. Every implementation of an op has the same contract as its torch reference. The recipe's
`ops.attention` is told here once (`use`), before the first step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch

from mmtrain.ops.extension import load_kernels


class Preference(Enum):
    """What a recipe asks for; `auto` takes the kernels where they can run."""

    auto = "auto"
    cuda = "cuda"  # the kernels of kernels/, or no run at all
    torch = "torch"  # torch's own operations


class AttentionBackend(Enum):
    """Implementations of `ops.attention.interval_attention`."""

    TILES = "tiles"  # tiles of query rows over scaled_dot_product_attention; the reference
    FLEX = "flex"  # FlexAttention with a block mask; needs Triton


class QkBackend(Enum):
    """Implementations of the way of queries and keys from their projections to attention."""

    CHAIN = "chain"  # norm, rotary embedding and similarity as the modules compute them
    KERNEL = "kernel"  # one op, `ops.qk_norm_rope`


@dataclass(frozen=True)
class Row:
    """One line of the table: what runs an op, and why."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        """Columns of the table."""
        return f"{self.op:22} {self.implementation:16} {self.reason}"


_preferences: list[Preference] = [Preference.auto]


def use(preference: Preference) -> None:
    """Choose for this process; without it kernels run where they can."""
    _preferences[:] = [preference]


def attention_backend(device: torch.device) -> AttentionBackend:
    """The fastest attention over key intervals on `device`."""
    return AttentionBackend.FLEX if device.type == "cuda" else AttentionBackend.TILES


def qk_backend(device: torch.device) -> QkBackend:
    """How queries and keys are normalised and turned on `device`."""
    return _qk_backend(device.type, _preferences[0])


def no_kernels() -> str:
    """Why the kernels cannot run in this process, and the way out; empty when they can."""
    return load_kernels().reason


def table(device: torch.device) -> Iterator[Row]:
    """What runs every op that has more than one implementation on `device`."""
    kernels = qk_backend(device) is QkBackend.KERNEL
    reason = _reason(device)
    yield Row("qk_norm_rope", "kernel" if kernels else "torch", reason)
    yield Row("cosine_attention", "kernel" if kernels else "torch", reason)
    flex = attention_backend(device) is AttentionBackend.FLEX
    yield Row(
        "interval_attention",
        "FlexAttention" if flex else "SDPA in tiles",
        "block mask from the intervals" if flex else "FlexAttention is slow on a CPU",
    )


@cache
def _qk_backend(kind: str, preference: Preference) -> QkBackend:
    chosen = kind == "cuda" and preference is not Preference.torch and not no_kernels()
    return QkBackend.KERNEL if chosen else QkBackend.CHAIN


def _reason(device: torch.device) -> str:
    if device.type != "cuda":
        return f"kernels need a CUDA device, this is a {device.type}"
    if _preferences[0] is Preference.torch:
        return "ops.attention: torch"
    return no_kernels() or str(load_kernels().path)
