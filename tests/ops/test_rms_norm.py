"""RMS norm: torch's own numbers, float32 statistics under bfloat16."""

import pytest
import torch
from torch.nn import functional

from mmtrain.ops.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(7, 32), (3, 5, 16)])
def test_output_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    x, upstream = torch.randn(2, *shape)
    weight = torch.randn(shape[-1])
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    theirs = [t.double().requires_grad_() for t in (x, weight)]
    mine = rms_norm(*ours, 1e-6)
    expected = functional.rms_norm(theirs[0], shape[-1:], theirs[1], 1e-6)
    torch.testing.assert_close(mine.double(), expected, atol=1e-6, rtol=1e-6)
    mine.backward(upstream)
    expected.backward(upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-6, rtol=1e-5)


def test_statistics_are_float32_in_bfloat16() -> None:
    """A mean of squares summed in bfloat16 would stop growing after 256 equal entries."""
    x = torch.full((1, 4096), 3.0).bfloat16()
    assert torch.equal(rms_norm(x, torch.ones(4096).bfloat16(), 0.0), torch.ones_like(x))


def test_a_zero_row_has_finite_gradients() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
