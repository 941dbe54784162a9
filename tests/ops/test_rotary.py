"""Rotary positions: a rotation, relative, and exact far out."""

import torch

from mmtrain.ops.rotary import rotary_tables, rotate


def test_logits_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def logit(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x.float(), *rotary_tables(torch.tensor([p]), 16, 10000.0)).double()
            for x, p in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert abs(logit(40, 33) - logit(7, 0)) < 1e-5
    assert abs(logit(40, 33) - logit(40, 30)) > 1e-3


def test_gradient_is_that_of_the_rotation_written_out() -> None:
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(5), 8, 100.0)
    mine, theirs = (x.float().requires_grad_() for _ in range(2))
    upstream = torch.randn(5, 3, 8)
    a, b = theirs.chunk(2, -1)
    written_out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    out = rotate(mine, cos, sin)
    torch.testing.assert_close(out, written_out)
    torch.testing.assert_close(out.norm(dim=-1), mine.norm(dim=-1))
    out.backward(upstream)
    written_out.backward(upstream)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_tables_are_float32_accurate_at_the_end_of_the_context() -> None:
    cos, sin = rotary_tables(torch.tensor([2047]), 128, 10000.0)
    exact = 2047 / 10000.0 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert float((cos[0, 0].double() - exact.cos()).abs().max()) < 3e-4
    assert float((sin[0, 0].double() - exact.sin()).abs().max()) < 3e-4


def test_bfloat16_rows_are_turned_in_float32() -> None:
    x = torch.randn(4, 2, 8).bfloat16()
    tables = rotary_tables(torch.arange(4) + 1000, 8, 10000.0)
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


def test_compilers_trace_it_in_one_piece() -> None:
    x, upstream = torch.randn(2, 5, 3, 8)
    x.requires_grad_()
    tables = rotary_tables(torch.arange(5), 8, 100.0)
    traced = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for way in (rotate, traced):
        out = way(x, *tables)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        if way is rotate:
            wanted = out, gradient
    torch.testing.assert_close((out, gradient), wanted)
