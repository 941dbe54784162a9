"""Runs K2 and K3, cosine attention, in the emulator on watched memory (see `emulated.Watched`).

B batches   T query rows   S keys   H heads   K head width   P biases
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated import Watched, pointer
from torch import Tensor

from kernels.build import SOURCES, emulator

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
POINTERS, NUMBERS = ctypes.c_void_p, ctypes.c_int32


class Strides(ctypes.Structure):
    """`MmtrainStrides`."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("batch", "row", "head"))


class Problem(ctypes.Structure):
    """`MmtrainCosineAttention`."""

    _fields_ = (
        *((x, NUMBERS) for x in ("batch", "heads", "queries", "keys", "width", "element")),
        ("log_scale_max", ctypes.c_float),
        ("eps", ctypes.c_float),
        *((x, POINTERS) for x in ("q", "k", "v")),
        *((f"{x}_strides", Strides) for x in ("q", "k", "v")),
        *((x, POINTERS) for x in ("log_scale", "bias")),
        ("bias_batches", NUMBERS),
        *((x, POINTERS) for x in ("lo", "hi", "first", "last")),
        ("interval_batches", NUMBERS),
        *((x, POINTERS) for x in ("key_lengths", "out", "lse", "dout")),
        ("dout_strides", Strides),
        ("dlse", POINTERS),
        *((x, POINTERS) for x in ("dq", "dk", "dv", "dlog_scale", "dbias")),
        ("splits", NUMBERS),
        ("bias_groups", NUMBERS),
        ("workspace", POINTERS),
    )


@dataclass(kw_only=True)
class Inputs:
    """One problem.

    Attributes:
        q: `[B, T, H, K]`, any strides.
        k: `[B, S, H, K]`, as `v`.
        v: values.
        dout: gradient of the output, as `q`.
        dlse: gradient of the logsumexp `[B, H, T]`.
        log_scale: `[H]`.
        bias: `[P, H, T, S]`, batch b reads number `b % P`.
        intervals: `lo` and `hi`, `[1 or B, T]`.
        columns: `first` and `last`, `[1 or B, S]`.
        key_lengths: `[B]`.
        splits: parts of the keys, or None for the plan's own choice.
        bias_groups: partial sums of the bias gradient, or None for the plan's own choice.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    log_scale: Tensor
    dlse: Tensor | None = None
    bias: Tensor | None = None
    intervals: tuple[Tensor, Tensor] | None = None
    columns: tuple[Tensor, Tensor] | None = None
    key_lengths: Tensor | None = None
    log_scale_max: float = 4.605170185988092
    eps: float = 1e-6
    splits: int | None = None
    bias_groups: int | None = None


def library(
    depths: Sequence[int] = (32, 48, 64, 80, 96, 112, 128),
    source: Path = SOURCES / "cosine_attention.cu",
    flags: Sequence[str] = (),
) -> ctypes.CDLL:
    """The kernels of `source` for some padded widths; mutants must not share symbols with it."""
    cases = " ".join(f"CASE({depth})" for depth in depths)
    depth_flag = f"-DMMTRAIN_COSINE_DEPTHS(CASE)={cases}"
    built = emulator([source], ("-fno-gnu-unique", depth_flag, *flags))
    built.mmtrain_emulator_error.restype = ctypes.c_char_p
    built.mmtrain_cosine_attention_workspace_bytes.restype = ctypes.c_int64
    built.mmtrain_cosine_attention_backward_workspace_bytes.restype = ctypes.c_int64
    return built


def strides_of(x: Tensor) -> Strides:
    """Strides of `[B, rows, H, K]`."""
    assert x.stride(3) == 1
    return Strides(x.stride(0), x.stride(1), x.stride(2))


def problem_of(inputs: Inputs) -> Problem:
    """The struct without results."""
    batch, queries, heads, width = inputs.q.shape
    problem = Problem(
        batch=batch, heads=heads, queries=queries, keys=inputs.k.shape[1], width=width,
        element=ELEMENTS[inputs.q.dtype], log_scale_max=inputs.log_scale_max, eps=inputs.eps,
        bias_batches=1, interval_batches=1,
    )  # fmt: skip
    for name in ("q", "k", "v", "dout"):
        setattr(problem, name, pointer(getattr(inputs, name)))
        setattr(problem, f"{name}_strides", strides_of(getattr(inputs, name)))
    for name in ("log_scale", "bias", "key_lengths", "dlse"):
        setattr(problem, name, pointer(getattr(inputs, name)))
    if inputs.bias is not None:
        problem.bias_batches = inputs.bias.shape[0]
    if inputs.intervals is not None:
        problem.lo, problem.hi = (pointer(x) for x in inputs.intervals)
        problem.interval_batches = inputs.intervals[0].shape[0]
    if inputs.columns is not None:
        problem.first, problem.last = (pointer(x) for x in inputs.columns)
    return problem


def run(inputs: Inputs, built: ctypes.CDLL, seed: int = 1) -> dict[str, Tensor]:
    """Forward, then backward; every entry of every result has been written."""
    built.mmtrain_emulator_seed(ctypes.c_uint64(seed))
    problem, watched = problem_of(inputs), Watched()
    batch, queries, heads, _ = inputs.q.shape
    results = {
        "out": watched.empty("out", tuple(inputs.q.shape), inputs.q.dtype),
        "lse": watched.empty("lse", (batch, heads, queries), torch.float32),
        "dq": watched.empty("dq", tuple(inputs.q.shape), inputs.q.dtype),
        "dk": watched.empty("dk", tuple(inputs.k.shape), inputs.q.dtype),
        "dv": watched.empty("dv", tuple(inputs.v.shape), inputs.q.dtype),
        "dlog_scale": watched.empty("dlog_scale", (heads,), torch.float32),
    }
    if inputs.bias is not None:
        results["dbias"] = watched.empty("dbias", tuple(inputs.bias.shape), torch.float32)
    for name, result in results.items():
        setattr(problem, name, pointer(result))
    for name in ("mmtrain_cosine_attention", "mmtrain_cosine_attention_backward"):
        planned = built.mmtrain_cosine_attention_plan(ctypes.byref(problem), 2)
        assert planned == 0, "the problem is not supported"
        problem.splits = inputs.splits or problem.splits
        problem.bias_groups = inputs.bias_groups or problem.bias_groups
        room = getattr(built, f"{name}_workspace_bytes")(ctypes.byref(problem))
        workspace = watched.empty("workspace", (room // 4,), torch.float32)
        problem.workspace = pointer(workspace)
        error = getattr(built, name)(ctypes.byref(problem), None)
        assert error == 0, f"{name}: {error}: {built.mmtrain_emulator_error().decode()}"
        watched.check()
    for name, result in results.items():
        assert not result.isnan().any(), f"NaN in {name}"
    return results
