"""Rows' intervals of keys, seen from the keys."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.nn.masks import Intervals
from mmtrain.ops.intervals import KeyIntervals, column_intervals


def seen_by_columns(intervals: KeyIntervals) -> Tensor:
    row = torch.arange(intervals.lo_BT.shape[-1])[:, None]
    return (intervals.first_BS[:, None] <= row) & (row < intervals.last_BS[:, None])


packings = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(packings, st.integers(0, 5), st.sampled_from(["causal", "image", "prefix"]))
def test_columns_of_every_mask_of_the_trunk_are_exact(
    lengths: list[int], size: int, kind: str
) -> None:
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows, starts = torch.arange(len(segments)), Intervals.causal_packed(segments).lo_T
    match kind:
        case "causal":
            mask = Intervals.causal_packed(segments)
        case "image":  # the first rows of a document are an image
            spans = torch.where(rows - starts < size, segments, -1)
            mask = Intervals.image_bidirectional(segments, spans)
        case _:
            mask = Intervals.prefix(segments, rows - starts < size)
    intervals = KeyIntervals.of_rows(mask.lo_T, mask.hi_T, len(segments))
    assert torch.equal(seen_by_columns(intervals), intervals.sees_BTS())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_columns_of_any_intervals_leave_out_no_row_that_sees(
    rows: int, keys: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lo, hi = (torch.randint(0, keys + 1, (3, rows), generator=generator) for _ in range(2))
    intervals = KeyIntervals.of_rows(lo, hi, keys)
    assert not (intervals.sees_BTS() & ~seen_by_columns(intervals)).any()
    assert (intervals.first_BS <= intervals.last_BS).all()


def test_without_rows_nobody_sees_a_key() -> None:
    nothing = torch.zeros(2, 0, dtype=torch.int32)
    first, last = column_intervals(nothing, nothing, 4)
    assert first.shape == last.shape == (2, 4) and not (last - first).any()
