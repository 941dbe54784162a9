"""Runs K1 in the emulator, on memory that is watched.

Outputs and workspaces are full of NaN before a launch, and behind every tensor lies a canary that
must live. Inputs may be strided views; what lies between their rows is NaN.
"""

import ctypes
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.build import SOURCES, emulator

NORMS = ("none", "rms", "layer", "l2")
PAIRINGS = ("none", "halves", "neighbours")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CANARY, CANARIES = 7.0, 1024  # as many as the longest row has elements, and more


class Rows(ctypes.Structure):
    """`MmtrainRows`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class Side(ctypes.Structure):
    """`MmtrainQkSide`."""

    _fields_ = (
        *((name, Rows) for name in ("x", "y", "dy", "dx")),
        ("heads", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "weight", "bias", "scale", "d_weight", "d_bias", "d_scale", "inverse", "mean",
            )
        ),
    )  # fmt: skip


class Problem(ctypes.Structure):
    """`MmtrainQkNormRope`."""

    _fields_ = (
        ("side", Side * 2),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("table_rows", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in ("width", "norm", "pairing", "element", "parameter", "position_bytes")
        ),
        ("eps", ctypes.c_float),
    )


@cache
def library(source: Path = SOURCES / "qk_norm_rope.cu", *flags: str) -> ctypes.CDLL:
    """The kernels of `source` in the emulator."""
    built = emulator([source], flags)
    built.mmtrain_emulator_error.restype = ctypes.c_char_p
    built.mmtrain_qk_norm_rope_workspace_bytes.restype = ctypes.c_int64
    return built


@dataclass(kw_only=True)
class Inputs:
    """What both sides of a comparison get; `sides` are queries and keys.

    Attributes:
        x: `[T, H, D]` of each side.
        dy: gradients of the outputs.
        weight, bias: `[D]` of each side, or None.
        scale: `[H]` of each side, or None.
        cosine, sine: tables `[P, D / 2]`, or None.
        positions: rows of the tables `[T]`, or None.
    """

    norm: str
    pairing: str
    eps: float
    x: tuple[Tensor, Tensor]
    dy: tuple[Tensor, Tensor]
    weight: tuple[Tensor | None, Tensor | None] = (None, None)
    bias: tuple[Tensor | None, Tensor | None] = (None, None)
    scale: tuple[Tensor | None, Tensor | None] = (None, None)
    cosine: Tensor | None = None
    sine: Tensor | None = None
    positions: Tensor | None = None


@dataclass
class Outputs:
    """Results of one side, by name: y, dx, inverse, mean, d_weight, d_bias, d_scale."""

    values: dict[str, Tensor] = field(default_factory=dict)


class Watched:
    """Tensors full of NaN, each with canaries behind it."""

    def __init__(self) -> None:
        """Begin with none."""
        self._buffers: list[tuple[str, Tensor]] = []

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor full of NaN."""
        size = int(torch.tensor(shape).prod())
        buffer = torch.full((size + CANARIES,), float("nan"), dtype=dtype)
        buffer[size:] = CANARY
        self._buffers.append((name, buffer))
        return buffer[:size].view(shape)

    def check(self) -> None:
        """No canary was touched."""
        for name, buffer in self._buffers:
            assert bool((buffer[-CANARIES:] == CANARY).all()), f"written behind the end of {name}"


def pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's first element."""
    return None if x is None else x.data_ptr()


def rows_of(x: Tensor) -> Rows:
    """A tensor `[T, H, D]` as the launchers take it."""
    assert x.stride(2) == 1
    return Rows(x.data_ptr(), x.stride(0), x.stride(1))


def run(inputs: Inputs, built: ctypes.CDLL, seed: int = 1) -> tuple[Outputs, Outputs]:
    """Forward, then backward, in the emulator; outputs that are meant to be written have no NaN."""
    built.mmtrain_emulator_seed(ctypes.c_uint64(seed))
    watched, problem, found = Watched(), Problem(), (Outputs(), Outputs())
    tokens, _, width = inputs.x[0].shape
    kind, parameter = inputs.x[0].dtype, torch.float32
    for i, side in enumerate(problem.side):
        x, values = inputs.x[i], found[i].values
        side.x, side.dy, side.heads = rows_of(x), rows_of(inputs.dy[i]), x.shape[1]
        for name in ("y", "dx"):
            values[name] = watched.empty(name, tuple(x.shape), kind)
            setattr(side, name, rows_of(values[name]))
        for name in ("weight", "bias", "scale"):
            given = getattr(inputs, name)[i]
            if given is None:
                continue
            setattr(side, name, pointer(given))
            parameter = given.dtype
            gradient = watched.empty(f"d_{name}", tuple(given.shape), given.dtype)
            values[f"d_{name}"] = gradient
            setattr(side, f"d_{name}", pointer(gradient))
        statistics = {"none": (), "layer": ("inverse", "mean")}.get(inputs.norm, ("inverse",))
        for name in statistics:
            values[name] = watched.empty(name, (tokens, x.shape[1]), torch.float32)
            setattr(side, name, pointer(values[name]))
    problem.cosine, problem.sine = pointer(inputs.cosine), pointer(inputs.sine)
    problem.positions, problem.tokens = pointer(inputs.positions), tokens
    problem.table_rows = 0 if inputs.cosine is None else inputs.cosine.shape[0]
    problem.width, problem.eps = width, inputs.eps
    problem.norm = NORMS.index(inputs.norm)
    problem.pairing = PAIRINGS.index(inputs.pairing)
    problem.element, problem.parameter = ELEMENTS[kind], ELEMENTS[parameter]
    problem.position_bytes = 0 if inputs.positions is None else inputs.positions.element_size()
    room = built.mmtrain_qk_norm_rope_workspace_bytes(ctypes.byref(problem)) // 4
    workspace = watched.empty("workspace", (room,), torch.float32)
    launches = (
        built.mmtrain_qk_norm_rope(ctypes.byref(problem), None),
        built.mmtrain_qk_norm_rope_backward(
            ctypes.byref(problem), ctypes.c_void_p(pointer(workspace)), None
        ),
    )
    assert launches == (0, 0), f"{launches}: {built.mmtrain_emulator_error().decode()}"
    watched.check()
    for side_found in found:
        for name, value in side_found.values.items():
            assert not value.isnan().any(), f"NaN in {name}"
    return found
