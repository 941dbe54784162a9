"""Strategies of packing: sizes of documents in, packs out. Two budgets, no randomness.

A size is two numbers: (positions, images), or (encoder, decoder) of a model with both. A strategy
also says how many of the documents it sees fill whole packs, so that a window can end there and
no pack is left half empty; what is left begins the next window.

Cost: 50 to 300 us a document with its rules, on one core (docs/benchmarks.md).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest

import numpy as np

from mmtrain.data.choices import Packing

Size = tuple[int, int]
Packs = list[list[int]]  # ascending indices into the sizes

POOL = 10  # documents that wait for a partner (Unified-IO 2, arXiv:2312.17172, released code)
_TRIES = 12  # ends of a window that are tried
_EVEN = (1.1, 1.2)  # images of a pack over their mean, as near to 1 as it can be had
_PARTNERS = 32  # packs with few images that are asked for an exchange
_MOST_SLACK, _SLACK_OF_A_DOCUMENT = 0.025, 0.25  # of a pack; of a mean document
_MANY = 16  # packs; then one more costs less than the slack is worth
_SLACK = (0.98, 0.985, 0.99)
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
    does not fit, first-fit's packs stay, and those with many images exchange documents with others.
    """
    if not sizes:
        return []
    order = _decreasing(sizes, budgets)
    found = _first_fit(sizes, order, budgets)
    count = len(found)
    totals = (sum(length for length, _ in sizes), sum(images for _, images in sizes))
    if count >= _MANY:
        count = max(count, math.ceil(_share(totals, budgets) / _full(sizes, budgets)))
    mean, largest = totals[1] / count, max(images for _, images in sizes)
    even: Packs | None = None
    for factor in _EVEN:
        limited = (budgets[0], min(budgets[1], max(largest, math.ceil(factor * mean))))
        even = even or _deal(sizes, _decreasing(sizes, limited), limited, count)
    packs = even or _deal(sizes, order, budgets, count)
    packs = packs or _loose(sizes, budgets, count) or found
    _level(packs, sizes, budgets[0], _EVEN[0] * mean)
    return [sorted(pack) for pack in packs]


def _decreasing(sizes: Sequence[Size], budgets: Size) -> list[int]:
    shares = [_share(size, budgets) for size in sizes]
    return sorted(range(len(sizes)), key=lambda index: (-shares[index], index))


def _share(size: Size, budgets: Size) -> float:
    """Of a pack: that of the budget which is nearer its end."""
    return max(size[0] / budgets[0], size[1] / budgets[1] if budgets[1] else 0.0)


def _full(sizes: Sequence[Size], budgets: Size) -> float:
    """How full packs are made: without some slack large documents cannot be dealt out evenly."""
    mean = sum(_share(size, budgets) for size in sizes) / len(sizes)
    return 1.0 - min(_MOST_SLACK, _SLACK_OF_A_DOCUMENT * mean)


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
    used_CS = np.zeros((count, 2))  # of C packs in both budgets S
    budgets_S = np.array([budgets[0], max(1, budgets[1])], np.float64)
    packs: Packs = [[] for _ in range(count)]
    for index in order:
        loads_C = ((used_CS + sizes[index]) / budgets_S).max(axis=1)
        place = int(loads_C.argmin())
        if loads_C[place] > 1.0:
            return None
        packs[place].append(index)
        used_CS[place] += sizes[index]
    return packs


def _loose(sizes: Sequence[Size], budgets: Size, count: int) -> Packs | None:
    """So many packs at most, none filled to the brim: room for exchanges; None when that fails."""
    longest = max(length for length, _ in sizes)
    for share in _SLACK:
        limited = (max(longest, int(share * budgets[0])), budgets[1])
        loose = _first_fit(sizes, _decreasing(sizes, limited), limited)
        if len(loose) <= count:
            return loose
    return None


def _level(packs: Packs, sizes: Sequence[Size], tokens: int, images: float) -> None:
    """Exchange documents until no pack has more images than asked for, or nothing fits."""
    loads = [[sum(sizes[index][side] for index in pack) for side in (0, 1)] for pack in packs]
    stuck: set[int] = set()  # until another pack has exchanged something
    changed = False
    for _ in range(4 * len(packs)):
        free = [at for at in range(len(packs)) if at not in stuck and loads[at][1] > images]
        if not free and changed:
            stuck, changed = set(), False
            continue
        if not free:
            return
        high = max(free, key=lambda at: loads[at][1])
        few = [at for at in range(len(packs)) if loads[at][1] < loads[high][1]]
        lows = nsmallest(_PARTNERS, few, key=lambda at: loads[at][1])
        lows += nsmallest(_PARTNERS, few, key=lambda at: loads[at][0])  # with most room
        if any(_exchange(packs, loads, sizes, tokens, (high, low)) for low in lows):
            changed = True
        else:
            stuck.add(high)


def _exchange(
    packs: Packs,
    loads: list[list[int]],
    sizes: Sequence[Size],
    tokens: int,
    places: tuple[int, int],
) -> bool:
    """Give some documents of the first pack for one of the second, or for none.

    Returns:
        Whether some were found that fit and bring the packs' images nearer to each other.
    """
    high, low = places
    half = (loads[high][1] - loads[low][1] + 1) // 2
    dense = sorted(packs[high], key=lambda at: (-sizes[at][1] / max(1, sizes[at][0]), at))
    best: tuple[int, list[int], int] = (0, [], _BLANK)
    tries = [(taken, start) for taken in (_BLANK, *packs[low]) for start in range(len(dense))]
    for taken, start in tries:
        length, pictures = sizes[taken] if taken != _BLANK else (0, 0)
        room, moved = length + tokens - loads[low][0], -pictures
        given = []
        for index in dense[start:]:
            if sizes[index][0] <= room and moved + sizes[index][1] <= half:
                given.append(index)
                room, moved = room - sizes[index][0], moved + sizes[index][1]
        kept = loads[low][0] + loads[high][0] - (tokens - room)  # what the first pack holds then
        fits = kept <= tokens
        if fits and moved > best[0]:
            best = (moved, given, taken)
    moved, given, taken = best
    for source, target, indices in ((high, low, given), (low, high, [taken] if moved else [])):
        for index in indices:
            if index == _BLANK:
                continue
            packs[source].remove(index)
            packs[target].append(index)
            for side in (0, 1):
                loads[source][side] -= sizes[index][side]
                loads[target][side] += sizes[index][side]
    return moved > 0


def _whole_first_fit(sizes: Sequence[Size], budgets: Size, most: int) -> int:
    """The most documents that first-fit-decreasing puts into packs without a half empty one."""
    totals = (0, 0)
    reached: list[float] = []  # packs that the first documents need at least
    for size in sizes:
        totals = (totals[0] + size[0], totals[1] + size[1])
        reached.append(_share(totals, budgets))
    full = _full(sizes, budgets)
    packs = min(int(reached[-1] / full), most)
    if packs == 0:
        return len(sizes)  # less than one pack: the look-ahead is too short to choose
    count = sum(share <= packs * full for share in reached)
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
