"""Records of a JSON file, one at a time: an array of any length, or one object a line (JSONL).

Files of instructions reach gigabytes, so an array is read as a stream: only the record in hand is
in memory. A broken line of JSONL is one broken record; an array that stops being JSON cannot be
read past that place and is refused as a whole, since a cut download looks just so.

Cost: that of json's own decoder, 170 MB/s.
"""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from mmtrain.errors import ContentError, MissingError

_CHUNK = 1 << 20  # characters read at a time
_GLANCE = 64  # characters looked at before; more would be lost with an archive that breaks off
_LONGEST = 1 << 26  # characters of one record; beyond, a quote or bracket is missing


@dataclass(frozen=True)
class Record:
    """One entry: `number` counts from 1; `fault` says why it is no JSON, or is empty."""

    number: int
    value: Any
    fault: str = ""


def read_records(path: Path, skip: int = 0) -> Iterator[Record]:
    """Entries of a JSON array or of a JSONL file, in order.

    Bytes that are no UTF-8 become lone surrogates, for the reader of a record to find.

    Args:
        path: `.gz` and `.zip` are unpacked; a zip holds one such file.
        skip: entries to pass over; lines are not even parsed.

    Raises:
        MissingError: the file is not there or cannot be read.
        ContentError: it is neither an array nor lines of JSON, or breaks off.
    """
    number = skip
    try:
        for record in _entries(path, skip):
            number = record.number
            yield record
    except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        yield Record(number + 1, None, f"the archive breaks off ({error}); fetch it again")
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror or error}") from error


def _entries(path: Path, skip: int) -> Iterator[Record]:
    with _opened(path) as file:
        start = _first_character(file)
    if start and start not in "[{":
        raise ContentError(
            f"{path} begins with {start!r}; wanted: a JSON array of records, or one JSON object a "
            "line"
        )
    with _opened(path) as file:
        if start == "[":
            yield from islice(_array(_Stream(file, path)), skip, None)
        elif start:
            yield from _lines(file, path, skip)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Its text, unpacked as it is read."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            yield file
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [info for info in archive.infolist() if not info.is_dir()]
            if len(names) != 1:
                raise ContentError(f"{path} holds {len(names)} files; wanted: one, of JSON")
            with archive.open(names[0]) as packed:
                yield io.TextIOWrapper(packed, encoding="utf-8-sig", errors="surrogateescape")
    else:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            yield file


def _first_character(file: TextIO) -> str:
    while text := file.read(_GLANCE):
        if text.strip():
            return text.strip()[0]
    return ""


def _lines(file: TextIO, path: Path, skip: int) -> Iterator[Record]:
    number = 0
    while line := file.readline(_LONGEST):
        if not line.strip():
            continue
        number += 1
        long = len(line) == _LONGEST and not line.endswith("\n")
        while long and (rest := file.readline(_LONGEST)) and not rest.endswith("\n"):
            pass
        if number <= skip:
            continue
        try:
            if long:
                raise ValueError(f"a line of more than {_LONGEST:,} characters")
            yield Record(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            if number == 1 and line.strip() == "{":
                raise ContentError(
                    f"{path} is one JSON object over several lines; wanted: an array of records, "
                    "or one object a line"
                ) from error
            yield Record(number, None, f"no JSON: {error}")


class _Stream:
    """Text of a file from some place on, as much of it as was needed."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._lines = 1  # of what is gone
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fill()

    def skip(self) -> None:
        """Pass the character that `peek` showed."""
        self._at += 1

    def value(self, number: int) -> Any:
        """The JSON value that begins here, record `number`."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                long = len(self._text) - self._at > _LONGEST
                if self._ended or long or isinstance(error, RecursionError):
                    text = getattr(error, "msg", str(error))  # its own line counts from here
                    raise self.fault(number, text) from error
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._at = end
                    return value
            self._fill()

    def fault(self, number: int, text: str) -> ContentError:
        """What to raise when this is no JSON array any more."""
        line = self._lines + self._text.count("\n", 0, self._at)
        return ContentError(
            f"{self._path} is no JSON array from record {number} on (line {line}): {text}. Was it "
            "cut short? Fetch it again, or give one object a line, where a broken one is skipped"
        )

    def _fill(self) -> None:
        """Read as much again as is there, so that a long record costs no square of its length."""
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :]
        self._at = 0
        more = self._file.read(max(_CHUNK, len(self._text)))
        self._ended = not more
        self._text += more


def _array(stream: _Stream) -> Iterator[Record]:
    stream.peek()
    stream.skip()  # [
    number = 0
    while (found := stream.peek()) != "]":
        if number:
            if found != ",":
                raise stream.fault(number + 1, f"found {found or 'the end'!r}, wanted: ',' or ']'")
            stream.skip()
            stream.peek()
        number += 1
        yield Record(number, stream.value(number))
    stream.skip()
    if rest := stream.peek():
        raise stream.fault(number + 1, f"found {rest!r} after the closing ']'")
