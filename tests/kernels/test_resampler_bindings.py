"""A resampler in bfloat16 with the kernels behind it, in a process of its own.

The bindings that serve a GPU, with the emulator in the GPU's place (see `test_bindings.py`).
"""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build

pytestmark = pytest.mark.skipif(build.find_host_compiler() is None, reason="needs g++")

ROOT = Path(build.__file__).resolve().parents[1]
PRELUDE = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests' / 'encoders')]!r}"
AGREES = """
import torch
from mmtrain.encoders import resampler as module
from mmtrain.nn import attention as parts
from mmtrain.ops import cosine_attention as op
from mmtrain.ops.select import QkBackend
from test_resampler import drawn, results

def case(kind, dtype):
    resampler = drawn(kind, 8, 64, 2, 48)  # the same bf16 numbers in both types
    for parameter in resampler.parameters():
        parameter.data = parameter.detach().bfloat16().to(dtype)
    generator = torch.Generator().manual_seed(3)
    context, upstream = (torch.randn(2, n, 64, generator=generator) for n in (70, 8))
    mask = torch.rand(2, 70, generator=generator) < 0.6
    return resampler, context.bfloat16().to(dtype), mask, upstream.bfloat16().to(dtype)

kinds = ("qk", "cosine")
wanted = {kind: results(*case(kind, torch.float32)) for kind in kinds}
rounded = {kind: results(*case(kind, torch.bfloat16)) for kind in kinds}  # torch's own operations
torch.ops.load_library(sys.argv[1])
for place in (parts, op):
    place.qk_backend = lambda device: QkBackend.KERNEL
calls = []
def counted(place, name):
    function = getattr(place, name)
    setattr(place, name, lambda *a, **k: calls.append(name) or function(*a, **k))
counted(parts, "qk_norm_rope")
counted(module, "cosine_attention")
for kind in kinds:
    found = results(*case(kind, torch.bfloat16))
    for name, exact in wanted[kind].items():
        ours, theirs = (float((x.float() - exact).norm() / exact.norm())
                        for x in (found[name], rounded[kind][name]))
        assert ours < 1.3 * theirs + 5e-3, (kind, name, ours, theirs)
        print(f"{kind} {name} {ours:.1e} {theirs:.1e}")
assert calls == ["qk_norm_rope"] * 2 + ["cosine_attention"] * 2, calls
print("agrees")
"""


def test_with_kernels_it_errs_no_more_than_torch_in_bfloat16() -> None:
    """Outputs and all gradients, against the formulas in float32; padded and shared queries."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{AGREES}", str(build.emulated_extension())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "agrees" in done.stdout, done.stdout + done.stderr
