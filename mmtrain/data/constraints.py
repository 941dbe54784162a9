"""Batches of a stream under bounds on sums, as Unified-IO 2 keeps its history frames.

A row of a batch may hold few or many frames of history, whose buffer is of one size for the whole
batch (arXiv:2312.17172, sec. B.4; released code). What does not fit waits for the next batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BLANK = -1  # an empty place of a batch


@dataclass
class Waiting:
    """What has arrived and not left: members of the next batch, and what had no room in it."""

    batch: list[int] = field(default_factory=list)
    overflow: list[int] = field(default_factory=list)


def constrained(
    counts: Sequence[Sequence[int]], bounds: Sequence[int], batch_size: int, pool: int
) -> Iterator[tuple[list[int] | None, Waiting]]:
    """Fill batches in order of arrival.

    A batch leaves when it is full, or when as many wait beside it as the pool holds; the first of
    those begins the next batch, also when it exceeds a bound by itself. (The release means to take
    as many as fit, and takes one.)

    Args:
        counts: of each arriving example, one number a constraint.
        bounds: the largest sum of each over a batch.
        batch_size: places of a batch.
        pool: examples that may wait beside it.

    Yields:
        At each arrival the batch that leaves, `BLANK` in its empty places, or None; and what waits
        then, which the caller must not change.
    """
    waiting = Waiting()
    for index, own in enumerate(counts):
        sums = (sum(counts[at][which] for at in waiting.batch) for which in range(len(bounds)))
        fits = all(a + b <= most for a, b, most in zip(sums, own, bounds, strict=True))
        (waiting.batch if fits else waiting.overflow).append(index)
        left: list[int] | None = None
        if len(waiting.batch) == batch_size or len(waiting.overflow) == pool:
            left = [*waiting.batch, *[BLANK] * (batch_size - len(waiting.batch))]
            waiting = Waiting(waiting.overflow[:1], waiting.overflow[1:])
        yield left, waiting
