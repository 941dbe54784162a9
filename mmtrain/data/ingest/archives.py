"""Tars of samples, as WebDataset writes them: read as a stream, nothing is unpacked to disk.

Members of a sample follow each other and share their name up to its first dot; what comes behind
it says what a member holds. Links and devices are passed over.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.kind import Raw
from mmtrain.data.ingest.media import MAX_BYTES

_SAMPLE_BYTES = 1 << 30  # of all members of a sample


def samples(path: Path, is_read: Callable[[str], bool], skip: int) -> Iterator[Raw]:
    """Samples of a tar after the first `skip`, whose contents are not read.

    Args:
        path: of the tar; may be compressed.
        is_read: whether members of an ending (`jpg`, `0.txt`) belong to a sample.
        skip: samples to pass over.
    """
    number, key = 0, ""
    fields: dict[str, bytes | Dropped] = {}
    held = 0
    fault: Dropped | None = None
    try:
        with tarfile.open(path, "r:*") as tar:
            for info in _members(tar):
                own, ending = _key_of(info.name)
                if not info.isfile() or not is_read(ending):
                    continue
                if own != key or not number:
                    if number > skip:
                        yield Raw(number, fields, key)
                    number, key, fields, held = number + 1, own, {}, 0
                if number > skip:
                    held += info.size
                    fields[ending] = _content(tar, info, held)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        where = f"behind {key}" if number else "at its begin"
        fault = Dropped(Reason.cut, f"the tar breaks off {where} ({error}); fetch it again")
        number = max(number, 1)
    if number > skip:
        yield Raw(number, fields, key, fault)


def whole(fields: Mapping[str, bytes | Dropped]) -> dict[str, bytes]:
    """Contents by ending; raises Dropped where one was left out."""
    found: dict[str, bytes] = {}
    for ending, content in fields.items():
        if isinstance(content, Dropped):
            raise content
        found[ending] = content
    return found


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members up to the mark of the end; tarfile itself takes a damaged header for that mark."""
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        yield info
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _key_of(name: str) -> tuple[str, str]:
    """What a sample is called, and what the member holds of it."""
    pure = PurePosixPath(name)
    base, _, ending = pure.name.partition(".")
    key = str(pure.with_name(base)) if base else name
    return key.encode("utf-8", "backslashreplace").decode(), ending.lower()


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, held: int) -> bytes | Dropped:
    if info.size > MAX_BYTES or held > _SAMPLE_BYTES or info.issparse():
        return Dropped(Reason.large, f"{info.name[:80]} has {info.size:,} bytes")
    stream = tar.extractfile(info)
    content = b"" if stream is None else stream.read()
    if len(content) != info.size:
        raise EOFError("a member is cut")
    return content
