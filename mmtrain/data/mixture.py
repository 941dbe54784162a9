"""Which document comes when: sources mixed by weight, each in a seeded order per epoch.

By documents, draw k takes source s when the k-th point of a golden-ratio sequence falls into the
share of s, so any stretch of n draws holds n * share of a source up to a few documents. By tokens,
every source has a clock that each of its documents moves on by tokens / weight, and the one that is
behind is drawn (weighted fair queueing), so token shares are met up to one document. Inside a
source, mosaicml-streaming's shard-aware shuffle (py1e, 0.13) orders the documents of an epoch;
every document comes once per epoch. A source whose `epochs` are used up leaves the mixture, and
its share goes to the others.

Where all this stands is a `Cursor`: a few numbers a source, which a checkpoint keeps.

Cost: an epoch's order is 8 bytes per document of that source, made when first needed.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle

from mmtrain.data.choices import WeightsBy
from mmtrain.data.document import Document
from mmtrain.data.lengths import Lengths
from mmtrain.data.rules import RuleOptions
from mmtrain.errors import ContentError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the least clustered steps
_WRAP = (1 << 64) - 1
_WAITS = -1.0  # the clock of a source without weight
_CHUNK = 1 << 20  # draws counted at a time
_BLOCK_DOCUMENTS = 1 << 18  # how far apart the shuffle carries documents of one shard


class DocumentReader(Protocol):
    """Random access to documents; `data.shards.Shards` is one."""

    def document(self, number: int) -> Document:
        """The document `number` in stored order."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data source.

    Attributes:
        name: seeds its order and its rules.
        lengths: of its documents.
        documents: reads them.
        options: how they become sequences.
        weight: its share, relative to the other sources.
        weight_steps: optimizer step -> weight from there on.
        epochs: how often its documents may come; None = without end.
    """

    name: str
    lengths: Lengths
    documents: DocumentReader
    options: RuleOptions
    weight: float = 1.0
    weight_steps: dict[int, float] = field(default_factory=dict)
    epochs: float | None = None

    def weight_at(self, step: int) -> float:
        """Weight of an optimizer step."""
        passed = [begin for begin in self.weight_steps if begin <= step]
        return self.weight_steps[max(passed)] if passed else self.weight

    @property
    def limit(self) -> int | None:
        """Documents it may give, at least one; None = without end."""
        if self.epochs is None:
            return None
        return max(1, math.floor(self.epochs * len(self.lengths) + 1e-9))


@dataclass(frozen=True)
class DrawnDocument:
    """Document `number` of source `source` (its place in the list) in epoch `epoch`."""

    source: int
    epoch: int
    number: int


@dataclass(frozen=True)
class Cursor:
    """Where an order of documents stands.

    Attributes:
        draws: documents drawn so far.
        counts: of each source; empty at the beginning.
        clocks: tokens / weight of each source, of a mixture by tokens, -1 where one waits for a
            weight; else empty.
    """

    draws: int = 0
    counts: tuple[int, ...] = ()
    clocks: tuple[float, ...] = ()


Cost = Callable[[DrawnDocument], int]  # positions that a document takes in a pack


class Draws(Protocol):
    """An order of documents over several sources."""

    @property
    def sources(self) -> Sequence[Source]:
        """The sources; `DrawnDocument.source` counts in this list."""

    def draw(self, cursor: Cursor, step: int, cost: Cost) -> Iterator[tuple[DrawnDocument, Cursor]]:
        """Documents from a cursor on, each with the cursor behind it; may end.

        Args:
            cursor: where to begin.
            step: optimizer step whose weights hold.
            cost: what a document takes, for weights by tokens.
        """

    def is_dry(self, source: int, cursor: Cursor) -> bool:
        """Whether a source has given all that it may."""


class Mixture:
    """Draws from sources by weight, shuffled anew every epoch; ends when all sources do."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        shuffle: bool = True,
        by: WeightsBy = WeightsBy.documents,
    ) -> None:
        """Check the sources.

        Raises:
            ContentError: there is none, one is empty, a weight is negative, or none is positive.
        """
        if not sources:
            raise ContentError("a mixture needs at least one source")
        for source in sources:
            if not len(source.lengths):
                raise ContentError(f"source {source.name} holds no documents")
            for weight in (source.weight, *source.weight_steps.values()):
                if not 0 <= weight < math.inf or (not weight and not source.weight_steps):
                    raise ContentError(f"source {source.name}: weight {weight} must be above 0")
        self.sources = tuple(sources)
        self._seed, self._by = seed, by
        self._order = lru_cache(maxsize=2 * len(sources))(
            self._shuffled if shuffle else self._stored
        )
        self._limits = [source.limit for source in sources]

    @property
    def documents(self) -> int | None:
        """Documents until all sources have run dry; None = without end."""
        limits = [limit for limit in self._limits if limit is not None]
        return sum(limits) if len(limits) == len(self._limits) else None

    def is_dry(self, source: int, cursor: Cursor) -> bool:
        """Whether a source has given all that it may."""
        limit = self._limits[source]
        return limit is not None and bool(cursor.counts) and cursor.counts[source] >= limit

    def window(self, start: int, stop: int) -> list[DrawnDocument]:
        """Draws [start, stop) of the weights of step 0, each document taken for one token."""
        drawn = islice(self.draw(Cursor(), 0, lambda document: 1), start, stop)
        return [document for document, _ in drawn]

    def draw(self, cursor: Cursor, step: int, cost: Cost) -> Iterator[tuple[DrawnDocument, Cursor]]:
        """Documents from a cursor on; see `Draws.draw`.

        Raises:
            ContentError: every source that still has documents has weight 0 at this step.
        """
        cursor = self._completed(cursor)
        weights = [source.weight_at(step) for source in self.sources]
        draws, counts = cursor.draws, list(cursor.counts)
        clocks = self._caught_up(cursor, weights) if self._by is WeightsBy.tokens else []
        active = self._active(counts, weights)
        bounds = _bounds([weights[index] for index in active])
        while active:
            if self._by is WeightsBy.tokens:
                index = min(active, key=lambda at: (clocks[at], at))
            else:
                index = active[bisect_right(bounds, draws * _GOLDEN & _WRAP)]
            epoch, place = divmod(counts[index], len(self.sources[index].lengths))
            document = DrawnDocument(index, epoch, int(self._order(index, epoch)[place]))
            draws, counts[index] = draws + 1, counts[index] + 1
            if clocks:
                clocks[index] += max(1, cost(document)) / weights[index]
            yield document, Cursor(draws, tuple(counts), tuple(clocks))
            if counts[index] == self._limits[index]:
                active = self._active(counts, weights)
                bounds = _bounds([weights[at] for at in active])

    def _completed(self, cursor: Cursor) -> Cursor:
        """With counts, where a mark of an older checkpoint has none: those of constant weights."""
        if cursor.counts or not cursor.draws:
            return cursor if cursor.counts else Cursor(0, (0,) * len(self.sources))
        bounds = np.array(_bounds([source.weight for source in self.sources]), np.uint64)
        counts = np.zeros(len(self.sources), np.int64)
        for start in range(0, cursor.draws, _CHUNK):
            numbers = np.arange(start, min(start + _CHUNK, cursor.draws), dtype=np.uint64)
            points = numbers * np.uint64(_GOLDEN)  # modulo 2^64
            chosen = np.searchsorted(bounds, points, side="right")
            counts += np.bincount(chosen, minlength=len(self.sources))
        return Cursor(cursor.draws, tuple(counts.tolist()))

    def _caught_up(self, cursor: Cursor, weights: Sequence[float]) -> list[float]:
        """Clocks that begin near 0; a source that had no weight begins beside those that ran."""
        clocks = list(cursor.clocks) or [_WAITS] * len(self.sources)
        running = self._active(cursor.counts, weights)
        least = min((clocks[at] for at in running if clocks[at] != _WAITS), default=0.0)
        for at, clock in enumerate(clocks):
            clocks[at] = 0.0 if clock == _WAITS else clock - least
        return [clock if at in running else _WAITS for at, clock in enumerate(clocks)]

    def _active(self, counts: Sequence[int], weights: Sequence[float]) -> list[int]:
        """Sources that are drawn from.

        Raises:
            ContentError: some have documents left, but no weight.
        """
        left = [at for at, limit in enumerate(self._limits) if limit is None or counts[at] < limit]
        active = [index for index in left if weights[index] > 0]
        if left and not active:
            names = ", ".join(self.sources[index].name for index in left)
            raise ContentError(
                f"sources {names} have documents left, but their weight is 0, and the others have "
                "run dry: give one a weight, or more epochs to the others"
            )
        return active

    def _shuffled(self, index: int, epoch: int) -> NDArray[np.int64]:
        source = self.sources[index]
        digest = hashlib.blake2b(f"{self._seed}\0{source.name}".encode(), digest_size=4).digest()
        sizes = np.array([size for size in source.lengths.shard_sizes if size], np.int64)
        block = max(_BLOCK_DOCUMENTS, 2 * int(sizes.max()))
        # one canonical node: the order must not depend on how many machines read it
        order: NDArray[np.int64] = get_shuffle(
            "py1e", sizes, 1, int.from_bytes(digest, "big"), epoch, block
        )
        return order

    def _stored(self, index: int, epoch: int) -> NDArray[np.int64]:
        return np.arange(len(self.sources[index].lengths))


def _bounds(weights: Sequence[float]) -> list[int]:
    """Where the share of each source but the last ends, of 2^64."""
    if not weights:
        return []
    shares = np.cumsum(weights, dtype=np.float64)
    bounds = shares[:-1] / shares[-1] * 2.0**64
    limited: list[int] = np.minimum(bounds, 2.0**64 - 2.0**11).astype(np.uint64).tolist()
    return limited


class OnePass:
    """Every document of one source once, in stored order: held-out data."""

    def __init__(self, source: Source) -> None:
        """Wrap the source."""
        self.sources = (source,)

    def draw(self, cursor: Cursor, step: int, cost: Cost) -> Iterator[tuple[DrawnDocument, Cursor]]:
        """Documents from a cursor on; see `Draws.draw`."""
        del step, cost
        for number in range(cursor.draws, len(self.sources[0].lengths)):
            yield DrawnDocument(0, 0, number), Cursor(number + 1, (number + 1,))

    def is_dry(self, source: int, cursor: Cursor) -> bool:
        """Never: it ends in silence, as held-out data do."""
        del source, cursor
        return False

    def window(self, start: int, stop: int) -> list[DrawnDocument]:
        """Documents [start, stop) of the source, as far as they go."""
        stop = min(stop, len(self.sources[0].lengths))
        return [DrawnDocument(0, 0, number) for number in range(start, stop)]
