"""Attention in which every query row sees one interval of keys.

Causal, packed documents, prefix, image-bidirectional and padding masks are all of this form:
query t sees keys `[lo[t], hi[t])`. A key may also end: no row from `until[s]` on sees key s (the
noised copy of an image, of which later rows see a clean one). No T x T mask is ever made.
`plan_intervals` reads the vectors to the host once per micro-batch; every layer then reuses the
plan.

Tiles (a CPU, and intervals that lie on the host): rows are cut into groups that see only their own
keys. A long causal document runs as one causal call of `dense_attention`, many short ones of nearly
one length as a batch of such calls, padded to the longest; everything else in tiles of `TILE_ROWS`
query rows over the keys they reach, with a small boolean mask.
FlexAttention (intervals on a GPU): a mask function over the two vectors, its block mask built in
the plan.

A sampler knows the lengths of its prompts, so on a GPU too it plans tiles, compiles nothing, and
one prompt is one causal dense call. In training `lo` and `hi` come to each pipeline stage on the
GPU. To find that a pack is one causal document the host would have to wait for it once a
micro-batch, or hand a flag through all stages; packs of many documents are the rule, so training
keeps FlexAttention (0.6 of cuDNN's speed at width 128).

Cost: 4 K H sum(hi - lo) operations in the forward pass, plus what tiles mask away.

T query rows   S keys   H heads   K head width
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mmtrain.ops.dense_attention import dense_attention
from mmtrain.ops.select import AttentionBackend, Shapes, attention_backend

# Forward and backward, one CPU thread. 1,260 rows of 4 x 32 in documents of 12 to 100 tokens,
# mostly 18 to 25: 7.8 ms in shared groups; 6.2, 4.8, 4.7, 4.9 ms in batches of fill 0.5, 0.65,
# 0.75, 0.9. 2,048 rows of 8 x 64 in documents of 20 to 80 tokens, in shared groups of 32, 64, 128,
# 256 rows: 26, 26, 36, 56 ms. One document with bidirectional images in tiles of 64, 128, 256, 512
# rows: 292, 264, 246, 280 ms.
SHORT_ROWS = 64  # causal documents up to this many rows run in batches,
BATCH_FILL = 0.75  # none shorter than this share of the longest of its batch,
SHORT_SHARE = 0.25  # where they are this share of all rows: moving rows into batches costs copies
SHARED_ROWS = 64  # other short documents run together up to this many rows
TILE_ROWS = 128  # longer groups that need a mask are cut into tiles of this many; also flex's block


@dataclass(frozen=True)
class Tile:
    """Query rows `[start, stop)` over keys `[first, last)`, counted inside their document."""

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None = None  # boolean [rows, keys], or None when every row sees every key
    causal: bool = False  # exactly lower triangular, rows and keys of the same length

    def to(self, device: torch.device) -> "Tile":
        """The tile for rows on `device`."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))


@dataclass(frozen=True)
class Group:
    """Query rows that see no key outside the group's own; groups partition rows and keys.

    Attributes:
        rows: of the whole group.
        keys: of the whole group.
        tiles: how each of its documents is cut.
        documents: how many stand in a row, of equal length.
    """

    rows: int
    keys: int
    tiles: tuple[Tile, ...]
    documents: int = 1


@dataclass(frozen=True)
class IntervalPlan:
    """What every layer needs to know about one micro-batch's intervals.

    Attributes:
        groups: for the tiled reference; empty when `block_mask` is used.
        block_mask: for FlexAttention, or None.
        places_T: int64, row of the groups that holds each row; None when they lie as they are.
    """

    groups: tuple[Group, ...]
    block_mask: BlockMask | None = None
    places_T: Tensor | None = None

    def to(self, device: torch.device) -> "IntervalPlan":
        """The plan for rows on `device`."""
        groups = tuple(
            replace(group, tiles=tuple(tile.to(device) for tile in group.tiles))
            for group in self.groups
        )
        places_T = None if self.places_T is None else self.places_T.to(device)
        return IntervalPlan(groups, self.block_mask, places_T)


def plan_intervals(
    lo_T: Tensor,
    hi_T: Tensor,
    keys: int,
    device: torch.device | None = None,
    until_S: Tensor | None = None,
) -> IntervalPlan:
    """Plan attention of T rows over `keys` keys, once for all layers.

    Args:
        lo_T: integers, first key each row sees.
        hi_T: integers, one past the last key each row sees; `0 <= lo < hi <= keys`, because the
            softmax over no key at all is undefined (let padding rows see themselves).
        keys: number of keys S.
        device: of the rows, where it is not that of `lo` and `hi`.
        until_S: integers, first row from which on no row sees a key; None = keys do not end. A row
            must still see a key.
    """
    if attention_backend(lo_T.device) is AttentionBackend.FLEX:
        return IntervalPlan((), _block_mask(lo_T, hi_T, keys, until_S))
    until = None if until_S is None else until_S.cpu()
    return _tiled_plan(lo_T.cpu(), hi_T.cpu(), keys, until).to(device or lo_T.device)


def _tiled_plan(lo: Tensor, hi: Tensor, keys: int, until: Tensor | None) -> IntervalPlan:
    assert bool((lo < hi).all()) and bool((lo >= 0).all()) and bool((hi <= keys).all()), (
        "a query row sees no key, or keys that do not exist"
    )
    if until is None:
        until = torch.full((keys,), len(lo))
    if keys != lo.shape[0]:
        return IntervalPlan((Group(len(lo), keys, tuple(_tiles(lo, hi, until, len(lo)))),))
    return _plan_documents(lo, hi, until)


def interval_attention(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, plan: IntervalPlan, scale: float
) -> Tensor:
    """Softmax attention of each query row over its interval of keys.

    Args:
        q_THK: queries.
        k_SHK: keys; with fewer heads than queries each serves a group of neighbouring query heads.
        v_SHK: values, as many heads as keys.
        plan: `plan_intervals` of this micro-batch.
        scale: factor on the logits.

    Returns:
        `[T, H, K]` in the queries' type.
    """
    k_SHK, v_SHK = (repeat_heads(x, q_THK.shape[-2]) for x in (k_SHK, v_SHK))
    if plan.block_mask is not None:
        return _flex(q_THK, k_SHK, v_SHK, plan.block_mask, scale)
    if plan.places_T is None:
        return _attend(q_THK, k_SHK, v_SHK, plan.groups, scale)
    places, room = plan.places_T, sum(group.rows for group in plan.groups)
    q, k, v = (_Place.apply(x, places, room) for x in (q_THK, k_SHK, v_SHK))
    out: Tensor = _Take.apply(_attend(q, k, v, plan.groups, scale), places)
    return out


def repeat_heads(x_SGK: Tensor, heads: int) -> Tensor:
    """Keys or values `[..., G, K]` of grouped queries as `[..., H, K]`: each head H / G times.

    A copy; SDPA's own grouping takes as long on a CPU (512 rows of 8 x 64 over 2 heads: 67 ms).
    """
    groups = x_SGK.shape[-2]
    return x_SGK if groups == heads else x_SGK.repeat_interleave(heads // groups, dim=-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...], scale: float) -> Tensor:
    """Attention of rows in the groups' order."""
    if len(groups) == 1:
        return torch.cat(list(_group(q, k, v, groups[0], scale)))
    # split, not slices: its backward is one concatenation instead of one zero-padded sum a slice
    rows, keys = [g.rows for g in groups], [g.keys for g in groups]
    split = torch.split(q, rows), torch.split(k, keys), torch.split(v, keys)
    parts = zip(*split, groups, strict=True)
    return torch.cat([out for part in parts for out in _group(*part, scale)])


class _Place(torch.autograd.Function):
    """Rows to their places among `room` rows, zeros elsewhere; a plain gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, room: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(room, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class _Take(torch.autograd.Function):
    """Undo `_Place`; places differ, so the backward copies where index_select would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.room = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        room = gradient.new_zeros(ctx.room, *gradient.shape[1:])
        return room.index_copy_(0, places, gradient), None


def _group(q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float) -> Iterator[Tensor]:
    """Outputs of one group, tile after tile, each `[rows, H, K]`."""
    q, k, v = (x.view(group.documents, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    for tile in group.tiles:
        out = dense_attention(
            q[:, :, tile.start : tile.stop],
            k[:, :, tile.first : tile.last],
            v[:, :, tile.first : tile.last],
            mask=tile.mask,
            causal=tile.causal,
            scale=scale,
            shapes=Shapes.CHANGING,
        )
        yield out.transpose(1, 2).flatten(0, 1)


def _plan_documents(lo: Tensor, hi: Tensor, until: Tensor) -> IntervalPlan:
    """Short causal documents in batches behind the rest, where there are enough of them."""
    row, ends = torch.arange(len(lo)), _ends(lo, hi)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    lengths = ends - begins
    document = torch.repeat_interleave(lengths)
    until = torch.minimum(until, ends[document])  # no row behind sees the key anyway
    odd = (hi != row + 1) | (lo != begins[document])  # rows that are not causal in their document
    odd |= until != ends[document]
    odds = torch.zeros(len(ends), dtype=torch.int64).index_add_(0, document, odd.long())
    short = (lengths <= SHORT_ROWS) & (odds == 0)
    if int(lengths[short].sum()) < SHORT_SHARE * len(lo):
        return IntervalPlan(tuple(_groups(lo, hi, until)))
    rest = ~short[document]
    places = torch.cumsum(rest, 0) - 1
    shift = (row - places)[rest]
    left = [x[rest] - shift for x in (lo, hi, until)]
    groups = list(_groups(*left)) if bool(rest.any()) else []
    first = torch.zeros_like(begins)
    first[short], batches = _batches(lengths[short], int(rest.sum()))
    places = torch.where(rest, places, first[document] + row - begins[document])
    groups += batches
    as_they_are = sum(group.rows for group in groups) == len(row) and torch.equal(places, row)
    return IntervalPlan(tuple(groups), None, None if as_they_are else places)


def _batches(lengths: Tensor, start: int) -> tuple[Tensor, list[Group]]:
    """Batches of documents, the longest first: first row of each document, and the groups.

    Args:
        lengths: of the documents.
        start: first row of the first batch.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    batches: list[tuple[int, int]] = []  # rows and documents
    first = []
    for length in lengths[order].tolist():
        if not batches or length < BATCH_FILL * batches[-1][0]:
            batches.append((length, 0))
        rows, count = batches[-1]
        batches[-1] = (rows, count + 1)
        first.append(start)
        start += rows
    groups = [
        Group(rows * count, rows * count, (Tile(0, rows, 0, rows, causal=True),), count)
        for rows, count in batches
    ]
    return torch.tensor(first)[torch.argsort(order)], groups


def _groups(lo: Tensor, hi: Tensor, until: Tensor) -> Iterator[Group]:
    """Cut rows where no interval crosses; short neighbours share a group of one tile."""
    pending: list[int] = []  # start and stop of the group being filled
    start = 0
    for stop in _ends(lo, hi).tolist():
        if pending and stop - pending[0] <= SHARED_ROWS:
            pending[1] = stop
        else:
            if pending:
                yield _close(lo, hi, until, *pending)
            pending = [start, stop]
        start = stop
    yield _close(lo, hi, until, *pending)


def _ends(lo: Tensor, hi: Tensor) -> Tensor:
    """Where the smallest runs of rows end that see only keys of their own."""
    reach = torch.cummax(hi, 0).values  # keys seen by this row or an earlier one end here
    back = torch.cummin(lo.flip(0), 0).values.flip(0)  # this row or a later one starts here
    ends = torch.arange(1, len(lo) + 1)
    later = torch.cat([back[1:], torch.tensor([len(lo)])])
    return ends[(reach <= ends) & (later >= ends)]


def _close(lo: Tensor, hi: Tensor, until: Tensor, start: int, stop: int) -> Group:
    length, own = stop - start, slice(start, stop)
    if bool((lo[own] == start).all()) and bool((until[own] == stop).all()):
        if torch.equal(hi[own], torch.arange(start + 1, stop + 1)):
            return Group(length, length, (Tile(0, length, 0, length, causal=True),))
        if bool((hi[own] == stop).all()):
            return Group(length, length, (Tile(0, length, 0, length),))
    tiles = _tiles(lo[own] - start, hi[own] - start, until[own] - start, length)
    return Group(length, length, tuple(tiles))


def _tiles(lo: Tensor, hi: Tensor, until: Tensor, rows: int) -> Iterator[Tile]:
    """Tiles of rows over the keys they reach; masks only where rows differ."""
    for a in range(0, rows, TILE_ROWS):
        b = min(a + TILE_ROWS, rows)
        low, high = lo[a:b, None], hi[a:b, None]
        first, last = int(low.min()), int(high.max())
        alike = bool((low == first).all()) and bool((high == last).all())
        if alike and bool((until[first:last] >= b).all()):
            yield Tile(a, b, first, last)
            continue
        key, row = torch.arange(first, last), torch.arange(a, b)[:, None]
        yield Tile(a, b, first, last, (low <= key) & (key < high) & (row < until[first:last]))


def _block_mask(lo_T: Tensor, hi_T: Tensor, keys: int, until_S: Tensor | None = None) -> BlockMask:
    """Blocks of 128 x 128 that any row of theirs touches, from the rows' extremes alone.

    `create_block_mask` would evaluate all T x S pairs first. Nothing is read to the host.
    """

    def between(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (lo_T[row] <= key) & (key < hi_T[row])

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        assert until_S is not None
        return between(batch, head, row, key) & (row < until_S[key])

    # rows that fill up the last block must not change its extremes
    low_first, low_last = _block_extremes(lo_T, neutral_low=keys, neutral_high=0)
    high_first, high_last = _block_extremes(hi_T, neutral_low=keys, neutral_high=0)
    start = torch.arange(0, keys, TILE_ROWS, device=lo_T.device)
    touched = (low_first < start + TILE_ROWS) & (high_last > start)
    full = touched & (low_last <= start) & (high_first >= start + TILE_ROWS)
    if until_S is not None:
        ends, _ = _block_extremes(until_S, neutral_low=len(lo_T), neutral_high=0)
        stop = torch.arange(
            TILE_ROWS, len(low_first) * TILE_ROWS + 1, TILE_ROWS, device=ends.device
        )
        full &= stop.clamp(max=len(lo_T))[:, None] <= ends.T
    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~full),
        *_ordered(full),
        BLOCK_SIZE=TILE_ROWS,
        mask_mod=between if until_S is None else sees,
        seq_lengths=(len(lo_T), keys),
    )


def _block_extremes(x_T: Tensor, *, neutral_low: int, neutral_high: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each block of rows, both `[blocks, 1]`."""
    room = -len(x_T) % TILE_ROWS
    low, high = (
        functional.pad(x_T, (0, room), value=value).view(-1, TILE_ROWS)
        for value in (neutral_low, neutral_high)
    )
    return low.amin(1, keepdim=True), high.amax(1, keepdim=True)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of rows has, and which come first, in flex's layout."""
    count = blocks.sum(-1, dtype=torch.int32)
    index = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None], index[None, None]


@cache
def _compiled_flex() -> Any:
    """FlexAttention is only fast (and only sparse) when compiled; compile it once a process."""
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out: Tensor = _compiled_flex()(q, k, v, block_mask=mask, scale=scale)
    return out.squeeze(0).transpose(0, 1)
