"""A checksum sees every bit of a tensor and where it stands."""

import pytest
import torch

from mmtrain.train.replicas import checksum, odd_factors

FACTORS = odd_factors(torch.device("cpu"), 64)  # short, so that tensors take several chunks


def numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(10, 30, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_equal_tensors_have_equal_checksums_and_any_changed_number_tells(
    dtype: torch.dtype,
) -> None:
    x = numbers(dtype)
    whole = int(checksum(x, FACTORS))
    assert int(checksum(x.clone(), FACTORS)) == whole
    for place in range(x.numel()):
        y = x.clone()
        bits = y.view(-1)[place : place + 1].view(torch.uint8)
        bits[0] ^= 1
        assert int(checksum(y, FACTORS)) != whole


def test_order_counts_within_a_chunk_and_between_chunks() -> None:
    x = numbers(torch.float32).view(-1)
    whole = int(checksum(x, FACTORS))
    for one, other in ((0, 1), (3, 3 + 64), (10, 299)):
        y = x.clone()
        y[one], y[other] = x[other], x[one]
        assert int(checksum(y, FACTORS)) != whole


def test_views_and_empty_tensors_count_by_what_they_hold() -> None:
    x = numbers(torch.float32)
    assert int(checksum(x.t().contiguous().t(), FACTORS)) == int(checksum(x, FACTORS))
    assert int(checksum(x[:0], FACTORS)) == 0
