"""Per-row cross-entropy: torch's own numbers and gradients, silence at ignored rows."""

import pytest
import torch
from torch.nn import functional

from mmtrain.ops.cross_entropy import token_cross_entropy


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_torch(kind: torch.dtype) -> None:
    logits = (4 * torch.randn(9, 30)).to(kind)
    labels, upstream = torch.randint(0, 30, (9,)), torch.randn(9)
    labels[[2, 5]] = -100
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = token_cross_entropy(ours, labels, -100)
    expected = functional.cross_entropy(theirs.float(), labels, ignore_index=-100, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward(upstream)
    expected.backward(upstream)
    assert ours.grad is not None and ours.grad.dtype == kind
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_ignored_rows_have_zero_loss_and_zero_gradient_even_when_their_logits_overflow() -> None:
    logits = torch.randn(3, 4)
    logits[1, 2] = 1e38
    logits.requires_grad_()
    loss = token_cross_entropy(logits, torch.tensor([0, -100, 3]), -100)
    loss.sum().backward()
    assert loss[1] == 0.0
    assert logits.grad is not None and not logits.grad[1].any()
    assert logits.grad.isfinite().all()


def test_it_can_be_run_backward_again_over_the_same_graph() -> None:
    """Two losses share a graph when their gradients are logged apart."""
    logits = torch.randn(3, 4, requires_grad=True)
    loss = token_cross_entropy(logits, torch.tensor([0, 1, 2]), -100).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])
