"""Which document comes when: sources mixed by weight, each in a seeded order per epoch.

Draw k takes source s when the k-th point of a golden-ratio sequence falls into the share of s,
so any stretch of n draws holds n * share of a source up to a few documents, and where a source
stands at draw k is a count, not a state. Inside a source, mosaicml-streaming's shard-aware
shuffle (py1e, 0.13) orders the documents of an epoch; every document comes once per epoch.

Cost: an epoch's order is 8 bytes per document of that source, made when first needed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle

from mmtrain.data.document import Document
from mmtrain.data.lengths import Lengths
from mmtrain.data.rules import RuleOptions
from mmtrain.errors import ContentError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the least clustered steps
_BLOCK_DOCUMENTS = 1 << 18  # how far apart the shuffle carries documents of one shard
_CHUNK = 1 << 20  # draws counted at a time


class DocumentReader(Protocol):
    """Random access to documents; `data.shards.Shards` is one."""

    def document(self, number: int) -> Document:
        """The document `number` in stored order."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data source: `name` seeds its order and its rules, `weight` is its share of documents."""

    name: str
    lengths: Lengths
    documents: DocumentReader
    options: RuleOptions
    weight: float = 1.0


@dataclass(frozen=True)
class DrawnDocument:
    """Document `number` of source `source` (its place in the list) in epoch `epoch`."""

    source: int
    epoch: int
    number: int


class Draws(Protocol):
    """An order of documents over several sources."""

    @property
    def sources(self) -> Sequence[Source]:
        """The sources; `DrawnDocument.source` counts in this list."""

    def window(self, start: int, stop: int) -> list[DrawnDocument]:
        """Draws [start, stop); shorter when the order ends before."""


class Mixture:
    """Endless draws from sources by weight, shuffled anew every epoch."""

    def __init__(self, sources: Sequence[Source], *, seed: int, shuffle: bool = True) -> None:
        """Check the sources.

        Raises:
            ContentError: there is none, one is empty, or a weight is not positive.
        """
        if not sources:
            raise ContentError("a mixture needs at least one source")
        for source in sources:
            if not len(source.lengths):
                raise ContentError(f"source {source.name} holds no documents")
            if not source.weight > 0:
                raise ContentError(f"source {source.name}: weight {source.weight} must be above 0")
        self.sources = tuple(sources)
        self._seed = seed
        self._order = lru_cache(maxsize=2 * len(sources))(
            self._shuffled if shuffle else self._stored
        )
        shares = np.cumsum([source.weight for source in sources], dtype=np.float64)
        bounds = shares[:-1] / shares[-1] * 2.0**64
        self._bounds = np.minimum(bounds, 2.0**64 - 2.0**11).astype(np.uint64)
        self._counted = (0, np.zeros(len(sources), np.int64))  # draws, of each source

    def window(self, start: int, stop: int) -> list[DrawnDocument]:
        """Draws [start, stop)."""
        counts = self._counts(start).tolist()
        drawn = []
        for index in self._chosen(start, stop).tolist():
            epoch, place = divmod(counts[index], len(self.sources[index].lengths))
            drawn.append(DrawnDocument(index, epoch, int(self._order(index, epoch)[place])))
            counts[index] += 1
        self._counted = (stop, np.array(counts, np.int64))
        return drawn

    def _chosen(self, start: int, stop: int) -> NDArray[np.int64]:
        points = np.arange(start, stop, dtype=np.uint64) * _GOLDEN  # wraps modulo 2^64
        return np.searchsorted(self._bounds, points, side="right").astype(np.int64)

    def _counts(self, draws: int) -> NDArray[np.int64]:
        """How many of the first `draws` draws fell on each source."""
        begin, counts = self._counted
        if begin > draws:
            begin, counts = 0, np.zeros_like(counts)
        for start in range(begin, draws, _CHUNK):
            chosen = self._chosen(start, min(start + _CHUNK, draws))
            counts = counts + np.bincount(chosen, minlength=len(self.sources))
        return counts

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


class OnePass:
    """Every document of one source once, in stored order: held-out data."""

    def __init__(self, source: Source) -> None:
        """Wrap the source."""
        self.sources = (source,)

    def window(self, start: int, stop: int) -> list[DrawnDocument]:
        """Documents [start, stop) of the source, as far as they go."""
        stop = min(stop, len(self.sources[0].lengths))
        return [DrawnDocument(0, 0, number) for number in range(start, stop)]
