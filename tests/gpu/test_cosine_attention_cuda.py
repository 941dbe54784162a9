"""K2 and K3 on a GPU agree with the float64 formulas of the op on the host."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmtrain.ops.cosine_attention import cosine_attention
from mmtrain.ops.extension import load_kernels
from mmtrain.ops.intervals import KeyIntervals

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LIMITS = {torch.bfloat16: 1.0, torch.float16: 1.0 / 8.0}  # fp16 has three bits more
OUT, GRADIENT, SCALE_GRADIENT = 6e-3, 1e-2, 5e-2
WIDTHS = (32, 40, 64, 72, 80, 88, 96, 104, 128)
SIZES = (
    (1, 1),
    (7, 63),
    (32, 256),
    (32, 2048),
    (64, 65),
    (65, 127),
    (129, 257),
    (257, 257),
    (300, 1000),
)


@pytest.fixture(autouse=True)
def kernels() -> None:
    """Without the library the torch formulas would be compared with themselves."""
    assert load_kernels().path is not None, load_kernels().reason


@dataclass
class Case:
    """One problem on the host, as the device gets it."""

    leaves: list[Tensor]  # q, k, v, log scale, and maybe a bias
    dout: Tensor
    intervals: KeyIntervals | None = None
    key_lengths: Tensor | None = None


def drawn(
    rows: int,
    keys: int,
    width: int,
    *,
    kind: torch.dtype = torch.bfloat16,
    scale: float = 10.0,
    batch: int = 2,
    heads: int = 3,
    biases: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(rows * 1009 + keys * 31 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, dout = (normal(batch, rows, heads, width).to(kind) for _ in range(2))
    k, v = (normal(batch, keys, heads, width).to(kind) for _ in range(2))
    log_scale = torch.linspace(0.0, math.log(scale), heads)
    bias = [16.0 * normal(biases, heads, rows, keys).sigmoid()] if biases else []
    return Case([q * 2.0, k * 4.0, v, log_scale, *bias], dout)


def run(case: Case, device: str, kind: torch.dtype | None) -> list[Tensor]:
    """Output and gradients; in float64 if `kind` says so."""
    leaves = [x.to(device, kind or x.dtype).requires_grad_() for x in case.leaves]
    q, k, v, log_scale, *bias = leaves
    intervals, lengths = case.intervals, case.key_lengths
    if intervals is not None:
        vectors = (intervals.lo_BT, intervals.hi_BT, intervals.first_BS, intervals.last_BS)
        intervals = KeyIntervals(*(x.to(device) for x in vectors))
    out = cosine_attention(
        q, k, v, log_scale, bias_PHTS=bias[0] if bias else None, intervals=intervals,
        key_lengths_B=None if lengths is None else lengths.to(device),
    )  # fmt: skip
    gradients = torch.autograd.grad(out, leaves, case.dout.to(device, kind or case.dout.dtype))
    return [out.detach(), *gradients]


def check(case: Case) -> None:
    kind = case.dout.dtype
    names = ("out", "dq", "dk", "dv", "dlog_scale", "dbias")
    found, wanted = run(case, "cuda", None), run(case, "cpu", torch.float64)
    for name, ours, exact in zip(names, found, wanted, strict=False):
        assert not ours.isnan().any(), name
        limit = {"out": OUT, "dlog_scale": SCALE_GRADIENT}.get(name, GRADIENT) * LIMITS[kind]
        error = float((ours.cpu().double() - exact).norm())
        # gradients that cancel, as with a single key, are left with the rounding of the output
        floor = LIMITS[kind] * 2e-2 * (1.0 if name != "dlog_scale" else exact.numel())
        assert error <= limit * float(exact.norm()) + floor, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows, keys", SIZES)
def test_output_and_gradients_are_those_of_float64(rows: int, keys: int, width: int) -> None:
    check(drawn(rows, keys, width))


@pytest.mark.parametrize("rows", [20, 70])
@pytest.mark.parametrize("width", [64, 88, 128])
def test_fp16_is_finer(rows: int, width: int) -> None:
    check(drawn(rows, 130, width, kind=torch.float16))


@pytest.mark.parametrize("rows, batch, biases", [(64, 64, 1), (49, 32, 4), (130, 8, 2)])
def test_biases_of_windows(rows: int, batch: int, biases: int) -> None:
    check(drawn(rows, rows, 32, batch=batch, biases=biases))


@pytest.mark.parametrize("rows, keys", [(40, 200), (300, 300)])
def test_intervals_and_key_lengths(rows: int, keys: int) -> None:
    case = drawn(rows, keys, 64)
    generator = torch.Generator().manual_seed(1)
    lo, hi = (torch.randint(0, keys + 1, (2, rows), generator=generator) for _ in range(2))
    case.intervals = KeyIntervals.of_rows(lo, hi, keys)
    case.key_lengths = torch.tensor([keys, keys // 3], dtype=torch.int32)
    check(case)


@pytest.mark.parametrize("rows", [20, 70])
def test_cosines_near_minus_one_at_the_largest_scale(rows: int) -> None:
    """The fixed reference loses every term; the output must come from the running one."""
    case = drawn(rows, 200, 64, scale=100.0)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(64, generator=generator)
    for x, sign in ((case.leaves[0], 1.0), (case.leaves[1], -1.0)):
        x.copy_(sign * direction + 0.3 * torch.randn(x.shape, generator=generator))
    found, wanted = run(case, "cuda", None)[0], run(case, "cpu", torch.float64)[0]
    assert float((found.cpu().double() - wanted).norm() / wanted.norm()) <= OUT


def test_the_same_bits_every_time_and_on_another_stream() -> None:
    case = drawn(49, 300, 64, batch=8, biases=2)
    first = run(case, "cuda", None)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        others = [run(case, "cuda", None) for _ in range(3)]
    stream.synchronize()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_packed_projections_are_read_in_place() -> None:
    packed = torch.randn(2, 100, 3, 4, 72, device="cuda").bfloat16()
    log_scale = torch.zeros(4, device="cuda")
    views = packed.unbind(2)
    out = cosine_attention(*views, log_scale)
    torch.testing.assert_close(out, cosine_attention(*(x.contiguous() for x in views), log_scale))


def test_it_is_captured_in_a_graph() -> None:
    q, k, v = (torch.randn(2, 32, 4, 64, device="cuda").bfloat16() for _ in range(3))
    log_scale = torch.zeros(4, device="cuda")
    wanted = cosine_attention(q, k, v, log_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cosine_attention(q, k, v, log_scale)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
