"""Shards of documents: written whole or not at all, read at random, indexed by length.

The format is MDS and both ends are mosaicml-streaming's (0.13): MDSWriter, MDSReader, its hashes
and downloads. Its writer publishes a valid index after an exception and its runtime hides missing
shards, so a dataset is written under a temporary name and renamed at the end, and readers check
every file (`data.rows`, `data.fetch`).
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streaming.base.format.mds.writer import MDSWriter

from mmtrain.data import lengths as length_index
from mmtrain.data.cache import ShardCache
from mmtrain.data.document import (
    COLUMNS,
    Document,
    DocumentLengths,
    Modality,
    PartLength,
    SampleError,
    from_row,
    to_row,
)
from mmtrain.data.fetch import HASH, Folder
from mmtrain.data.folders import storage_errors, temporary_folder
from mmtrain.data.lengths import LEFT_OUT, Lengths
from mmtrain.data.rows import Rows
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import ContentError

log = logging.getLogger(__name__)


class ShardWriter:
    """Collects documents into MDS shards; made by `write_shards`, or by an ingestion."""

    def __init__(
        self, folder: Path, shard_bytes: int, written: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Open a writer of `folder`, which must be empty.

        Args:
            folder: where the next shard goes.
            shard_bytes: a shard that would be larger is begun anew.
            written: index entries of shards that were finished earlier, and lie elsewhere.
        """
        self.documents = 0
        self._ids: set[str] = set()
        with storage_errors(folder):
            self._writer = MDSWriter(
                columns=COLUMNS, out=str(folder), hashes=[HASH], size_limit=shard_bytes
            )
        self._writer.shards = list(written)
        self._folder = folder

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Index entries of the shards that are finished."""
        found: list[dict[str, Any]] = self._writer.shards
        return found

    def write(self, document: Document) -> None:
        """Append one document.

        Raises:
            ContentError: it is malformed, or its sample id was written before.
            StorageError: a shard cannot be written.
        """
        if document.sample_id in self._ids:
            raise ContentError(f"document {document.sample_id!r} is written twice; ids are unique")
        self.append(document)
        self._ids.add(document.sample_id)

    def append(self, document: Document) -> None:
        """Append one whose sample id is new by the way it was made; the same errors."""
        row = to_row(document)
        limit = self._writer.size_limit
        if not self._writer.new_samples:
            self._writer.size_limit = None  # else a large first one would leave an empty shard
        with storage_errors(self._folder):
            self._writer.write(row)
        self._writer.size_limit = limit
        self.documents += 1

    def finish(self) -> None:
        """Write the last shard, then the index."""
        with storage_errors(self._folder):
            self._writer.finish()

    def cancel(self) -> None:
        """Give up; the index is not written."""
        self._writer.cancel_future_jobs()


@contextmanager
def write_shards(path: Path, *, shard_bytes: int = 1 << 26) -> Iterator[ShardWriter]:
    """Write the documents of a `with` block as the dataset folder `path`.

    Everything goes to a temporary folder beside `path`, the index last, and is renamed when the
    block ends well; after an exception, or a kill, there is no `path`.

    Raises:
        ContentError: `path` exists (nothing is ever overwritten), or no document was written.
        StorageError: writing failed.
    """
    with temporary_folder(path) as partial:
        writer = ShardWriter(partial, shard_bytes)
        try:
            yield writer
            if not writer.documents:
                raise ContentError(f"{path}: no document was written; a dataset holds at least one")
            writer.finish()
        except BaseException:
            writer.cancel()
            raise


class Shards(Rows):
    """Random access to the documents of a local or remote dataset."""

    def __init__(self, folder: Folder) -> None:
        """Read and check the index.

        Raises:
            MissingError: there is no index.
            ContentError: the index is no index of documents.
        """
        super().__init__(folder, COLUMNS)

    def document(self, number: int) -> Document:
        """The document `number` in stored order, 0 <= number < len.

        Raises:
            SampleError: it alone is malformed.
            MissingError, ContentError, StorageError, ServiceError: its shard cannot be had.
        """
        return from_row(self.row(number))


def open_shards(path: Path, remote: str | None = None, cache: ShardCache | None = None) -> Shards:
    """Open the dataset at `path`; with `remote`, `path` is the cache of its files."""
    return Shards(Folder(local=path, remote=remote, cache=cache))


@dataclass(frozen=True)
class IndexReport:
    """What `build_index` counted."""

    folder: Path
    documents: int
    text_tokens: int
    images: int
    left_out: dict[str, int]  # documents that cannot be used, by reason


Counted = DocumentLengths | SampleError
Each = Callable[[Callable[[int], Counted], Iterable[int]], Iterable[Counted]]


def build_index(path: Path, tokenizer: Path | Vocabulary, each: Each = map) -> IndexReport:
    """Count the tokens and images of every document and store them next to the shards.

    Does nothing but report when a valid index is there; a stale one is replaced. Documents that
    cannot be used are logged once a kind, and no plan will take them.

    Args:
        path: of the dataset.
        tokenizer: whose tokens are counted.
        each: applies a function to numbers, in their order; may do so in other processes.

    Raises:
        MissingError, ContentError, StorageError: shards or tokenizer are missing or damaged.
    """
    vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else load_vocabulary(tokenizer)
    shards = open_shards(path)
    target = path / length_index.folder_name(vocabulary.fingerprint)
    if target.exists():
        try:
            return _report(target, load_lengths(shards, vocabulary))
        except ContentError:
            shutil.rmtree(target)  # stale or damaged: made anew from the shards below
    lengths = length_index.collect(
        _counted(shards, vocabulary, each),
        fingerprint=vocabulary.fingerprint,
        dataset=shards.dataset,
        shard_sizes=shards.shard_sizes,
    )
    with temporary_folder(target) as partial, storage_errors(target):
        length_index.save(lengths, partial)
    return _report(target, lengths)


def _counted(shards: Shards, vocabulary: Vocabulary, each: Each) -> Iterator[DocumentLengths]:
    def counted(number: int) -> DocumentLengths | SampleError:
        try:
            return count(shards.document(number), vocabulary)
        except SampleError as error:
            return error

    seen: set[str] = set()
    for number, found in enumerate(each(counted, range(len(shards)))):
        if isinstance(found, DocumentLengths):
            yield found
            continue
        if found.reason not in seen:
            log.warning("document %d left out: %s (logged once a kind)", number, found)
        seen.add(found.reason)
        yield DocumentLengths(f"row-{number}", LEFT_OUT + found.reason, ())


def count(document: Document, vocabulary: Vocabulary) -> DocumentLengths:
    """Lengths of one document."""
    parts = []
    for part in document.parts:
        text = part.modality is Modality.text
        size = len(vocabulary.encode_part(part)) if text else len(part.media)
        parts.append(
            PartLength(part.modality, size, part.match, part.time, part.answer, part.markup)
        )
    return DocumentLengths(document.sample_id, document.kind, tuple(parts))


def load_lengths(shards: Shards, vocabulary: Vocabulary) -> Lengths:
    """The length index of `shards` for a tokenizer, fetched when the shards are remote.

    Raises:
        MissingError: there is none for this tokenizer; says how to make it.
        ContentError: it is stale or damaged.
    """
    folder = shards.folder
    name = length_index.folder_name(vocabulary.fingerprint)
    place = folder.remote or folder.local
    advice = f"run `mmtrain data index {place} --tokenizer {vocabulary.folder}`"
    index = replace(
        folder,
        local=folder.local / name,
        cache=None,
        remote=None if folder.remote is None else f"{folder.remote}/{name}",
    )
    lengths = length_index.load(
        index, fingerprint=vocabulary.fingerprint, dataset=shards.dataset, advice=advice
    )
    if lengths.shard_sizes != shards.shard_sizes:
        raise ContentError(f"{index.local} is damaged: it counts other shards; {advice}")
    return lengths


def _report(folder: Path, lengths: Lengths) -> IndexReport:
    sizes, text = lengths.arrays["sizes"], lengths.arrays["modalities"] == 0
    tokens, images = int(sizes[text].sum()), int(sizes[~text].sum())
    return IndexReport(folder, len(lengths), tokens, images, lengths.left_out)
