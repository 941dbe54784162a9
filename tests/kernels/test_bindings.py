"""The library of kernels as torch sees it: the bindings, in a process of their own.

With the emulator in the GPU's place the very same bindings implement the ops for CPU tensors, so
what they check, allocate and hand on is run here.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build

ROOT = Path(build.__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(build.find_host_compiler() is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")

FOLDERS = [str(ROOT), str(ROOT / "tests" / "ops")]
PRELUDE = f"import sys; sys.path[:0] = {FOLDERS!r}"
AGREES = """
import torch
from itertools import product
from mmtrain.ops import qk_norm_rope as ours
from test_qk_norm_rope import arguments

torch.ops.load_library(sys.argv[1])
op, limits = torch.ops.mmtrain.qk_norm_rope, {torch.float32: 2e-6, torch.bfloat16: 2e-3}
for norm, pairing, kind in product(ours.Norm, ours.Pairing, limits):
    given = list(arguments(norm, pairing, kind))
    given[8:10] = (x if x is None else x.float() for x in given[8:10])
    out = op(*given)
    leaves = [x for x in given[:8] if x is not None]
    upstream = [torch.randn(x.shape[1], x.shape[0], x.shape[2], dtype=kind).transpose(0, 1)
                for x in out[:2]]
    found = [*out, *torch.autograd.grad(out[:2], leaves, upstream)]
    with torch.no_grad():
        wanted = ours._forward(*given)
        gradients = ours._backward(*upstream, *given[:11], *wanted[2:], *given[11:])
    wanted = [*wanted, *(g for g, x in zip(gradients, given) if x is not None)]
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)
        assert error < limits[kind], (norm, pairing, kind, float(error))
    if kind is torch.float32:
        torch.library.opcheck(op.default, tuple(given))
print("agrees")
"""
REFUSES = """
import torch
import mmtrain.ops.qk_norm_rope

torch.ops.load_library(sys.argv[1])
op = torch.ops.mmtrain.qk_norm_rope
def call(q, k, *, weight=None, other=None, tables=(None, None), norm=1, pairing=0):
    try:
        op(q, k, weight, other, None, None, None, None, *tables, None, norm, pairing, 1e-6)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    else:
        print("took it")
x = torch.randn(4, 2, 64)
call(x, x)
call(torch.randn(4, 2, 68), torch.randn(4, 2, 68))
call(torch.randn(4, 2, 24), torch.randn(4, 2, 24))
call(torch.randn(4 * 2 * 64 + 1)[1:].view(4, 2, 64), x)  # begins 4 bytes into a vector
call(x, torch.randn(5, 2, 64))
call(x, x, weight=torch.ones(32))
call(x, x, weight=torch.ones(64), other=torch.ones(64).bfloat16())
call(x, x, tables=(torch.ones(4, 16), torch.ones(4, 16)), pairing=1)
call(x.double(), x.double())
"""


def run(script: str, library: Path) -> str:
    """What a Python process prints that gets the library's path."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{script}", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@needs_compiler
def test_kernels_behind_the_bindings_are_the_ops_of_torch() -> None:
    assert run(AGREES, build.emulated_extension()).strip() == "agrees"


@needs_compiler
def test_what_the_kernels_cannot_take_is_refused_with_a_reason() -> None:
    lines = run(REFUSES, build.emulated_extension()).splitlines()
    expected = [
        "took it",
        "strides divisible by 8",
        "not supported by the kernel",
        "not supported by the kernel",
        "differ in tokens, width or type",
        "has the wrong size",
        "differ in type",
        "wanted: float32 tables",
        "wanted: float32, bfloat16 or float16",
    ]
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert text in line


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_the_gpu_library_loads_into_a_torch_without_a_gpu() -> None:
    """And leaves CPU tensors to the torch formulas; nothing of CUDA is needed to load it."""
    script = """
import torch
import mmtrain.ops.qk_norm_rope, mmtrain.ops.cosine_attention

torch.ops.load_library(sys.argv[1])
for name in ("qk_norm_rope", "cosine_attention"):
    for op in (name, f"{name}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mmtrain::{op}", "CUDA"), op
x = torch.randn(4, 2, 64)
print(torch.ops.mmtrain.qk_norm_rope(x, x, *[None] * 9, 1, 0, 1e-6)[0].shape)
"""
    assert "[4, 2, 64]" in run(script, build.build_library(["sm_90a"]))
