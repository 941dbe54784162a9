"""Dropout bits on a GPU are those of the CPU."""

import pytest
import torch

from mmtrain.nn.noise import RowNoise, row_numbers, seed_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_masks_do_not_depend_on_the_device() -> None:
    rows_T = row_numbers(seed_of("a document"), 700)
    here, there = (
        RowNoise(rows_T.to(device)).chosen(seed_of("q"), range(3, 500), 0.05)
        for device in ("cpu", "cuda")
    )
    assert torch.equal(here, there.cpu())
