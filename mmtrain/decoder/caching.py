"""Conditions and latents made once (`tools/encode_latents.py`), so that no step waits for them.

Goes over every source of a decoder recipe, held-out ones too, in stored order, a part at a time. A
part that is there is not made again, so a run that was cut short goes on, and several processes
may share the work.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

from mmtrain.data import latents
from mmtrain.data.latent_statistics import Sums
from mmtrain.data.latents import Cache, Known
from mmtrain.data.mixture import OnePass, Source
from mmtrain.data.pairs import PairAssembler
from mmtrain.decoder.conditions import Samples

log = logging.getLogger(__name__)

_BATCH = 64  # samples that the frozen models see at a time


@dataclass(frozen=True)
class Share:
    """Which parts one of several processes makes: part p when p % of == number."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Encoded:
    """What was done."""

    made: int  # documents with conditions and latents
    left_out: int  # no picture, no text, too much text, or a damaged picture
    there: int  # documents of parts that were there already


class Part(Protocol):
    """What makes rows of one part of a source, and counts them."""

    made: int
    left_out: int

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, Known | None]]:
        """(sample id, what the frozen models make of it) of documents start .. stop - 1."""
        ...

    def sums(self) -> Sums | None:
        """Of the latents of all rows so far, where they are kept."""
        ...


def encode(
    samples: Samples,
    sources: Sequence[Source],
    out: Path,
    *,
    kind: str,
    part_documents: int,
    share: Share,
) -> Encoded:
    """Write the conditions and latents of all documents of some sources.

    Args:
        samples: a decoder recipe's data and frozen models.
        sources: training and held-out ones.
        out: folder of the cache; made, or gone on with.
        kind: number type of the conditions: fp32, bf16 or fp16.
        part_documents: documents of a part.
        share: which parts are made here.

    Raises:
        ContentError: `out` was made by other models or of other numbers.
        StorageError: it cannot be written.
    """
    cache = latents.begin(out, samples.origin(), samples.form(kind), samples.frozen.null_QD)

    def part(source: Source) -> Part:
        return _Part(samples, cache, source)

    keyed = [(latents.key_of(source), source) for source in sources]
    return write_parts(cache, keyed, part, part_documents=part_documents, share=share)


def write_parts(
    cache: Cache,
    sources: Sequence[tuple[str, Source]],
    part: Callable[[Source], Part],
    *,
    part_documents: int,
    share: Share,
) -> Encoded:
    """Write what is not there yet of some sources, each under its key."""
    made = left_out = there = number = 0
    for key, source in sources:
        count = len(source.lengths)
        for start in range(0, count, part_documents):
            stop = min(start + part_documents, count)
            number += 1
            if (number - 1) % share.of != share.number:
                continue
            if cache.has(key, start, stop):
                there += stop - start
                continue
            began = perf_counter()
            writing = part(source)
            cache.write(key, start, stop, writing.rows(start, stop), writing.sums)
            made, left_out = made + writing.made, left_out + writing.left_out
            rate = (stop - start) / (perf_counter() - began)
            log.info(
                "%s documents %d to %d: %d made, %d left out, %.0f documents/s",
                source.name,
                start,
                stop - 1,
                writing.made,
                writing.left_out,
                rate,
            )
    return Encoded(made, left_out, there)


class _Part:
    """The documents of one part, counted."""

    def __init__(self, samples: Samples, cache: Cache, source: Source) -> None:
        self.samples, self.cache, self.source = samples, cache, source
        self.made = self.left_out = 0
        self._assembler: PairAssembler = samples.fresh_assembler([source])
        self._plan = samples.plan(OnePass(source))

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, Known | None]]:
        """(sample id, what the frozen models make of it) of documents start .. stop - 1."""
        for first in range(start, stop, _BATCH):
            last = min(first + _BATCH, stop)
            ready = self._known(first, last)
            self.made += len(ready)
            self.left_out += last - first - len(ready)
            for number in range(first, last):
                sample_id = self.source.lengths.document(number).sample_id
                yield sample_id, ready.get(f"{self.source.name}/{sample_id}")

    def sums(self) -> Sums | None:
        """None: latents of a decoder are scaled by its VAE alone."""
        return None

    def _known(self, start: int, stop: int) -> dict[str, Known]:
        """By name of the sample; those that are no pair, or damaged, are not there."""
        found, failures = self._assembler.read(self._plan.pairs(start, stop))
        for failure in failures:
            log.warning("%s/%s left out: %s", failure.source, failure.sample_id, failure.reason)
        if not found:
            return {}
        pairs = self._assembler.merge(found, tuple(range(len(found))))
        known = self.samples.frozen.know(pairs)
        return {
            sample.name: Known(known.conditions[index], known.latents[index])
            for index, sample in enumerate(found)
        }
