"""Files of a dataset: fetched from a remote folder, checked before first use.

Downloads are mosaicml-streaming's storage functions (`data.download`). Its runtime never validates
a file that is already in the cache and ends an epoch silently on a bad one (0.13,
streaming/base/dataset.py), so size and hash of every file are checked here, in every process,
on the open file that is then read.

Three attempts of 15 s without a byte, with pauses, make less than a minute. Processes of a host
that wait for the same file share its failure instead of trying one after the other.
"""

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from streaming.base.hashing import get_hash, is_hash

from mmtrain.data.cache import SHARD_LOCK, ShardCache, hold, locked, note_read
from mmtrain.data.download import LocalFault, download, joined, scheme_of
from mmtrain.errors import ContentError, MissingError, MmtrainError, ServiceError, StorageError
from mmtrain.paths import inside

INDEX = "index.json"
HASH = "xxh3_128"  # of files written here: 10 GB/s on one core, 7 ms for a 64 MiB shard
_MOST_BYTES = 1 << 30  # of a file whose size nobody recorded: an index
_SHARED = (MissingError, ContentError, StorageError, ServiceError)  # faults that waiters share
Identity = tuple[int, int, int, int]  # device, inode, size and time of change of a file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpectedFile:
    """Size and hashes a file must have; None and empty where nothing was recorded."""

    name: str
    size_bytes: int | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    def fault(self, content: bytes) -> str | None:
        """How `content` differs from what is expected, or None."""
        if self.size_bytes is not None and len(content) != self.size_bytes:
            return f"found {len(content)} bytes, expected {self.size_bytes}"
        for algorithm, expected in self.hashes.items():
            if not is_hash(algorithm):
                continue
            found = get_hash(algorithm, content)
            return None if found == expected else f"found {algorithm} {found}, expected {expected}"
        return None


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A local folder, or the local cache of a remote one.

    Attributes:
        local: folder that holds (or will hold) the files.
        remote: where missing or damaged files are fetched from; None for a local dataset.
        cache: bounds what the shards of this and other caches take; None = no bound.
        attempts: downloads of one file before giving up.
        stall_seconds: how long a download may go without a byte.
        pause_seconds: about so long after the first attempt, twice that after the second, ...
    """

    local: Path
    remote: str | None = None
    cache: ShardCache | None = None
    attempts: int = 3
    stall_seconds: float = 15.0
    pause_seconds: float = 1.0

    def path(self, name: str) -> Path:
        """Where a file that the index names is, or will be.

        Raises:
            ContentError: the name leaves the folder; in a cache, also by a link.
        """
        return inside(self.local, name, self.local / INDEX, links=self.remote is None)

    def ensure(self, expected: ExpectedFile) -> Path:
        """Path of a file whose size and hash were checked just now; it stays in the cache.

        Raises:
            MissingError: the file is nowhere.
            ContentError: its content is not what the index recorded.
            StorageError: it cannot be read, or not be written here.
            ServiceError: it cannot be fetched.
        """
        self._obtain(expected, None, ".lock").close()
        return self.path(expected.name)

    def open(self, expected: ExpectedFile, known: Identity | None = None) -> BinaryIO:
        """A shard whose size and hash were checked, held in the cache until it is closed.

        Args:
            expected: what the index records.
            known: `identity` of the file when this process checked it; the same is not read again.

        Raises:
            MissingError, ContentError, StorageError, ServiceError: as `ensure`.
        """
        file = self._obtain(expected, known, SHARD_LOCK)
        if self.cache is not None:
            status = os.fstat(file.fileno())
            note_read(self.path(expected.name), status, time.time_ns())
        return file

    def open_packed(
        self,
        packed: ExpectedFile,
        expected: ExpectedFile,
        unpack: Callable[[bytes], bytes],
        known: Identity | None = None,
    ) -> BinaryIO:
        """The same for a shard that is stored compressed, as the file `packed`.

        Raises:
            MissingError, ContentError, StorageError, ServiceError: as `ensure`.
        """
        path = self.path(expected.name)
        if (file := self._sound(path, expected, known)) is not None:
            return file
        with self._waiting(path, SHARD_LOCK):
            if (file := self._sound(path, expected, known)) is not None:
                return file
            source = self.ensure(packed)
            try:
                content = unpack(_read(source))
            except MmtrainError:
                raise
            except Exception as error:  # every compression library raises its own kinds
                raise ContentError(f"{source} cannot be unpacked: {error}") from error
            if (fault := expected.fault(content)) is not None:
                raise ContentError(f"{source} unpacks to a damaged {expected.name}: {fault}")
            if self.cache is not None:
                self.cache.make_room(len(content), path)
            arriving = _arriving(path)
            try:
                arriving.write_bytes(content)
                file = self._arrive(arriving, path)
            except OSError as error:
                raise StorageError(f"{path} cannot be written: {error}; make room") from error
            finally:
                arriving.unlink(missing_ok=True)
            if self.remote is not None:
                source.unlink()
            return file

    def _obtain(self, expected: ExpectedFile, known: Identity | None, lock: str) -> BinaryIO:
        path = self.path(expected.name)
        if (file := self._sound(path, expected, known)) is not None:
            return file
        if self.remote is None:
            raise _refusal(path, expected)
        with self._waiting(path, lock):  # the workers of a host fetch a file once
            file = self._sound(path, expected, known)
            return self._fetch(expected, path, lock) if file is None else file

    def _sound(self, path: Path, expected: ExpectedFile, known: Identity | None) -> BinaryIO | None:
        """The file, open and checked; None when it is not there, or not what is expected."""
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - handed to the caller
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error}") from error
        if self.remote is not None and not hold(file.fileno()):
            file.close()  # removed between the two
            return None
        if known is not None and identity(file) == known:
            return file
        try:
            fault = expected.fault(file.read())
        except OSError as error:
            file.close()
            raise StorageError(f"{path} cannot be read: {error}") from error
        if fault is None:
            return file
        file.close()
        return None

    @contextmanager
    def _waiting(self, path: Path, suffix: str) -> Iterator[None]:
        """Hold the lock of a file; raises what the process raised that was waited for."""
        if self.remote is None:  # nothing is fetched; who unpacks, replaces the file as a whole
            yield
            return
        lock = path.with_name(f".{path.name}{suffix}")
        before = _said(lock)
        with locked(lock) as descriptor:
            said = _said(lock)
            try:
                if said and said != before:
                    raise _recalled(said)
                yield
            except _SHARED as error:
                _note(lock, error)
                raise
            os.ftruncate(descriptor, 0)

    def _fetch(self, expected: ExpectedFile, path: Path, lock: str) -> BinaryIO:
        assert self.remote is not None
        source = joined(self.remote, expected.name)
        begun = time.monotonic()
        for stale in path.parent.glob(f".{path.name}.*.arriving*"):  # of killed processes
            stale.unlink(missing_ok=True)
        if self.cache is not None and lock == SHARD_LOCK:
            self.cache.make_room(expected.size_bytes or 0, path)
        for attempt in range(1, self.attempts + 1):
            try:
                return self._download(source, expected, path)
            except LocalFault as fault:
                advice = "make room, or bound the cache with data.cache_bytes"
                raise StorageError(f"{path}: {fault.strerror}; {advice}") from fault
            except (OSError, ContentError) as fault:
                error = fault
                log.warning(
                    "download %s attempt %d of %d: %s", source, attempt, self.attempts, fault
                )
            if attempt < self.attempts:
                time.sleep(self.pause_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        if isinstance(error, ContentError):
            raise error
        kind = ServiceError if scheme_of(source) else StorageError
        raise kind(
            f"{source} failed {self.attempts} times in {time.monotonic() - begun:.0f} s: {error}; "
            "look after the service and the network, then start the run again"
        ) from error

    def _download(self, source: str, expected: ExpectedFile, path: Path) -> BinaryIO:
        arriving = _arriving(path)
        most = _MOST_BYTES if expected.size_bytes is None else expected.size_bytes
        try:
            download(source, arriving, most_bytes=most, stall_seconds=self.stall_seconds)
            fault = expected.fault(_read(arriving))
            if fault is not None:
                raise ContentError(f"{source} is damaged: {fault}")
            return self._arrive(arriving, path)
        finally:
            arriving.unlink(missing_ok=True)

    def _arrive(self, arriving: Path, path: Path) -> BinaryIO:
        """Give a checked file its name, held already."""
        file = open(arriving, "rb", buffering=0)  # noqa: SIM115 - handed to the caller
        if self.remote is not None:
            hold(file.fileno())
        os.replace(arriving, path)
        return file


def identity(file: BinaryIO) -> Identity:
    """Which file this is; another content has another identity."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _refusal(path: Path, expected: ExpectedFile) -> MmtrainError:
    """What is wrong with a local file that nobody can fetch again."""
    if not path.is_file():
        return MissingError(f"{path} is not there; restore it or write the dataset again")
    fault = expected.fault(_read(path))
    return ContentError(f"{path} is damaged: {fault}; restore it or write it again")


def _arriving(path: Path) -> Path:
    """A name of its own for every attempt: one that was given up may still write."""
    return path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.arriving")


def _said(lock: Path) -> bytes:
    """What the process that held a lock left in it: why it failed, or nothing."""
    return lock.read_bytes() if lock.exists() else b""


def _note(lock: Path, error: MmtrainError) -> None:
    kind = next(kind for kind in _SHARED if isinstance(error, kind))
    said = {"fault": kind.__name__, "message": str(error), "at": time.time_ns()}
    lock.write_text(json.dumps(said))


def _recalled(said: bytes) -> MmtrainError:
    try:
        fault = json.loads(said)
        kind = next(kind for kind in _SHARED if kind.__name__ == fault["fault"])
        return kind(str(fault["message"]))
    except (ValueError, KeyError, TypeError, StopIteration):
        return StorageError("another process failed to fetch a file, and its word was lost")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
