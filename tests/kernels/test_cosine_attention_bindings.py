"""The op of cosine attention with kernels behind it, in a process of its own.

The bindings that serve a GPU, with the emulator in the GPU's place (see `test_bindings.py`).
"""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build

pytestmark = pytest.mark.skipif(build.find_host_compiler() is None, reason="needs g++")

ROOT = Path(build.__file__).resolve().parents[1]
PRELUDE = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests' / 'ops')]!r}"
AGREES = """
import torch
from mmtrain.ops import cosine_attention as ours
from test_cosine_attention import LENGTHS, MASKS, leaves

NAMES = ("out", "dq", "dk", "dv", "dlog_scale", "dbias")
LIMITS = {"dlog_scale": 0.3}  # a sum of few terms of both signs; measured in the grid of shapes

def results(q, k, v, log_scale, bias, mask):
    out = ours.cosine_attention(q, k, v, log_scale, bias_PHTS=bias, **MASKS[mask])
    upstream = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, [q, k, v, log_scale, bias], upstream)]

def given(kind):
    rounded = [x.detach().bfloat16() for x in leaves(torch.float32)[:3]]
    plain = [torch.tensor([1.0, 2.0]), leaves(torch.float32)[4].detach()]
    return [x.to(kind).requires_grad_() for x in rounded] + [x.requires_grad_() for x in plain]

wanted = {mask: results(*given(torch.float32), mask) for mask in MASKS}
torch.ops.load_library(sys.argv[1])
for mask in MASKS:
    found = results(*given(torch.bfloat16), mask)
    for name, a, b in zip(NAMES, found, wanted[mask], strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).norm() / b.norm())
        assert error < LIMITS.get(name, 2e-2), (mask, name, error)
mask = MASKS["intervals"]["intervals"]
vectors = (mask.lo_BT, mask.hi_BT, mask.first_BS, mask.last_BS)
arguments = (*given(torch.bfloat16), *vectors, LENGTHS, ours.LOG_SCALE_MAX, ours.EPS)
torch.library.opcheck(torch.ops.mmtrain.cosine_attention.default, arguments)
packed = torch.randn(2, 9, 3, 4, 24).bfloat16()
views, log_scale = packed.unbind(2), torch.zeros(4)
copies = [x.contiguous() for x in views]
assert torch.equal(ours.cosine_attention(*views, log_scale),
                   ours.cosine_attention(*copies, log_scale))
print("agrees")
"""
REFUSES = """
import torch
import mmtrain.ops.cosine_attention

torch.ops.load_library(sys.argv[1])
def call(q, k, *, log_scale=torch.zeros(2), lo=None, bias=None):
    rest = (bias, lo, lo, None, None, None, 4.6, 1e-6)
    try:
        torch.ops.mmtrain.cosine_attention(q, k, k, log_scale, *rest)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    else:
        print("took it")
x = torch.randn(1, 5, 2, 64).bfloat16()
call(x, x)
call(x.float(), x.float())
call(x, x.half())
call(x, x[:, :, :1])
call(x, x, log_scale=torch.zeros(2).double())
call(x, x, lo=torch.zeros(1, 5, dtype=torch.int64))
call(x[..., :60], x[..., :60])
call(x, x, bias=torch.zeros(2, 2, 5, 5))
"""


def run(script: str) -> list[str]:
    """Lines that a Python process prints which loads the kernels."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{script}", str(build.emulated_extension())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_kernels_behind_the_bindings_are_the_op_of_torch() -> None:
    assert run(AGREES) == ["agrees"]


def test_what_the_kernels_cannot_take_is_refused_with_a_reason() -> None:
    expected = [
        "took it",
        "wanted: bfloat16 or float16",
        "differ in type",
        "differ in batch, heads or width",
        "of the wrong type",
        "of the wrong type",
        "not supported by the kernel",
        "not supported by the kernel",
    ]
    for line, text in zip(run(REFUSES), expected, strict=True):
        assert text in line
