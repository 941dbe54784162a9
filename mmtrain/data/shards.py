"""Shards of documents: written whole or not at all, read at random, indexed by length.

The format is MDS and both ends are mosaicml-streaming's (0.13): MDSWriter, MDSReader, its hashes
and downloads. Its writer publishes a valid index after an exception and its runtime hides missing
shards, so a dataset is written under a temporary name and renamed at the end, and readers check
every file (`data.fetch`).
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from streaming.base.format.mds.writer import MDSWriter
from streaming.base.hashing import get_hash
from streaming.base.spanner import Spanner

from mmtrain.data import lengths as length_index
from mmtrain.data.document import (
    COLUMNS,
    Document,
    DocumentLengths,
    Modality,
    PartLength,
    from_row,
    to_row,
)
from mmtrain.data.fetch import HASH, INDEX, ExpectedFile, Folder
from mmtrain.data.folders import storage_errors, temporary_folder
from mmtrain.data.lengths import Lengths
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import ContentError, MissingError

_PLACE_BYTES = 4  # MDS keeps the place of every row as 32 bits
_SHARD_LIMIT_BYTES = 1 << 32


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


class Rows:
    """Random access to the rows of a local or remote MDS dataset.

    A shard is fetched and checked when it is first needed, once per process. Safe to hand to
    worker processes: it holds paths, no open files. The cache of a remote dataset keeps the index
    it was begun with: a dataset never changes, a new one has a new name.
    """

    def __init__(self, folder: Folder, columns: Mapping[str, str]) -> None:
        """Read and check the index.

        Args:
            folder: where the files are.
            columns: name and encoding of each column.

        Raises:
            MissingError: there is no index.
            ContentError: the index is of other rows.
        """
        self.folder = folder
        text = _read_index(folder)
        self.dataset = get_hash(HASH, text)  # identity of the dataset
        try:
            self._shards = [_reader(folder, e, columns) for e in json.loads(text)["shards"]]
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            AssertionError,
            RecursionError,
        ) as error:
            place = folder.local / INDEX
            raise ContentError(
                f"{place} is no MDS index: {type(error).__name__} {error}"
            ) from error
        self.shard_sizes = tuple(int(shard.samples) for shard in self._shards)
        self._spanner = Spanner(np.array(self.shard_sizes)) if self._shards else None
        self._checked: set[int] = set()

    def __len__(self) -> int:
        """Rows."""
        return sum(self.shard_sizes)

    def row(self, number: int) -> dict[str, Any]:
        """The row `number` in stored order, 0 <= number < len.

        Raises:
            MissingError, ContentError, StorageError: its shard is missing, damaged, unreadable.
        """
        if not 0 <= number < len(self) or self._spanner is None:
            raise ContentError(
                f"{self.folder.local}: document {number} asked, {len(self)} there; "
                "the index of lengths belongs to other shards"
            )
        shard, row = self._spanner[number]
        if shard not in self._checked:
            self._prepare(shard)
        try:
            found: dict[str, Any] = self._shards[shard][row]
        except (ValueError, IndexError, TypeError, OverflowError, struct.error) as error:
            name = self._shards[shard].raw_data.basename
            raise ContentError(
                f"{self.folder.local / name}: row {row} is no row of MDS ({error}); the shard was "
                "written so, or forged: write the dataset again"
            ) from error
        return found

    def _prepare(self, shard: int) -> None:
        reader = self._shards[shard]
        raw = ExpectedFile(reader.raw_data.basename, reader.raw_data.bytes, reader.raw_data.hashes)
        if reader.zip_data is None:
            self.folder.ensure(raw)
        else:
            self._unpack(raw, reader)
        self._checked.add(shard)

    def _unpack(self, raw: ExpectedFile, reader: Any) -> None:
        path = self.folder.path(raw.name)
        if path.is_file() and raw.fault(path.read_bytes()) is None:
            return
        info = reader.zip_data
        packed = self.folder.ensure(ExpectedFile(info.basename, info.bytes, info.hashes))
        content = decompress(reader.compression, packed.read_bytes())
        if (fault := raw.fault(content)) is not None:
            raise ContentError(f"{packed} unpacks to a damaged {raw.name}: {fault}")
        arriving = path.with_name(f".{path.name}.{os.getpid()}.arriving")
        arriving.write_bytes(content)
        os.replace(arriving, path)


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
            MissingError, ContentError, StorageError: its shard is missing, damaged, unreadable.
        """
        return from_row(self.row(number))


def open_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    """Open a local dataset of other rows than documents."""
    return Rows(Folder(local=path, remote=None), columns)


def open_shards(path: Path, remote: str | None = None) -> Shards:
    """Open the dataset at `path`; with `remote`, `path` is the cache of its files."""
    return Shards(Folder(local=path, remote=remote))


@dataclass(frozen=True)
class IndexReport:
    """What `build_index` counted."""

    folder: Path
    documents: int
    text_tokens: int
    images: int


Each = Callable[[Callable[[int], DocumentLengths], Iterable[int]], Iterable[DocumentLengths]]


def build_index(path: Path, tokenizer: Path | Vocabulary, each: Each = map) -> IndexReport:
    """Count the tokens and images of every document and store them next to the shards.

    Does nothing but report when a valid index is there; a stale one is replaced.

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

    def counted(number: int) -> DocumentLengths:
        return count(shards.document(number), vocabulary)

    lengths = length_index.collect(
        each(counted, range(len(shards))),
        fingerprint=vocabulary.fingerprint,
        dataset=shards.dataset,
        shard_sizes=shards.shard_sizes,
    )
    with temporary_folder(target) as partial, storage_errors(target):
        length_index.save(lengths, partial)
    return _report(target, lengths)


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
        remote=None if folder.remote is None else f"{folder.remote}/{name}",
    )
    return length_index.load(
        index, fingerprint=vocabulary.fingerprint, dataset=shards.dataset, advice=advice
    )


def _report(folder: Path, lengths: Lengths) -> IndexReport:
    sizes, text = lengths.arrays["sizes"], lengths.arrays["modalities"] == 0
    tokens, images = int(sizes[text].sum()), int(sizes[~text].sum())
    return IndexReport(folder, len(lengths), tokens, images)


def _read_index(folder: Folder) -> bytes:
    try:
        return folder.ensure(ExpectedFile(INDEX)).read_bytes()
    except MissingError as error:
        raise MissingError(
            f"{folder.remote or folder.local} holds no {INDEX}: it is no dataset, or its writing "
            "never finished"
        ) from error


def _reader(folder: Folder, entry: dict[str, Any], columns: Mapping[str, str]) -> Any:
    for key in ("raw_data", "zip_data"):
        if entry.get(key):
            folder.path(entry[key]["basename"])
    found = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    if pickled := sorted(name for name, encoding in found.items() if encoding == "pkl"):
        raise ContentError(
            f"{folder.local / INDEX}: the columns {pickled} hold pickles, which can run code when "
            "they are read; refused. Convert the dataset with `write_shards` where it was made"
        )
    if found != columns:
        raise ContentError(
            f"{folder.local / INDEX} holds columns {found}, wanted are {dict(columns)}; "
            "convert the dataset with `write_shards`"
        )
    reader = reader_from_json(str(folder.local), None, entry)
    samples, size = reader.samples, reader.raw_data.bytes
    if not 0 <= samples * _PLACE_BYTES <= size <= _SHARD_LIMIT_BYTES:
        raise ContentError(
            f"{folder.local / INDEX}: {reader.raw_data.basename} with {samples:,} rows in {size:,} "
            "bytes is no shard; the index is damaged or forged, get it from where it was published"
        )
    return reader
