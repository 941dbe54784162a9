"""Which implementation of an op runs on a device.

One place decides, so that a kernel that comes later is one more row here and nothing else
changes. Every implementation of an op has the same contract as its torch reference. The recipe's
`ops.attention` is told here once (`use`): where a recipe is read to train or encode by it
(`feed.read_setting`), and where a trained run is loaded to write (`generation.artist`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch.backends import cuda, cudnn
from torch.nn.attention import SDPBackend

from mmtrain.errors import MissingError
from mmtrain.ops.extension import load_kernels

# where cuDNN attends 1.7 to 2.3 times as fast as torch's FlashAttention 2: Hopper, Blackwell
CUDNN_MAJORS = (9, 10)
CUDNN_LEAST = 91501  # older ones fail at lengths that 128 does not divide (pytorch issue 169849)


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


class Shapes(Enum):
    """What shapes the dense attention of one place in a model gets from call to call."""

    REPEATED = "repeated"  # few, again and again
    CHANGING = "changing"  # ever new ones, as of a cache that grows


@dataclass(frozen=True)
class Row:
    """One line of the table: what runs an op, and why."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        """Columns of the table."""
        return f"{self.op:22} {self.implementation:16} {self.reason}"


_cudnn: Any = cudnn  # its functions are untyped
_preferences: list[Preference] = [Preference.auto]
_USUAL_WIDTH = 128  # of a head, for the table; calls ask with their own
_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}


def use(preference: Preference) -> None:
    """Choose for this process; without it kernels run where they can.

    Raises:
        MissingError: the kernels are insisted on, and cannot run.
    """
    if preference is Preference.cuda and (reason := no_kernels()):
        raise MissingError(f"ops.attention: cuda, but {reason}; or say auto, which takes torch")
    _preferences[:] = [preference]


def attention_backend(device: torch.device) -> AttentionBackend:
    """The fastest attention over key intervals that lie on `device`."""
    return AttentionBackend.FLEX if device.type == "cuda" else AttentionBackend.TILES


def qk_backend(device: torch.device) -> QkBackend:
    """How queries and keys are normalised and turned on `device`."""
    return _qk_backend(device.type, _preferences[0])


def dense_backends(
    device: torch.device, dtype: torch.dtype, width: int, shapes: Shapes = Shapes.REPEATED
) -> tuple[SDPBackend, ...]:
    """Backends of torch's dense attention, in the order in which a call tries them.

    Empty on a CPU, where nothing is forced. cuDNN plans every new shape, which takes it tens to
    hundreds of milliseconds: where shapes change it is left out.

    Args:
        device: of queries, keys and values.
        dtype: theirs.
        width: of a head.
        shapes: what the calls bring.
    """
    return _dense_backends(device, dtype, width, shapes) if device.type == "cuda" else ()


def no_kernels() -> str:
    """Why the kernels cannot run in this process, and the way out; empty when they can."""
    return load_kernels().reason


def table(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """What runs every op that has more than one implementation on `device`.

    Args:
        device: of the model.
        dtype: of its activations.
    """
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

    yield _dense_row(device, dtype)


def _dense_row(device: torch.device, dtype: torch.dtype) -> Row:
    backends = dense_backends(device, dtype, _USUAL_WIDTH)
    if not backends:
        return Row("dense_attention", "SDPA", f"torch chooses on a {device.type}")
    first, *rest = (_NAMES[backend] for backend in backends)
    after = f", then {', '.join(rest)} where it cannot" if rest else ""
    major, minor = torch.cuda.get_device_capability(device)
    kind = str(dtype).removeprefix("torch.")
    return Row("dense_attention", first, f"forced for {kind} on sm_{major}{minor}{after}")


@cache
def _dense_backends(
    device: torch.device, dtype: torch.dtype, width: int, shapes: Shapes
) -> tuple[SDPBackend, ...]:
    with torch.inference_mode(False), torch.enable_grad():  # asked as for a training step
        call = _plain_call(device, dtype, width)
        takes = {
            SDPBackend.CUDNN_ATTENTION: shapes is Shapes.REPEATED
            and torch.cuda.get_device_capability(device)[0] in CUDNN_MAJORS
            and (_cudnn.version() or 0) >= CUDNN_LEAST
            and cuda.can_use_cudnn_attention(call),
            SDPBackend.FLASH_ATTENTION: cuda.can_use_flash_attention(call),
            SDPBackend.EFFICIENT_ATTENTION: cuda.can_use_efficient_attention(call),
            SDPBackend.MATH: True,
        }
    return tuple(backend for backend, taken in takes.items() if taken)


def _plain_call(device: torch.device, dtype: torch.dtype, width: int) -> cuda.SDPAParams:
    """A training call without a mask, as torch's backends are asked whether they take it."""
    x = torch.empty(1, 1, 128, width, device=device, dtype=dtype, requires_grad=True)
    return cuda.SDPAParams(x, x, x, None, 0.0, False, False)


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
