"""Folders that are there whole or not at all: written under another name, flushed, renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtrain.disk import sync
from mmtrain.errors import ContentError, StorageError


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name when the block ends well, and goes otherwise.

    Raises:
        ContentError: `path` exists.
        StorageError: the folder cannot be made, flushed or renamed.
    """
    refuse_existing(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        with storage_errors(path):
            publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn OSError into StorageError about `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def refuse_existing(path: Path) -> None:
    """Raise ContentError when `path` is there."""
    if path.exists():
        raise ContentError(f"{path} exists and is never overwritten; remove it or name another")


def publish(partial: Path, path: Path) -> None:
    """Flush every file of `partial` to disk, then rename it; raises ContentError, OSError."""
    for file in sorted(partial.rglob("*")):
        sync(file)
    # mkdtemp makes folders that only their owner reads; this one is as open as the user's others
    partial.chmod(0o775 & ~_umask())
    sync(partial)
    refuse_existing(path)
    os.rename(partial, path)
    sync(path.parent)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    found = os.umask(0o077)
    os.umask(found)
    return found
