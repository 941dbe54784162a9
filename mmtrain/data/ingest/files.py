"""The files of a source: a file, a folder or a glob, always in the same order.

Cost of a fingerprint: two reads of 64 KiB. It sees files that were fetched again or cut short, not
a byte turned in the middle of a large one; the time of modification does for a half-done ingest.
"""

import glob
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import MissingError

_ENDS_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """One file: its path, and the name by which sample ids and manifest call it."""

    path: Path
    name: str


def find_files(source: Path, endings: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """The files of a source, sorted by their names.

    Args:
        source: a file (of any ending), a folder that is searched to its depth, or a glob.
        endings: of the files of a folder, as `.tar`.

    Raises:
        MissingError: there is none.
    """
    if source.is_file():
        return _named([source], source.parent, endings)
    if source.is_dir():
        found = [path for path in source.rglob("*") if _is_meant(path, source, endings)]
        home = source
    else:
        found = [Path(name) for name in glob.glob(str(source), recursive=True)]
        found = [path for path in found if path.is_file()]
        home = Path(os.path.commonpath([path.parent for path in found])) if found else source
    if not found:
        there = f"holds no {' or '.join(endings)}" if source.is_dir() else "is not there"
        raise MissingError(f"{source} {there}; name a file, a folder of them or a quoted glob")
    return _named(sorted(found, key=lambda path: path.as_posix()), home, endings)


def _is_meant(path: Path, home: Path, endings: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(home).parts)
    return not hidden and path.name.lower().endswith(endings) and path.is_file()


def _named(paths: list[Path], home: Path, endings: tuple[str, ...]) -> tuple[SourceFile, ...]:
    names = [_sound(path.relative_to(home).as_posix()) for path in paths]
    short = [_without(name, endings) for name in names]
    counts = Counter(short)
    return tuple(
        SourceFile(path, brief if counts[brief] == 1 else name)
        for path, name, brief in zip(paths, names, short, strict=True)
    )


def _without(name: str, endings: tuple[str, ...]) -> str:
    for ending in sorted(endings, key=len, reverse=True):
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name


def _sound(text: str) -> str:
    """Names of files may hold bytes that are no UTF-8; ids may not."""
    return text.encode("utf-8", "backslashreplace").decode()


def fingerprint(file: SourceFile) -> dict[str, Any]:
    """What a manifest keeps of a file: name, bytes and a digest of its size and both ends.

    Raises:
        MissingError: it cannot be read.
    """
    try:
        size, digest = _digest(file.path)
    except OSError as error:
        raise MissingError(f"{file.path} cannot be read: {error.strerror}") from error
    return {"name": file.name, "bytes": size, "digest": digest}


def _digest(path: Path) -> tuple[int, str]:
    if path.is_dir():
        names = sorted(entry.name for entry in os.scandir(path))
        listing = "\0".join(names).encode("utf-8", "surrogateescape")
        return len(names), hashlib.blake2b(listing, digest_size=16).hexdigest()
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        found = hashlib.blake2b(str(size).encode(), digest_size=16)
        found.update(stream.read(_ENDS_BYTES))
        stream.seek(max(size - _ENDS_BYTES, 0))
        found.update(stream.read(_ENDS_BYTES))
    return size, found.hexdigest()


def modified(file: SourceFile) -> int:
    """When the file was changed last, in nanoseconds."""
    return file.path.stat().st_mtime_ns
