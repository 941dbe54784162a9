"""K2 and K3 in the emulator agree with float64, over the shapes that models have and more.

The same source that nvcc compiles; see kernels/README.md for what the emulator checks besides.
"""

import ctypes
from dataclasses import replace

import cosine_emulated
import cosine_exact
import pytest
import torch
from cosine_cases import CASES, drawn
from cosine_emulated import Inputs
from torch import Tensor

from kernels.build import find_host_compiler

pytestmark = pytest.mark.skipif(find_host_compiler() is None, reason="the emulator needs g++")

UNSUPPORTED = -1
DEPTHS = (32, 48, 64, 80, 96, 128)  # widths rounded up to 16


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_float64(name: str) -> None:
    inputs = CASES[name]()
    assert not cosine_exact.misses(
        inputs, cosine_emulated.run(inputs, cosine_emulated.library(DEPTHS))
    )


@pytest.mark.parametrize("rows", [20, 70])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_no_further_from_float64_than_twice_the_chain_of_torch_ops(rows: int, scale: float) -> None:
    inputs = drawn(rows, 130, 64, scale=scale)
    exact, _ = cosine_exact.run(inputs)
    found = cosine_emulated.run(inputs, cosine_emulated.library(DEPTHS))
    for name, theirs in chain_of_ops(inputs).items():
        ours, torchs = (
            float((x.detach().double() - exact[name]).norm()) for x in (found[name], theirs)
        )
        assert ours <= 2.0 * torchs, f"{name}: {ours:.1e}, torch {torchs:.1e}"


def chain_of_ops(inputs: Inputs) -> dict[str, Tensor]:
    """Normalise, multiply, softmax, multiply: every result rounded, as under autocast."""
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    unit_q, unit_k = (torch.nn.functional.normalize(x, dim=-1, eps=inputs.eps) for x in (q, k))
    scale = inputs.log_scale.exp()[:, None, None].to(q.dtype)
    out = ((unit_q @ unit_k.mT * scale).softmax(-1) @ v).transpose(1, 2)
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    return {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


@pytest.mark.parametrize("rows", [20, 70])
def test_gradients_are_orthogonal_to_their_rows(rows: int) -> None:
    """A vector's length has no effect."""
    inputs = drawn(rows, 130, 64)
    found = cosine_emulated.run(inputs, cosine_emulated.library(DEPTHS))
    for name in ("q", "k"):
        x, dx = getattr(inputs, name).double(), found[f"d{name}"].double()
        along = (x * dx).sum(-1).norm() / (x.norm(dim=-1) * dx.norm(dim=-1)).norm()
        assert along < 1e-3  # of rounding dx; a missing projection gives 0.1 and more


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_probabilities_of_a_row_sum_to_one(kind: torch.dtype) -> None:
    inputs = drawn(70, 130, kind=kind)
    inputs.v.fill_(1.0)
    found = cosine_emulated.run(inputs, cosine_emulated.library(DEPTHS))
    assert float((found["out"].double() - 1.0).abs().max()) <= 4.0 * cosine_exact.ROUNDING[kind]


def test_rows_and_keys_come_in_any_order() -> None:
    inputs = drawn(50, 130, 64)
    generator = torch.Generator().manual_seed(2)
    rows, keys = torch.randperm(50, generator=generator), torch.randperm(130, generator=generator)
    moved = replace(
        inputs,
        q=inputs.q[:, rows], dout=inputs.dout[:, rows], k=inputs.k[:, keys], v=inputs.v[:, keys],
    )  # fmt: skip
    before, after = (
        cosine_emulated.run(x, cosine_emulated.library(DEPTHS)) for x in (inputs, moved)
    )
    for name, order in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
        torch.testing.assert_close(
            after[name].float(), before[name][:, order].float(), atol=2e-3, rtol=2e-2
        )


@pytest.mark.parametrize(
    "name", ["bias, windows in groups", "splits", "intervals by batch, lengths"]
)
def test_results_do_not_depend_on_the_order_in_which_threads_run(name: str) -> None:
    inputs, built = CASES[name](), cosine_emulated.library(DEPTHS)
    first, *others = (cosine_emulated.run(inputs, built, seed) for seed in (1, 2, 3))
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("rows, keys", [(0, 5), (5, 0)])
def test_without_rows_or_keys_gradients_are_zero(rows: int, keys: int) -> None:
    x = drawn(5, 5)
    inputs = replace(x, q=x.q[:, :rows], dout=x.dout[:, :rows], k=x.k[:, :keys], v=x.v[:, :keys])
    found = cosine_emulated.run(inputs, cosine_emulated.library(DEPTHS))
    assert all(not found[name].any() for name in ("out", "dq", "dk", "dv", "dlog_scale"))
    assert bool((found["lse"] == -torch.inf).all())


@pytest.mark.parametrize("change", ["width", "strides", "address", "eps", "biases"])
def test_what_the_kernels_do_not_take_is_refused(change: str) -> None:
    inputs, built = drawn(20, 30), cosine_emulated.library(DEPTHS)
    match change:
        case "width":
            inputs = replace(inputs, q=inputs.q[..., :12])
        case "strides":
            wide = torch.zeros(2, 30, 2, 36, dtype=torch.bfloat16)
            inputs = replace(inputs, k=wide[..., :32])
        case "address":
            inputs = replace(inputs, v=inputs.v[..., 1:])
        case "eps":
            inputs = replace(inputs, eps=0.0)
        case "biases":
            inputs = replace(inputs, bias=torch.zeros(3, 2, 20, 30))
    problem = cosine_emulated.problem_of(inputs)
    assert built.mmtrain_cosine_attention_plan(ctypes.byref(problem), 2) == UNSUPPORTED
