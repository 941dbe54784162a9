"""Losses as weighted sums.

The last layer returns unreduced values; the weights are divided by the global count of the step
before they come here, so a plain sum is this rank's share of the true mean, and the gradient of a
batch without text or without images is simply zero.

E entries of a loss (tokens, or regression pairs)
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mmtrain.ops.cross_entropy import token_cross_entropy

IGNORED = -100  # label of a row that predicts nothing


class Weighted(Protocol):
    """Weights and origins of each loss (`data.batch.Targets`)."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Loss name to float32 `[E]`."""
        ...

    @property
    def origins(self) -> Mapping[str, Tensor]:
        """Loss name to int64 `[E]`, the data source of each entry."""
        ...


class TokenCrossEntropy(nn.Module):
    """Cross-entropy of each row; a module so that the tensor plan can put a split one here."""

    def forward(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        """Float32 `[T]`, 0 where the label is -100."""
        return token_cross_entropy(logits_TV, labels_T, IGNORED)


def weighted_losses(
    values: Mapping[str, Tensor], targets: Weighted, scales: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum each loss under its weights, then all losses under their scales.

    Args:
        values: loss name to unreduced values `[E]`, from the last layer.
        targets: weights, already divided by the global count of the step.
        scales: loss name to its factor in the total.

    Returns:
        The scalar total, and the unscaled scalar of each loss.
    """
    parts = {name: (value * targets.weights[name]).sum() for name, value in values.items()}
    total = torch.stack([scales[name] * part for name, part in parts.items()]).sum()
    return total, parts


def sums_by_origin(
    values: Mapping[str, Tensor], targets: Weighted, origins: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weighted sum and total weight of each loss for each data source; for logs, no gradient.

    Args:
        values: loss name to unreduced values `[E]`.
        targets: weights and origins.
        origins: number of data sources.

    Returns:
        Loss name to two float32 vectors `[origins]`: their quotient is the mean of the source.
    """
    out = {}
    for name, value in values.items():
        weight, origin = targets.weights[name], targets.origins[name]
        empty = torch.zeros(origins, dtype=torch.float32, device=value.device)
        total = empty.index_add(0, origin, value.detach().float() * weight)
        out[name] = total, empty.index_add(0, origin, weight.float())
    return out
