"""Attention over key intervals equals a dense float64 oracle on any mask of that form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from mmtrain.nn.masks import Intervals
from mmtrain.ops import attention
from mmtrain.ops.attention import (
    TILE_ROWS,
    IntervalPlan,
    _block_mask,
    interval_attention,
    plan_intervals,
)

HEADS, WIDTH = 2, 8


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    until: Tensor | None = None,
) -> Tensor:
    """Dense softmax attention in float64 over an explicit mask."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    key = torch.arange(k.shape[1])
    seen = (lo[:, None] <= key) & (key < hi[:, None])
    if until is not None:
        seen &= torch.arange(q.shape[1])[:, None] < until
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1)


def assert_matches_oracle(lo: Tensor, hi: Tensor, keys: int, until: Tensor | None = None) -> None:
    """Output and all three gradients."""
    generator = torch.Generator().manual_seed(0)
    q, upstream = (torch.randn(len(lo), HEADS, WIDTH, generator=generator) for _ in range(2))
    k, v = (torch.randn(keys, HEADS, WIDTH, generator=generator) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours = interval_attention(q, k, v, plan_intervals(lo, hi, keys, until_S=until), 0.3)
    expected = oracle(q, k, v, lo, hi, 0.3, until)
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=3e-5, rtol=1e-5)  # sums of 600 rows


def segments(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


unequal = st.lists(st.integers(1, 2 * TILE_ROWS), min_size=1, max_size=6).map(segments)
runs_of_equal = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4
).map(lambda runs: segments([length for length, count in runs for _ in range(count)]))
packings = st.one_of(unequal, runs_of_equal)


@settings(max_examples=25, deadline=None)
@given(packings)
def test_packed_causal_rows_see_their_document_up_to_themselves(packed: Tensor) -> None:
    intervals = Intervals.causal_packed(packed)
    assert_matches_oracle(intervals.lo_T, intervals.hi_T, len(packed))


@settings(max_examples=25, deadline=None)
@given(packings, st.randoms(use_true_random=False))
def test_rows_of_an_image_see_the_whole_image(packed: Tensor, random: object) -> None:
    spans, row = torch.full_like(packed, -1), 0
    while row < len(packed):
        room = int((packed[row:] == packed[row]).sum())
        length = random.randint(1, min(room, 40))  # type: ignore[attr-defined]
        if random.random() < 0.5:  # type: ignore[attr-defined]
            spans[row : row + length] = row
        row += length
    intervals = Intervals.image_bidirectional(packed, spans)
    for t in range(len(packed)):
        inside = (spans == spans[t]) & (packed == packed[t])
        last = int(inside.nonzero().max()) if spans[t] >= 0 else t
        assert intervals.hi_T[t] == last + 1
    assert_matches_oracle(intervals.lo_T, intervals.hi_T, len(packed))


@settings(max_examples=25, deadline=None)
@given(packings, st.integers(0, 60))
def test_rows_of_a_prefix_see_the_whole_prefix(packed: Tensor, length: int) -> None:
    starts = Intervals.causal_packed(packed).lo_T
    in_prefix = torch.arange(len(packed)) - starts < length
    intervals = Intervals.prefix(packed, in_prefix)
    sizes = (packed[:, None] == packed).sum(1)
    ends = starts + torch.minimum(sizes, torch.tensor(length))
    assert torch.equal(intervals.hi_T, torch.maximum(ends, torch.arange(len(packed)) + 1))
    assert_matches_oracle(intervals.lo_T, intervals.hi_T, len(packed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_any_intervals_over_any_number_of_keys(rows: int, keys: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lo = torch.randint(0, keys, (rows,), generator=generator)
    hi = lo + 1 + (torch.rand(rows, generator=generator) * (keys - lo)).long()
    assert_matches_oracle(lo, hi.clamp(max=keys), keys)


def some_end(packed: Tensor, seed: int) -> Tensor:
    """The row from which a key is not seen, for a fifth of the keys; it lasts for its own row."""
    draw, row = torch.Generator().manual_seed(seed), torch.arange(len(packed))
    until = row + 1 + (torch.rand(len(row), generator=draw) * (len(row) - row)).long()
    return torch.where(torch.rand(len(row), generator=draw) < 0.8, len(row), until)


@settings(max_examples=25, deadline=None)
@given(packings, st.integers(0, 2**32), st.booleans())
def test_keys_end_where_they_are_told_to(packed: Tensor, seed: int, whole: bool) -> None:
    """In causal documents, and in such whose rows see all of them."""
    intervals = Intervals.causal_packed(packed)
    ends = torch.tensor([int((packed == document).nonzero().max()) + 1 for document in packed])
    hi = ends if whole else intervals.hi_T
    assert_matches_oracle(intervals.lo_T, hi, len(packed), some_end(packed, seed))


@pytest.mark.parametrize("lengths", [[22, 17], [17, 22], [5], [1, 1], [64, 64, 65]])
def test_a_last_document_that_is_padded_changes_nothing(lengths: list[int]) -> None:
    intervals = Intervals.causal_packed(segments(lengths))
    assert_matches_oracle(intervals.lo_T, intervals.hi_T, sum(lengths))


def test_padding_rows_that_see_themselves_return_their_own_value() -> None:
    rows = torch.arange(10)
    q, k, v = torch.randn(3, 10, HEADS, WIDTH)
    out = interval_attention(q, k, v, plan_intervals(rows, rows + 1, 10), 1.0)
    torch.testing.assert_close(out, v)


def test_a_row_that_sees_no_key_is_refused() -> None:
    with pytest.raises(AssertionError, match="sees no key"):
        plan_intervals(torch.tensor([0, 1]), torch.tensor([1, 1]), 2)


@pytest.mark.parametrize(
    "lengths", [[1000], [500, 500], [30] * 40, [1] * 600], ids=["one", "two", "short", "padding"]
)
def test_work_and_masks_stay_near_what_the_intervals_need(lengths: list[int]) -> None:
    """Long documents run without any mask; short ones share tiles no larger than a tile."""
    plan = Intervals.causal_packed(segments(lengths)).plan
    assert masked_entries(plan) <= sum(lengths) * TILE_ROWS
    if min(lengths) > TILE_ROWS:
        assert masked_entries(plan) == 0


def test_short_documents_run_in_batches_of_nearly_one_length() -> None:
    plan = Intervals.causal_packed(segments([32, 7, 200, *[30, 25] * 20, 8])).plan
    assert [(group.rows, group.documents) for group in plan.groups] == [
        (200, 1),
        (41 * 32, 41),
        (2 * 8, 2),
    ]
    assert masked_entries(plan) == 0


def test_documents_of_one_length_are_not_moved() -> None:
    plan = Intervals.causal_packed(segments([32] * 40)).plan
    assert plan.places_T is None
    assert [group.documents for group in plan.groups] == [40]


def test_few_short_documents_are_not_moved() -> None:
    plan = Intervals.causal_packed(segments([40, 400, 30, 500])).plan
    assert plan.places_T is None
    assert [group.rows for group in plan.groups] == [40, 400, 30, 500]


@pytest.mark.parametrize("lengths", [[300], [40, 400, 30, 500, 7, 9], [32, 7, 200, *[30, 25] * 20]])
def test_lengths_that_the_host_knows_make_the_same_plan_for_another_device(
    lengths: list[int],
) -> None:
    """Tensors of the device `meta` cannot be read: whoever asks them for a number fails."""
    known = Intervals.causal_lengths(lengths, torch.device("meta"))
    told = Intervals.causal_packed(segments(lengths))
    assert torch.equal(known.lo_T, told.lo_T) and torch.equal(known.hi_T, told.hi_T)
    assert shape_of(known.plan) == shape_of(told.plan)
    parts = [tile.mask for group in known.plan.groups for tile in group.tiles]
    for part in (*parts, known.plan.places_T):
        assert part is None or part.device.type == "meta"
    q = torch.randn(sum(lengths), HEADS, WIDTH, device="meta")
    assert interval_attention(q, q, q, known.plan, 0.3).shape == q.shape


def shape_of(plan: IntervalPlan) -> list[object]:
    tiles = [
        (tile.start, tile.stop, tile.first, tile.last, tile.mask is None, tile.causal)
        for group in plan.groups
        for tile in group.tiles
    ]
    return [[(g.rows, g.keys, g.documents) for g in plan.groups], tiles, plan.places_T is None]


def masked_entries(plan: IntervalPlan) -> int:
    masks = (tile.mask for group in plan.groups for tile in group.tiles)
    return sum(mask.numel() for mask in masks if mask is not None)


def test_documents_do_not_see_each_other() -> None:
    """Changing one document leaves the others' outputs bit-equal."""
    intervals = Intervals.causal_packed(segments([50, 200, 30]))
    q, k, v = torch.randn(3, 280, HEADS, WIDTH)
    before = interval_attention(q, k, v, intervals.plan, 0.3)
    k[50:250], v[50:250] = 7.0, -7.0
    after = interval_attention(q, k, v, intervals.plan, 0.3)
    assert torch.equal(before[:50], after[:50]) and torch.equal(before[250:], after[250:])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [[100, 60, 96], [600, 3, 170], [1] * 130])
def test_the_flex_mask_is_the_same_mask(lengths: list[int]) -> None:
    """The CUDA path's mask function, run by the uncompiled FlexAttention on this machine."""
    intervals = Intervals.causal_packed(segments(lengths))
    q, k, v = torch.randn(3, sum(lengths), HEADS, 16)
    for until in (None, some_end(segments(lengths), 3)):
        mask = _block_mask(intervals.lo_T, intervals.hi_T, sum(lengths), until)
        batched = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = flex_attention(*batched, block_mask=mask, scale=0.3)[0].transpose(0, 1)
        expected = oracle(q, k, v, intervals.lo_T, intervals.hi_T, 0.3, until)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(packings, st.integers(1, 200), st.booleans())
def test_flex_blocks_are_those_of_the_dense_mask(packed: Tensor, spread: int, end: bool) -> None:
    """Every block with a visible pair is kept, and a block called full has no hidden pair."""
    rows = torch.arange(len(packed))
    starts = Intervals.causal_packed(packed).lo_T
    lo = torch.maximum(starts, rows - spread)
    until = torch.where(rows < len(rows) // 4, rows + 1, len(rows)) if end else None
    mask = _block_mask(lo, rows + 1, len(packed), until)
    seen = (lo[:, None] <= rows) & (rows < rows[:, None] + 1)
    if until is not None:
        seen &= rows[:, None] < until
    for i in range(0, len(packed), TILE_ROWS):
        partial, full = (
            set(index[0, 0, i // TILE_ROWS, : count[0, 0, i // TILE_ROWS]].tolist())
            for count, index in (
                (mask.kv_num_blocks, mask.kv_indices),
                (mask.full_kv_num_blocks, mask.full_kv_indices),
            )
        )
        for j in range(0, len(packed), TILE_ROWS):
            block = seen[i : i + TILE_ROWS, j : j + TILE_ROWS]
            if block.any():
                assert j // TILE_ROWS in partial | full
            if j // TILE_ROWS in full:
                assert block.all()


def fourteen_pairs() -> tuple[Tensor, Tensor]:
    """4,096 rows: 14 captions of 30 tokens, each with a picture of 256 rows, then padding."""
    document = torch.arange(4096) // 288
    place = torch.arange(4096) % 288
    spans = torch.where((place >= 31) & (place < 287) & (document < 14), document, -1)
    intervals = Intervals.image_bidirectional(document, spans)
    return intervals.lo_T, intervals.hi_T


def test_fourteen_pairs_take_a_quarter_of_the_blocks_of_a_dense_mask_at_most() -> None:
    lo, hi = fourteen_pairs()
    mask = _block_mask(lo, hi, len(lo))
    kept = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    causal = _block_mask(torch.zeros_like(lo), torch.arange(1, 4097), 4096)
    triangle = int(causal.kv_num_blocks.sum() + causal.full_kv_num_blocks.sum())
    assert kept * 4 <= triangle < 32 * 32
    pairs = int((hi - lo).sum())
    tiles = plan_intervals(lo, hi, len(lo)).groups
    walked = sum((t.stop - t.start) * (t.last - t.first) for g in tiles for t in g.tiles)
    assert pairs <= walked < 4096 * 4096 / 4, "tiles walk little more than what is seen"


def test_other_masks_of_the_same_size_compile_nothing_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guards are dynamo's, whatever compiles behind it; here nothing does."""
    torch._dynamo.reset()
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(inputs)
        return graph.forward

    compiled = torch.compile(flex_attention, dynamic=False, backend=counting)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: compiled)
    q, k, v = torch.randn(3, 256, HEADS, 16)
    seen = []
    for lengths in ([256], [100, 156], [1, 200, 55], [128, 128]):
        packed = Intervals.causal_packed(segments(lengths))
        plan = IntervalPlan((), _block_mask(packed.lo_T, packed.hi_T, 256))
        interval_attention(q, k, v, plan, 0.3)
        seen.append(len(graphs))
    assert seen[0] >= 1 and seen[-1] == seen[1], seen
