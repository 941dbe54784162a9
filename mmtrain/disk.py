"""What lies on a disk that others use too: flushed before it is relied on, locked while written."""

import fcntl
import logging
import os
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Have a file or a folder on disk before going on; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(handle: IO[Any], advice: str) -> bool:
    """Take the lock of a file that is open for writing; the kernel frees it with the process.

    Args:
        handle: holds the lock until it is closed.
        advice: what to do where the file system has no locks, for the log.

    Returns:
        False when another process has it.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s); %s", handle.name, error, advice)
    return True
