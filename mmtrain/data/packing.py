"""Strategies of packing: sizes of documents in, packs out. Two budgets, no randomness.

A size is two numbers: (positions, images), or (encoder, decoder) of a model with both. A strategy
also says how many of the documents it sees fill whole packs, so that a window can end there and
no pack is left half empty; what is left begins the next window.

Cost: some 10 us a document at 16 documents a pack and 256 at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mmtrain.data.choices import Packing

Size = tuple[int, int]
Packs = list[list[int]]  # ascending indices into the sizes

POOL = 10  # documents that wait for a partner (Unified-IO 2, arXiv:2312.17172, released code)
_TRIES = 12  # ends of a window that are tried
_BLANK = -1  # no partner


@dataclass(frozen=True)
class Strategy:
    """One way to pack.

    Attributes:
        pack: all of some documents, each within the budgets.
        whole: how many of the documents, from the first on, fill whole packs, and not more packs
            than asked for; 1 or more.
    """

    pack: Callable[[Sequence[Size], Size], Packs]
    whole: Callable[[Sequence[Size], Size, int], int]


def first_fit(sizes: Sequence[Size], budgets: Size) -> Packs:
    """As few packs as first-fit-decreasing needs, filled evenly where that is possible.

    First-fit puts documents of one length together: a pack of clips, a pack of text. So its
    number of packs is kept, and documents are dealt out again, the largest first, each to the
    emptiest pack; every pack then holds the same mixture and ranks have the same work. Where that
    does not fit, first-fit's packs stay.
    """
    order = _decreasing(sizes, budgets)
    found = _first_fit(sizes, order, budgets)
    even = _deal(sizes, order, budgets, len(found))
    return [sorted(pack) for pack in even or found]


def _decreasing(sizes: Sequence[Size], budgets: Size) -> list[int]:
    shares = [_share(size, budgets) for size in sizes]
    return sorted(range(len(sizes)), key=lambda index: (-shares[index], index))


def _share(size: Size, budgets: Size) -> float:
    """Of a pack: that of the budget which is nearer its end."""
    return max(size[0] / budgets[0], size[1] / budgets[1] if budgets[1] else 0.0)


def _first_fit(sizes: Sequence[Size], order: Sequence[int], budgets: Size) -> Packs:
    free: list[Size] = []
    packs: Packs = []
    for index in order:
        length, pictures = sizes[index]
        assert length <= budgets[0] and pictures <= budgets[1], (sizes[index], budgets)
        place = next(
            (at for at, (room, slots) in enumerate(free) if length <= room and pictures <= slots),
            len(packs),
        )
        if place == len(packs):
            packs.append([])
            free.append(budgets)
        packs[place].append(index)
        free[place] = (free[place][0] - length, free[place][1] - pictures)
    return packs


def _deal(sizes: Sequence[Size], order: Sequence[int], budgets: Size, count: int) -> Packs | None:
    """Each document to the pack that stays emptiest with it; None when one fits nowhere."""
    used = [(0, 0)] * count
    packs: Packs = [[] for _ in range(count)]
    for index in order:
        length, pictures = sizes[index]
        load, place = min(
            (_share((room + length, slots + pictures), budgets), at)
            for at, (room, slots) in enumerate(used)
        )
        if load > 1.0:
            return None
        packs[place].append(index)
        used[place] = (used[place][0] + length, used[place][1] + pictures)
    return packs


def _whole_first_fit(sizes: Sequence[Size], budgets: Size, most: int) -> int:
    """The most documents that first-fit-decreasing puts into packs without a half empty one."""
    totals = (0, 0)
    reached: list[float] = []  # packs that the first documents need at least
    for size in sizes:
        totals = (totals[0] + size[0], totals[1] + size[1])
        reached.append(_share(totals, budgets))
    packs = min(int(reached[-1]), most)
    if packs == 0:
        return len(sizes)  # less than one pack: the look-ahead is too short to choose
    count = sum(share <= packs for share in reached)
    step = max(1, len(sizes) // (4 * packs * _TRIES))  # the tries cover a quarter of a pack
    tried = 0
    while count > 1:
        order = _decreasing(sizes[:count], budgets)
        if len(_first_fit(sizes[:count], order, budgets)) <= packs:
            return count
        tried += 1
        count -= step if tried < _TRIES else step << (tried - _TRIES)
    return 1


def next_fit(sizes: Sequence[Size], budgets: Size) -> Packs:
    """In order; a pack is closed by the first document that has no room."""
    packs: Packs = []
    room = (-1, -1)
    for index, (length, pictures) in enumerate(sizes):
        if length > room[0] or pictures > room[1]:
            packs.append([])
            room = budgets
        packs[-1].append(index)
        room = (room[0] - length, room[1] - pictures)
    return packs


def _whole_next_fit(sizes: Sequence[Size], budgets: Size, most: int) -> int:
    packs = next_fit(sizes, budgets)
    if len(packs) > most:
        return packs[most][0]
    return packs[-1][0] if len(packs) > 1 else len(sizes)


def pad(sizes: Sequence[Size], budgets: Size) -> Packs:
    """One document a pack."""
    del budgets
    return [[index] for index in range(len(sizes))]


def two_sided(sizes: Sequence[Size], budgets: Size) -> Packs:
    """Pairs as `pair` finds them; what waits at the end is packed too, in pairs that fit.

    The release never emits what waits; here no document is lost.
    """
    rows: list[tuple[int, int]] = []
    waiting: list[int] = []
    for row, slots in pair(sizes, budgets, POOL):
        waiting = slots
        if row is not None:
            rows.append(row)
    left = [index for index in waiting if index != _BLANK]
    while left:
        first = left.pop(0)
        partner = next((index for index in left if _fits(sizes, first, index, budgets)), _BLANK)
        rows.append((first, partner))
        left = [index for index in left if index != partner]
    return [sorted(index for index in row if index != _BLANK) for row in rows]


def pair(
    sizes: Sequence[Size], budgets: Size, pool: int
) -> Iterator[tuple[tuple[int, int] | None, list[int]]]:
    """Unified-IO 2's dynamic packing of a stream (arXiv:2312.17172, sec. B.4; released code).

    Args:
        sizes: (encoder, decoder) tokens of each arriving document.
        budgets: of a row.
        pool: documents that may wait.

    Yields:
        At each arrival the row that leaves, (document, partner or -1), or None, and who waits
        then, by slot (-1: free).
    """
    slots = [_BLANK] * pool
    for index in range(len(sizes)):
        fitting = [
            at
            for at, held in enumerate(slots)
            if held != _BLANK and _fits(sizes, index, held, budgets)
        ]
        if fitting:
            place = max(fitting, key=lambda at: (sum(sizes[slots[at]]), -at))
            row = (index, slots[place])
            slots[place] = _BLANK
        elif _BLANK in slots:
            slots[slots.index(_BLANK)] = index
            yield None, list(slots)
            continue
        else:
            place = max(range(pool), key=lambda at: (sum(sizes[slots[at]]), -at))
            if sum(sizes[index]) >= sum(sizes[slots[place]]):
                row = (index, _BLANK)
            else:
                row = (slots[place], _BLANK)
                slots[place] = index
        yield row, list(slots)


def _fits(sizes: Sequence[Size], one: int, other: int, budgets: Size) -> bool:
    return all(a + b <= most for a, b, most in zip(sizes[one], sizes[other], budgets, strict=True))


def _whole_pad(sizes: Sequence[Size], budgets: Size, most: int) -> int:
    del budgets
    return min(len(sizes), most)


def _whole_two_sided(sizes: Sequence[Size], budgets: Size, most: int) -> int:
    count = len(sizes) if len(sizes) <= most else min(len(sizes), 2 * most)
    while len(two_sided(sizes[:count], budgets)) > most:
        count -= 1
    return count


STRATEGIES = {
    Packing.first_fit: Strategy(first_fit, _whole_first_fit),
    Packing.next_fit: Strategy(next_fit, _whole_next_fit),
    Packing.pad: Strategy(pad, _whole_pad),
    Packing.two_sided: Strategy(two_sided, _whole_two_sided),
}
