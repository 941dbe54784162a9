"""Rows of an MDS dataset, local or remote, read at random.

Format and decoding of columns are mosaicml-streaming's (0.13). Its reader opens the shard anew for
every row; here a few stay open, checked once, and a row is one `pread` of its bytes.
"""

import json
import os
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash
from streaming.base.spanner import Spanner

from mmtrain.data.document import SampleError
from mmtrain.data.fetch import HASH, INDEX, ExpectedFile, Folder, Identity, identity
from mmtrain.errors import ContentError, MissingError, Problem, RecipeError

_PLACE_BYTES = 4  # MDS keeps the place of every row as 32 bits
_SHARD_LIMIT_BYTES = 1 << 32
_OPEN_SHARDS = 16  # of a process; of a bounded cache fewer, because an open shard stays in it
_OPEN_SHARDS_BOUNDED = 2


class Rows:
    """Random access to the rows of a local or remote MDS dataset.

    A shard is fetched and checked when it is first needed, once per process. Safe to hand to
    worker processes. The cache of a remote dataset keeps the index it was begun with: a dataset
    never changes, a new one has a new name.
    """

    def __init__(self, folder: Folder, columns: Mapping[str, str]) -> None:
        """Read and check the index.

        Args:
            folder: where the files are.
            columns: name and encoding of each column.

        Raises:
            MissingError: there is no index.
            ContentError: the index is of other rows.
            RecipeError: the bound of the cache is below the size of one shard.
        """
        self.folder = folder
        text = _read_index(folder)
        self.dataset = get_hash(HASH, text)  # identity of the dataset
        try:
            self._shards = [_reader(folder, e, columns) for e in json.loads(text)["shards"]]
            self.shard_sizes = tuple(int(shard.samples) for shard in self._shards)
        except ContentError:
            raise
        except Exception as error:  # a forged index: whatever the reader of streaming says
            place = folder.local / INDEX
            raise ContentError(
                f"{place} is no MDS index: {type(error).__name__} {error}; write the dataset again"
            ) from error
        _check_bound(folder, self._shards)
        self._spanner = Spanner(np.array(self.shard_sizes)) if self._shards else None
        self._plain = _Plain.of(self._shards)
        self._open: OrderedDict[int, _Shard] = OrderedDict()  # the last one was used last
        self._sound: dict[int, Identity] = {}  # shards that this process has checked

    def __len__(self) -> int:
        """Rows."""
        return sum(self.shard_sizes)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files."""
        return self.__dict__ | {"_open": OrderedDict()}

    def row(self, number: int) -> dict[str, Any]:
        """The row `number` in stored order, 0 <= number < len.

        Raises:
            SampleError: the row alone cannot be read.
            MissingError, ContentError, StorageError, ServiceError: its shard cannot be had.
        """
        if not 0 <= number < len(self) or self._spanner is None:
            raise ContentError(
                f"{self.folder.local}: document {number} asked, {len(self)} there; "
                "the index of lengths belongs to other shards"
            )
        shard, row = self._spanner[number]
        data = self._opened(shard).row(row)
        try:
            if self._plain is not None:
                return self._plain.row(data)
            found: dict[str, Any] = self._shards[shard].decode_sample(data)
        except (ValueError, TypeError, IndexError) as error:
            is_text = isinstance(error, UnicodeDecodeError)
            raise SampleError(
                f"{self.folder.local}: row {number} cannot be read: {error}",
                "text is no UTF-8" if is_text else "row cannot be read",
            ) from error
        return found

    def _opened(self, shard: int) -> "_Shard":
        if (found := self._open.get(shard)) is not None:
            self._open.move_to_end(shard)
            return found
        bounded = self.folder.cache is not None
        while len(self._open) >= (_OPEN_SHARDS_BOUNDED if bounded else _OPEN_SHARDS):
            self._open.popitem(last=False)[1].close()
        reader, known = self._shards[shard], self._sound.get(shard)
        raw = _expected(reader.raw_data)
        if reader.zip_data is None:
            file = self.folder.open(raw, known)
        else:
            file = self.folder.open_packed(
                _expected(reader.zip_data),
                raw,
                lambda packed: decompress(reader.compression, packed),
                known,
            )
        self._sound[shard] = identity(file)
        self._open[shard] = found = _Shard(file, raw.name, self.shard_sizes[shard], self.folder)
        return found


@dataclass(frozen=True)
class _Plain:
    """Columns of text and bytes alone: the same as `decode_sample` in a third of its time."""

    names: tuple[str, ...]
    are_text: tuple[bool, ...]
    sizes: str  # format of `struct`

    @classmethod
    def of(cls, readers: list[Any]) -> "_Plain | None":
        """What the rows of all shards are made of; None when it is more than that."""
        found = {(*r.column_names, *r.column_encodings) for r in readers}
        if len(found) != 1 or not set(readers[0].column_encodings) <= {"str", "bytes"}:
            return None
        encodings = readers[0].column_encodings
        texts = tuple(encoding == "str" for encoding in encodings)
        return cls(tuple(readers[0].column_names), texts, f"<{len(texts)}I")

    def row(self, data: bytes) -> dict[str, Any]:
        """A row: the sizes of its columns, then the columns."""
        begin, row = struct.calcsize(self.sizes), {}
        try:
            sizes = struct.unpack_from(self.sizes, data)
        except struct.error as error:
            raise ValueError(str(error)) from error
        for name, is_text, size in zip(self.names, self.are_text, sizes, strict=True):
            value = data[begin : begin + size]
            row[name] = value.decode() if is_text else value
            begin += size
        return row


def open_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    """Open a local dataset of other rows than documents."""
    return Rows(Folder(local=path), columns)


class _Shard:
    """An open shard: how many rows, where each begins, and where the last one ends, as uint32."""

    def __init__(self, file: BinaryIO, name: str, rows: int, folder: Folder) -> None:
        """Read and check the table of rows."""
        self._file, self._path = file, folder.local / name
        self._bounds = self._read_bounds(rows)

    def _read_bounds(self, rows: int) -> NDArray[np.uint32]:
        size = os.fstat(self._file.fileno()).st_size
        head = np.frombuffer(self._bytes(0, min(4 * (rows + 2), size // 4 * 4)), np.uint32)
        bounds = head[1:]
        sound = len(head) == rows + 2 and int(head[0]) == rows and 4 * (rows + 2) <= int(bounds[0])
        if not sound or int(bounds[-1]) > size or bool((bounds[1:] < bounds[:-1]).any()):
            self.close()
            raise ContentError(
                f"{self._path} is damaged: its table of rows is none of {rows} rows; restore it "
                "or write it again"
            )
        return bounds

    def row(self, number: int) -> bytes:
        """Bytes of one row."""
        begin, end = int(self._bounds[number]), int(self._bounds[number + 1])
        data = self._bytes(begin, end - begin)
        if len(data) != end - begin:
            raise ContentError(f"{self._path} was cut short while it was read; restore it")
        return data

    def _bytes(self, begin: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, begin)

    def close(self) -> None:
        """Let the shard go."""
        self._file.close()


def _expected(info: Any) -> ExpectedFile:
    return ExpectedFile(info.basename, info.bytes, info.hashes)


def _read_index(folder: Folder) -> bytes:
    try:
        return folder.ensure(ExpectedFile(INDEX)).read_bytes()
    except MissingError as error:
        raise MissingError(
            f"{folder.remote or folder.local} holds no {INDEX}: it is no dataset, or its writing "
            "never finished"
        ) from error


def _check_bound(folder: Folder, readers: list[Any]) -> None:
    largest = max((reader.raw_data.bytes for reader in readers), default=0)
    if folder.cache is not None and largest > folder.cache.limit_bytes:
        text = (
            f"found {folder.cache.limit_bytes}, and {folder.remote} has a shard of {largest} bytes;"
            " allowed: room for several shards of every source, or 0 = no bound"
        )
        raise RecipeError([Problem("data.cache_bytes", text)])


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
