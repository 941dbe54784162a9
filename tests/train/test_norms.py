"""Norms that clipping and reports share; one data rank pays for no partition."""

import pytest
import torch

from mmtrain.train.engine import EngineSettings
from mmtrain.train.norms import sum_of_squares


@pytest.mark.parametrize("shape", [(4000, 1000), (4_000_000,), (3, 1, 7, 7), (1,)])
def test_millions_of_float32_squares_add_up_exactly(shape: tuple[int, ...]) -> None:
    """One float32 sum over 4M numbers would be off by 8e-5."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = float(gradient.double().square().sum())
    assert sum_of_squares([gradient]) == pytest.approx(exact, rel=1e-7)


def test_gradients_of_any_shape_add_up() -> None:
    assert sum_of_squares([torch.ones(2, 3), torch.full((5,), 2.0)]) == pytest.approx(26.0)
    assert sum_of_squares([]) == 0.0


@pytest.mark.parametrize(
    "stage, bf16, ranks, chosen",
    [(1, False, 1, 0), (2, False, 1, 0), (3, False, 1, 3), (1, True, 1, 1), (1, False, 2, 1)],
)
def test_one_data_rank_partitions_nothing(stage: int, bf16: bool, ranks: int, chosen: int) -> None:
    settings = EngineSettings(
        zero_stage=stage,
        accumulation=1,
        clip_norm=1.0,
        bf16=bf16,
        losses=("text",),
        loss_weights={"text": 1.0},
        sources=1,
    ).on_data_ranks(ranks)
    assert settings.zero_stage == chosen
    # whoever clips, it is done once
    assert settings.to_json()["gradient_clipping"] == (0.0 if settings.clips_here else 1.0)
