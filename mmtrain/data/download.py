"""One file from a remote place to a local path, within bounds of time and size.

The clients are mosaicml-streaming's (0.13), which has none for http(s) and whose time limits are
those of each storage library: some wait for ever, or for as long as one byte comes now and then.
So every download runs in a thread of its own and is given up when its file has stopped growing.
"""

import errno
import http.client
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from urllib.parse import quote

from streaming.base.storage.download import CloudDownloader

from mmtrain.errors import MissingError

_CHUNK = 1 << 16
# less than this in `stall_seconds` is a stall: 4 KB/s, where a shard of 64 MiB would take hours
_LEAST_BYTES = 1 << 16
# clients that gather a file elsewhere and bring it whole, so its growth cannot be seen
_UNSEEN = ("hf", "alipan", "dbfs-uc")
_UNSEEN_SECONDS = 600.0
_GONE = {"403", "404", "NoSuchKey", "NoSuchBucket", "AccessDenied"}  # codes of botocore
_GONE_KINDS = {  # class names of the other libraries, which may not be installed
    "NotFound",
    "Forbidden",
    "ResourceNotFoundError",
    "EntryNotFoundError",
    "RepositoryNotFoundError",
    "NoCredentialsError",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class LocalFault(OSError):
    """The local side failed: the disk is full or cannot be written."""


def download(source: str, target: Path, *, most_bytes: int, stall_seconds: float) -> None:
    """Fetch `source` as the file `target`, which must not exist.

    Args:
        source: s3://, gs://, http(s)://, ..., or a path.
        target: where to; other files that begin with its name may appear beside it meanwhile.
        most_bytes: more than so many are refused (of http; others have their size checked after).
        stall_seconds: how long the file may go without growing.

    Raises:
        MissingError: it is not there, may not be read, or nothing here can fetch it.
        LocalFault: it cannot be written here.
        OSError: anything else; worth another attempt.
    """
    scheme = scheme_of(source)
    client = _client(source, scheme, most_bytes)
    seconds = _UNSEEN_SECONDS if scheme in _UNSEEN else stall_seconds

    def work() -> None:
        try:
            client.download(source, str(target), seconds)
        finally:
            client.clean_up()

    try:
        _watched(work, target, seconds)
    except MissingError:
        raise
    except Exception as error:  # every storage library raises its own kinds
        raise _translated(source, error) from error


def scheme_of(place: str) -> str:
    """The scheme of an address; empty for a path."""
    return place.partition("://")[0] if "://" in place else ""


def joined(remote: str, name: str) -> str:
    """The address of a file in a remote folder."""
    is_http = scheme_of(remote) in ("http", "https")
    return f"{remote.rstrip('/')}/{quote(name) if is_http else name}"


class HttpDownloader(CloudDownloader):  # type: ignore[misc]
    """Plain GET; what a server says about the length is held against what comes."""

    def __init__(self, most_bytes: int) -> None:
        """Refuse bodies of more than `most_bytes`."""
        super().__init__()
        self._most_bytes = most_bytes
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPRedirectHandler,
            urllib.request.HTTPErrorProcessor,
            urllib.request.HTTPHandler,
            urllib.request.HTTPSHandler,
        ):  # no file:// and ftp://, where a redirect might lead
            self._opener.add_handler(handler())

    @staticmethod
    def _client_identifier() -> str:
        return "http"

    def clean_up(self) -> None:
        """Nothing is kept between downloads."""

    def _validate_remote_path(self, remote: str) -> None:
        assert scheme_of(remote) in ("http", "https"), remote

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        request = urllib.request.Request(remote, headers={"Accept-Encoding": "identity"})
        with self._opener.open(request, timeout=timeout) as response, open(local, "wb") as file:
            announced, arrived = response.headers.get("Content-Length"), 0
            while chunk := response.read(_CHUNK):
                arrived += len(chunk)
                if arrived > self._most_bytes:
                    raise OSError(f"the server sends more than {self._most_bytes} bytes")
                file.write(chunk)
            if announced is not None and announced != str(arrived):
                raise OSError(f"ended after {arrived} of {announced} bytes")


def _client(source: str, scheme: str, most_bytes: int) -> CloudDownloader:
    if scheme in ("http", "https"):
        return HttpDownloader(most_bytes)
    try:
        return CloudDownloader.get(source if scheme else None)
    except ValueError as error:
        raise MissingError(
            f"{source}: nothing here fetches {scheme}://; use s3://, gs://, https://, oci://, "
            "azure://, hf://, sftp:// or a folder"
        ) from error


def _watched(work: Callable[[], None], target: Path, stall_seconds: float) -> None:
    """Run `work` in a thread; TimeoutError when `target` stops growing.

    The thread cannot be ended: it is left behind, as a daemon that holds up no exit, and what it
    writes later has a name that nobody else uses.
    """
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller below
            done.put(error)
        else:
            done.put(None)

    threading.Thread(target=run, name="download", daemon=True).start()
    arrived, since = 0, monotonic()
    while True:
        try:
            error = done.get(timeout=min(0.5, stall_seconds))
        except queue.Empty:
            now, size = monotonic(), _size(target)
            if size >= arrived + _LEAST_BYTES:
                arrived, since = size, now
            elif now - since >= stall_seconds:
                raise TimeoutError(
                    f"stalled: {max(size - arrived, 0)} bytes in {stall_seconds:g} s"
                ) from None
            continue
        if error is not None:
            raise error
        return


def _size(target: Path) -> int:
    """Bytes of `target` and of what a client writes beside it."""
    total = 0
    with os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(target.name):
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:  # renamed just now
                    continue
    return total


def _translated(source: str, error: Exception) -> Exception:
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
    if isinstance(error, urllib.error.HTTPError):
        code = {401: "403", 403: "403", 404: "404", 410: "404"}.get(error.code, "")
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        code = "404"
    if code in _GONE or type(error).__name__ in _GONE_KINDS:
        return MissingError(f"{source} is not there, or may not be read: {error}")
    if isinstance(error, OSError) and error.errno in _FULL:
        return LocalFault(error.errno, f"cannot be written here: {error.strerror}")
    if isinstance(error, http.client.HTTPException) or not isinstance(error, OSError):
        return OSError(f"{type(error).__name__}: {error}")
    return error
