"""The op `mmtrain::cosine_attention` in torch: formulas, derivatives, tracing, autocast."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtrain.nn.masks import Intervals
from mmtrain.ops import cosine_attention as module
from mmtrain.ops.attention import plan_intervals
from mmtrain.ops.cosine_attention import (
    EPS,
    LOG_SCALE_MAX,
    CosinePath,
    composed_cosine_attention,
    cosine_attention,
    cosine_path,
)
from mmtrain.ops.intervals import KeyIntervals
from mmtrain.ops.select import QkBackend

BATCH, ROWS, KEYS, HEADS, WIDTH = 4, 5, 6, 2, 8
LO, HI = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([2, 3, 6, 3, 6])  # row 3 sees nothing
LENGTHS = torch.tensor([6, 2, 4, 0], dtype=torch.int32)
MASKS = {
    "all": {},
    "intervals": {"intervals": KeyIntervals.of_rows(LO, HI, KEYS)},
    "lengths": {"key_lengths_B": LENGTHS},
    "both": {"intervals": KeyIntervals.of_rows(LO, HI, KEYS), "key_lengths_B": LENGTHS},
}


def leaves(kind: torch.dtype = torch.float64, biases: int = 2) -> list[Tensor]:
    """Queries, keys, values, log scales (the second above its limit), bias."""
    torch.manual_seed(0)
    made = [
        torch.randn(BATCH, ROWS, HEADS, WIDTH),
        torch.randn(BATCH, KEYS, HEADS, WIDTH) * 3.0,
        torch.randn(BATCH, KEYS, HEADS, WIDTH),
        torch.tensor([1.0, 5.0]),
        torch.randn(biases, HEADS, ROWS, KEYS),
    ]
    return [x.to(kind).requires_grad_() for x in made]


def attend(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, bias: Tensor, mask: str) -> Tensor:
    return cosine_attention(q, k, v, log_scale, bias_PHTS=bias, **MASKS[mask])


def arguments(kind: torch.dtype) -> tuple:
    """Positional arguments of the op itself."""
    mask = MASKS["intervals"]["intervals"]
    rows, columns = (mask.lo_BT, mask.hi_BT), (mask.first_BS, mask.last_BS)
    return (*leaves(kind), *rows, *columns, LENGTHS, LOG_SCALE_MAX, EPS)


@pytest.mark.parametrize("mask", MASKS)
def test_derivatives_are_those_of_finite_differences(mask: str) -> None:
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask), leaves(), fast_mode=True)


def test_the_logsumexp_has_its_derivative() -> None:
    def both(*x: Tensor) -> tuple[Tensor, ...]:
        rest = (None,) * 5
        return torch.ops.mmtrain.cosine_attention(*x, *rest, LOG_SCALE_MAX, EPS)

    assert torch.autograd.gradcheck(both, leaves(), fast_mode=True)


def test_the_op_keeps_torchs_rules_of_custom_ops() -> None:
    torch.library.opcheck(torch.ops.mmtrain.cosine_attention.default, arguments(torch.float32))
    forward = arguments(torch.float32)
    out, lse = torch.ops.mmtrain.cosine_attention(*forward)
    given = (torch.randn_like(out), None, *forward[:3], out, lse, *forward[3:], True)
    given = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(torch.ops.mmtrain.cosine_attention_backward.default, given)


def test_it_is_normalised_scaled_softmax_attention() -> None:
    q, k, v, log_scale, bias = leaves()
    found = cosine_attention(q, k, v, log_scale, bias_PHTS=bias)
    q_hat, k_hat = (normalize(x, dim=-1).transpose(1, 2) for x in (q, k))
    scale = log_scale.exp().clamp(max=100.0)[:, None, None]
    logits = q_hat @ k_hat.mT * scale + bias.repeat(BATCH // 2, 1, 1, 1)
    wanted = (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mask", ["intervals", "lengths", "both"])
def test_rows_that_see_nothing_are_zero_without_gradient(mask: str) -> None:
    given = leaves()
    out = attend(*given, mask)
    lo, hi = (LO, HI) if mask != "lengths" else (LO * 0, HI * 0 + KEYS)
    lengths = LENGTHS if mask != "intervals" else LENGTHS * 0 + KEYS
    blind = lo >= torch.minimum(hi, lengths[:, None])
    assert not out[blind].any() and out[~blind].abs().sum(-1).all()
    for name, gradient in zip("qkv", torch.autograd.grad(out.sum(), given[:3]), strict=True):
        assert gradient.isfinite().all(), name
    (to_q,) = torch.autograd.grad(attend(*given, mask).square().sum(), given[:1])
    assert not to_q[blind].any()


def test_padding_may_hold_anything() -> None:
    q, k, v, log_scale, bias = leaves()
    clean = attend(q, k, v, log_scale, bias, "lengths")
    dirty_k, dirty_v = k.detach().clone(), v.detach().clone()
    for x in (dirty_k, dirty_v):
        for b, length in enumerate(LENGTHS.tolist()):
            x[b, length:] = torch.nan
        x.requires_grad_()
    out = attend(q, dirty_k, dirty_v, log_scale, bias, "lengths")
    torch.testing.assert_close(out, clean)
    for gradient in torch.autograd.grad(out.square().sum(), (q, dirty_k, dirty_v, log_scale)):
        assert gradient.isfinite().all()


def test_lengths_of_queries_and_keys_have_no_gradient() -> None:
    given = leaves()
    dq, dk = torch.autograd.grad(attend(*given, "all").square().sum(), given[:2])
    for x, dx in ((given[0], dq), (given[1], dk)):
        torch.testing.assert_close((x * dx).sum(-1), torch.zeros(x.shape[:3], dtype=x.dtype))


def test_a_zero_row_gives_and_gets_a_finite_gradient() -> None:
    given = leaves(torch.float32)
    with torch.no_grad():
        given[0][:, 0] = 0.0
        given[1][:, 0] = 0.0
    for gradient in torch.autograd.grad(attend(*given, "all").square().sum(), given):
        assert gradient.isfinite().all()


def test_keys_of_grouped_queries_serve_neighbouring_heads() -> None:
    q, k, v, log_scale, _ = leaves()
    one = cosine_attention(q, k[:, :, :1], v[:, :, :1], log_scale)
    two = cosine_attention(q, k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v), log_scale)
    torch.testing.assert_close(one, two)


def test_it_compiles_to_one_graph_forward_and_backward_with_any_length() -> None:
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for mask in ("all", "both"):
        given = leaves(torch.float32)
        ours, eager = compiled(*given, mask), attend(*given, mask)
        torch.testing.assert_close(ours, eager)
        gradients = (torch.autograd.grad(x.square().sum(), given) for x in (ours, eager))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_rounds_queries_keys_and_values_but_neither_scale_nor_bias() -> None:
    q, k, v, log_scale, bias = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, log_scale, bias, "all")
    rounded = (x.bfloat16() for x in (q, k, v))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attend(*rounded, log_scale, bias, "all"))
    gradients = torch.autograd.grad(out.float().square().sum(), (q, log_scale, bias))
    assert [x.dtype for x in gradients] == [torch.float32] * 3


@pytest.mark.parametrize("lengths", [[40, 7, 90], [1] * 30])
def test_fused_and_composed_are_one_function(lengths: list[int]) -> None:
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows, mask = len(segments), Intervals.causal_packed(segments)
    q, k, v = torch.randn(3, rows, HEADS, 16).unbind()
    log_scale = torch.tensor([2.0, 6.0], requires_grad=True)
    given = [x.requires_grad_() for x in (q, k, v)] + [log_scale]
    plan = plan_intervals(mask.lo_T, mask.hi_T, rows)
    intervals = KeyIntervals.of_rows(mask.lo_T, mask.hi_T, rows)
    fused = cosine_attention(q[None], k[None], v[None], log_scale, intervals=intervals)[0]
    composed = composed_cosine_attention(q, k, v, log_scale, plan)
    torch.testing.assert_close(fused, composed, atol=1e-4, rtol=1e-4)
    upstream = torch.randn_like(fused)
    for a, b in zip(
        torch.autograd.grad(fused, given, upstream),
        torch.autograd.grad(composed, given, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_composed_takes_fewer_queries_than_keys() -> None:
    q, k, v = torch.randn(7, HEADS, 16), torch.randn(40, 1, 16), torch.randn(40, 1, 16)
    log_scale = torch.tensor([2.0, 6.0])
    lo, hi = torch.arange(7), torch.arange(7) * 5 + 10
    fused = cosine_attention(
        q[None], k[None], v[None], log_scale, intervals=KeyIntervals.of_rows(lo, hi, 40)
    )[0]
    composed = composed_cosine_attention(q, k, v, log_scale, plan_intervals(lo, hi, 40))
    torch.testing.assert_close(fused, composed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rows, keys, width, kind, path",
    [
        (32, 2048, 64, torch.bfloat16, CosinePath.FUSED),
        (64, 64, 32, torch.float16, CosinePath.FUSED),
        (1024, 1024, 88, torch.bfloat16, CosinePath.FUSED),
        (4096, 4096, 128, torch.bfloat16, CosinePath.COMPOSED),
        (64, 64, 32, torch.float32, CosinePath.COMPOSED),
        (64, 64, 132, torch.bfloat16, CosinePath.COMPOSED),
    ],
)
def test_small_problems_are_fused_where_kernels_run(
    monkeypatch: pytest.MonkeyPatch,
    rows: int, keys: int, width: int, kind: torch.dtype, path: CosinePath,
) -> None:  # fmt: skip
    q = torch.empty(rows, 2, width, dtype=kind)
    assert cosine_path(q, keys) is CosinePath.COMPOSED  # no kernels on a CPU
    monkeypatch.setattr(module, "qk_backend", lambda device: QkBackend.KERNEL)
    assert cosine_path(q, keys) is path


def test_the_largest_scale_is_that_of_swin_v2() -> None:
    assert math.exp(LOG_SCALE_MAX) == pytest.approx(100.0)
