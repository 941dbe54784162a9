"""A bound on what the caches of remote datasets hold: the least recently read shards go.

A shard is in use while a process holds it open with a shared lock (`fetch.Folder.open`); only one
that can be locked exclusively is removed, so any number of processes may share a cache. Files
that are on their way come on top of the bound.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmtrain.errors import StorageError

log = logging.getLogger(__name__)

SHARD_LOCK = ".shard-lock"  # ends the name of the lock file beside every shard in a cache
_TOUCH_NS = 10_000_000_000  # a read is noted at most once in 10 s


@dataclass(frozen=True)
class ShardCache:
    """The caches of all sources of a run.

    Attributes:
        folders: one for every remote dataset.
        limit_bytes: of the shards of all of them.
    """

    folders: tuple[Path, ...]
    limit_bytes: int

    def make_room(self, needed_bytes: int, coming: Path) -> None:
        """Remove shards until `needed_bytes` more fit, or until all that are left are in use."""
        with locked(coming.parent / ".cache.lock"):
            found = sorted(self._shards(coming), key=lambda item: item[1])
            excess = sum(size for _, _, size in found) + needed_bytes - self.limit_bytes
            for path, _, size in found:
                if excess <= 0:
                    return
                if remove_unused(path):
                    excess -= size
                    log.debug("cache: %s was removed", path)
            if excess > 0:
                log.warning(
                    "cache: shards in use leave no room: %d bytes more than data.cache_bytes "
                    "= %d; raise it",
                    excess,
                    self.limit_bytes,
                )

    def _shards(self, coming: Path) -> Iterator[tuple[Path, int, int]]:
        """Path, time of the last read and size of every shard that was fetched."""
        for folder in self.folders:
            for lock in folder.rglob(f".*{SHARD_LOCK}"):
                path = lock.with_name(lock.name[1 : -len(SHARD_LOCK)])
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path != coming:
                    yield path, status.st_atime_ns, status.st_size


def remove_unused(path: Path) -> bool:
    """Remove a file unless a process has it open with `hold`; whether it was removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)
    return True


def hold(descriptor: int) -> bool:
    """Keep an open file from being removed until it is closed; False when it was removed before."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return os.fstat(descriptor).st_nlink > 0


def note_read(path: Path, status: os.stat_result, now_ns: int) -> None:
    """Say that a shard was read; file systems are mounted to say so once a day, or never."""
    if now_ns - status.st_atime_ns > _TOUCH_NS:
        try:
            os.utime(path, ns=(now_ns, status.st_mtime_ns))
        except OSError:  # removed, or of another user: it keeps its place in the order
            return


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold an exclusive lock on a file, made if need be; the kernel drops it with the process.

    Yields:
        its descriptor.

    Raises:
        StorageError: the file or its folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not through a link: in a cache that others write it could name any file
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}; mend the cache") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
