"""Losses as weighted sums: true means, and silence where there is nothing to learn."""

import torch

from mmtrain.data.batch import Targets
from mmtrain.nn.objectives import TokenCrossEntropy, sums_by_origin, weighted_losses


def targets(text: list[float], image: list[float], origins: list[int]) -> Targets:
    weights = {"text": torch.tensor(text), "image": torch.tensor(image)}
    origin = torch.tensor(origins)
    return Targets(weights, {"text": origin[: len(text)], "image": origin[: len(image)]})


def test_the_total_is_the_scaled_sum_of_weighted_means() -> None:
    values = {"text": torch.tensor([1.0, 2.0, 3.0]), "image": torch.tensor([10.0, 20.0])}
    total, parts = weighted_losses(
        values, targets([0.5, 0.5, 0.0], [0.0, 1.0], [0, 0, 0]), {"text": 1.0, "image": 0.1}
    )
    assert parts["text"] == 1.5 and parts["image"] == 20.0
    assert float(total) == 1.5 + 0.1 * 20.0


def test_accumulated_parts_of_a_batch_sum_to_the_whole() -> None:
    values, weights = torch.rand(2, 12)
    whole, _ = weighted_losses(
        {"text": values}, targets(weights.tolist(), [], [0] * 12), {"text": 1.0}
    )
    halves = [
        weighted_losses(
            {"text": values[a : a + 6]},
            targets(weights[a : a + 6].tolist(), [], [0] * 6),
            {"text": 1.0},
        )[0]
        for a in (0, 6)
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_a_batch_without_text_has_zero_text_loss_and_zero_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    values = {"text": TokenCrossEntropy()(logits, torch.full((3,), -100))}
    total, parts = weighted_losses(values, targets([0.0] * 3, [], [0] * 3), {"text": 1.0})
    total.backward()
    assert float(parts["text"].detach()) == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_sums_of_origins_are_means_of_each_source() -> None:
    values = {"text": torch.tensor([1.0, 2.0, 3.0, 9.0])}
    sums = sums_by_origin(values, targets([1.0, 1.0, 1.0, 0.0], [], [0, 2, 2, 1]), 3)
    total, weight = sums["text"]
    assert total.tolist() == [1.0, 0.0, 5.0] and weight.tolist() == [1.0, 0.0, 2.0]
