"""Visual rows in the token row: exact places, and dummies that leave no trace."""

import torch

from mmtrain.nn.embed import SplicedEmbedding, splice
from mmtrain.nn.flow import Flow


def test_visual_rows_overwrite_their_slots_and_nothing_else() -> None:
    rows, visual = torch.randn(6, 4), torch.randn(3, 4)
    out = splice(rows, torch.tensor([4, 1, 6]), visual)
    assert torch.equal(out[[4, 1]], visual[:2])
    assert torch.equal(out[[0, 2, 3, 5]], rows[[0, 2, 3, 5]])


def test_dummy_images_get_zero_gradient_and_leave_text_gradients_bit_equal() -> None:
    torch.manual_seed(0)
    embed = SplicedEmbedding(10, 4)
    fields = {"tokens": torch.tensor([3, 1, 4, 1, 5]), "carry": torch.tensor([0, 0])}

    def text_gradient(visual: torch.Tensor) -> torch.Tensor:
        embed.zero_grad()
        flow = Flow(visual, fields | {"slots": torch.full((visual.numel() // 4,), 5)})
        (embed(flow).hidden.sin() * torch.arange(5.0)[:, None]).sum().backward()
        assert embed.tokens.weight.grad is not None
        return embed.tokens.weight.grad.clone()

    dummy = torch.randn(2, 3, 4, requires_grad=True)
    with_dummies, without = text_gradient(dummy), text_gradient(torch.zeros(0, 3, 4))
    assert torch.equal(with_dummies, without)
    assert dummy.grad is not None and not dummy.grad.any()


def test_carried_rows_are_detached_copies_of_the_spliced_rows() -> None:
    embed = SplicedEmbedding(10, 4)
    visual = torch.randn(1, 2, 4, requires_grad=True)
    fields = {
        "tokens": torch.tensor([3, 0, 0, 7]),
        "slots": torch.tensor([1, 2]),
        "carry": torch.tensor([1, 2, 3]),
    }
    out = embed(Flow(visual, fields))
    assert out.carried is not None and not out.carried.requires_grad
    assert torch.equal(out.carried, out.hidden.detach()[1:])
    assert torch.equal(out.carried[:2], visual.detach()[0])
