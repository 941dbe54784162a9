"""The op `mmtrain::qk_norm_rope` in torch: formulas, derivatives, tracing, autocast."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from mmtrain.ops.qk_norm_rope import Norm, Pairing, qk_norm_rope
from mmtrain.ops.rms_norm import rms_norm
from mmtrain.ops.rotary import rotary_tables, rotate

TOKENS, HEADS, KEY_HEADS, WIDTH, ROWS = 7, 4, 2, 32, 5
KINDS = list(product(Norm, Pairing))


def arguments(norm: Norm, pairing: Pairing, kind: torch.dtype = torch.float64) -> tuple:
    """Positional arguments of the op itself; everything that can be trained asks for gradients."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=kind, requires_grad=True)

    def leaves(*sizes: int, wanted: bool) -> list[Tensor | None]:
        return [leaf(size) if wanted else None for size in sizes]

    angle = 6.0 * torch.rand(ROWS, WIDTH // 2, dtype=kind)
    turned = pairing is not Pairing.NONE
    return (
        leaf(TOKENS, HEADS, WIDTH),
        leaf(TOKENS, KEY_HEADS, WIDTH),
        *leaves(WIDTH, WIDTH, wanted=norm in (Norm.RMS, Norm.LAYER)),
        *leaves(WIDTH, WIDTH, wanted=norm is Norm.LAYER),
        *leaves(HEADS, KEY_HEADS, wanted=norm is Norm.L2),
        *((angle.cos(), angle.sin()) if turned else (None, None)),
        torch.randint(0, ROWS, (TOKENS,)) if turned else None,
        int(norm),
        int(pairing),
        1e-6,
    )


def op(*given: object) -> tuple[Tensor, Tensor]:
    return torch.ops.mmtrain.qk_norm_rope(*given)[:2]


@pytest.mark.parametrize("norm, pairing", KINDS)
def test_derivatives_are_those_of_finite_differences(norm: Norm, pairing: Pairing) -> None:
    assert torch.autograd.gradcheck(op, arguments(norm, pairing), fast_mode=True)


@pytest.mark.parametrize("norm, pairing", KINDS)
def test_the_op_keeps_torchs_rules_of_custom_ops(norm: Norm, pairing: Pairing) -> None:
    given = arguments(norm, pairing, torch.float32)
    torch.library.opcheck(torch.ops.mmtrain.qk_norm_rope.default, given)


@pytest.mark.parametrize("norm", [Norm.RMS, Norm.NONE])
def test_it_is_the_chain_of_separate_ops(norm: Norm) -> None:
    q, k, *_ = arguments(Norm.RMS, Pairing.HALVES, torch.float32)
    weights = torch.rand(2, WIDTH)
    cos, sin = rotary_tables(torch.randint(0, 100, (TOKENS,)), WIDTH, 1e4)
    found = qk_norm_rope(
        q,
        k,
        norm=norm,
        eps=1e-6,
        weights=(weights[0], weights[1]) if norm is Norm.RMS else (None, None),
        pairing=Pairing.HALVES,
        tables=(cos.squeeze(1), sin.squeeze(1)),
    )
    for ours, x, weight in zip(found, (q, k), weights, strict=True):
        normed = rms_norm(x, weight, 1e-6) if norm is Norm.RMS else x
        torch.testing.assert_close(ours, rotate(normed, cos, sin))


def test_layer_norm_and_unit_length_are_torchs_own() -> None:
    q, k, *_ = arguments(Norm.LAYER, Pairing.NONE, torch.float32)
    weight, bias = torch.rand(2, WIDTH)
    normed, _ = qk_norm_rope(q, k, norm=Norm.LAYER, weights=(weight, weight), biases=(bias, bias))
    expected = torch.nn.functional.layer_norm(q, (WIDTH,), weight, bias, 1e-6)
    torch.testing.assert_close(normed, expected)
    unit, _ = qk_norm_rope(q, k, norm=Norm.L2)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(q, dim=-1, eps=1e-6))


def test_neighbours_are_halves_in_another_order() -> None:
    q, k, *_ = arguments(Norm.RMS, Pairing.HALVES, torch.float32)
    angle = torch.rand(TOKENS, WIDTH // 2)
    tables = (angle.cos(), angle.sin())
    order = torch.arange(WIDTH).view(2, -1).T.flatten()  # channel pairs side by side
    halves, _ = qk_norm_rope(q, k, norm=Norm.RMS, pairing=Pairing.HALVES, tables=tables)
    neighbours, _ = qk_norm_rope(
        q[..., order], k, norm=Norm.RMS, pairing=Pairing.NEIGHBOURS, tables=tables
    )
    torch.testing.assert_close(neighbours, halves[..., order])


def test_products_depend_on_the_distance_of_positions_alone() -> None:
    q, k, *_ = arguments(Norm.RMS, Pairing.HALVES)
    tables = rotary_tables(torch.arange(200), WIDTH, 1e4)
    tables = (tables[0].squeeze(1).double(), tables[1].squeeze(1).double())

    def products(shift: int) -> Tensor:
        a, b = qk_norm_rope(
            q,
            k,
            norm=Norm.RMS,
            pairing=Pairing.HALVES,
            tables=tables,
            positions_T=torch.arange(TOKENS) + shift,
        )
        return torch.einsum("thk,shk->hts", a[:, :KEY_HEADS], b)

    torch.testing.assert_close(products(0), products(150), rtol=1e-5, atol=1e-5)


def test_gradients_of_unit_rows_are_square_to_the_rows() -> None:
    q, k, *rest = arguments(Norm.L2, Pairing.HALVES)
    out = op(q, k, *rest)
    for x, gradient in zip(
        (q, k), torch.autograd.grad(sum(y.sin().sum() for y in out), (q, k)), strict=True
    ):
        assert (x * gradient).sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_zero_rows_get_the_gradient_of_a_division_by_eps(eps: float) -> None:
    q = torch.zeros(3, 2, WIDTH, requires_grad=True)
    out, _ = qk_norm_rope(q, q.detach(), norm=Norm.L2, eps=eps)
    out.sum().backward()
    torch.testing.assert_close(q.grad, torch.full_like(q, 1.0 / eps))


@pytest.mark.parametrize("norm", [Norm.LAYER, Norm.L2])
def test_it_compiles_to_one_graph_for_any_number_of_tokens(norm: Norm) -> None:
    def step(q: Tensor, k: Tensor, *rest: object) -> Tensor:
        a, b = op(q, k, *rest)
        return a.square().sum() + b.sin().sum()

    q, k, *rest = arguments(norm, Pairing.NONE, torch.float32)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    leaves = [q, k, *(x for x in rest if isinstance(x, Tensor))]
    for tokens in (TOKENS, 3):
        eager = torch.autograd.grad(step(q[:tokens], k[:tokens], *rest), leaves)
        traced = torch.autograd.grad(compiled(q[:tokens], k[:tokens], *rest), leaves)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_rounds_queries_and_keys_and_nothing_else() -> None:
    q, k, *_ = arguments(Norm.RMS, Pairing.NONE, torch.float32)
    weight = (1.0 + 1e-4 * torch.randn(WIDTH)).requires_grad_()  # bfloat16 would make ones of it
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = qk_norm_rope(q, k, norm=Norm.RMS, weights=(weight, weight))
    assert out.dtype == torch.bfloat16
    wide, _ = qk_norm_rope(
        q.bfloat16().double(), k.double(), norm=Norm.RMS, weights=(weight.double(), None)
    )
    assert torch.equal(out, wide.bfloat16())
    out.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_packed_projections_and_turned_gradients_need_no_layout_of_their_own() -> None:
    whole = torch.randn(TOKENS, HEADS + 2 * KEY_HEADS, WIDTH, requires_grad=True)
    q, k, _ = whole.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
    out, _ = qk_norm_rope(q, k, norm=Norm.RMS)
    upstream = torch.randn(HEADS, TOKENS, WIDTH).transpose(0, 1)  # as attention gives it back
    (gradient,) = torch.autograd.grad(out, whole, upstream)
    plain, _ = qk_norm_rope(q.contiguous(), k.contiguous(), norm=Norm.RMS)
    assert torch.equal(out, plain)
    (expected,) = torch.autograd.grad(plain, whole, upstream.contiguous())
    assert torch.equal(gradient, expected)


def test_rows_are_independent_of_each_other() -> None:
    q, k, *_ = arguments(Norm.LAYER, Pairing.NONE, torch.float32)
    order = torch.randperm(TOKENS)
    out, _ = qk_norm_rope(q, k, norm=Norm.LAYER)
    shuffled, _ = qk_norm_rope(q[order], k[order], norm=Norm.LAYER)
    assert torch.equal(shuffled, out[order])


def test_what_a_norm_does_not_take_is_a_bug_of_the_caller() -> None:
    q, k = torch.randn(2, TOKENS, 1, WIDTH)
    one = torch.ones(WIDTH)
    with pytest.raises(AssertionError, match="L2 takes no such"):
        qk_norm_rope(q, k, norm=Norm.L2, weights=(one, one))
    with pytest.raises(AssertionError, match="a bias comes with a weight"):
        qk_norm_rope(q, k, norm=Norm.LAYER, biases=(one, None))
    with pytest.raises(AssertionError, match="needs its tables"):
        qk_norm_rope(q, k, norm=Norm.NONE, pairing=Pairing.HALVES)


def test_tokens_without_positions_read_the_table_in_turn() -> None:
    """A table as long as a sequence serves a batch of sequences."""
    x = torch.randn(3 * ROWS, 2, WIDTH)
    angle = torch.rand(ROWS, WIDTH // 2) * math.pi
    whole, _ = qk_norm_rope(
        x, x, norm=Norm.NONE, pairing=Pairing.HALVES, tables=(angle.cos(), angle.sin())
    )
    for part, expected in zip(x.chunk(3), whole.chunk(3), strict=True):
        alone, _ = qk_norm_rope(
            part, part, norm=Norm.NONE, pairing=Pairing.HALVES, tables=(angle.cos(), angle.sin())
        )
        assert torch.equal(alone, expected)
