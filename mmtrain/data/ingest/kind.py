"""What every kind of source must say: its files, their records in order, a record as a document.

Records are numbered from 1 in their file. `records` runs in the main process and only cuts files
into records; what costs time (pictures, clips) belongs into `document`, which workers run.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mmtrain.data.document import MAX_TEXT, Part
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile, find_files
from mmtrain.data.ingest.media import Media
from mmtrain.data.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How a source is read.

    Attributes:
        images: folder that names of pictures and clips are relative to, or tars with them.
        image: column or key of the picture; found out if None.
        text: column or key of the text; found out if None.
        clip_threshold: least similarity of a picture and its sentence.
        frames: kept of a clip.
        format: of conversations, a key of `chat_formats.FORMATS`; found out if None.
        system: message of conversations, as `chat.template_of` takes it.
        max_side: pixels; larger pictures are made smaller, aspect kept.
        reencode: `jpeg`, `png` or `webp`: every picture is stored so.
        shard_bytes: of a shard.
    """

    images: Path | None = None
    image: str | None = None
    text: str | None = None
    clip_threshold: float = 0.32
    frames: int = 8
    format: str | None = None
    system: str = "auto"
    max_side: int | None = None
    reencode: str | None = None
    shard_bytes: int = 1 << 26


@dataclass(frozen=True)
class Raw:
    """A record as it was cut out of its file.

    Attributes:
        number: in its file, from 1.
        content: whatever the kind's `document` reads.
        name: the record's own, for messages.
        fault: why it cannot be read at all.
    """

    number: int
    content: Any
    name: str = ""
    fault: Dropped | None = None


@dataclass(frozen=True)
class Made:
    """What a record became.

    Attributes:
        kind: of the document.
        parts: in reading order.
        meta: any JSON object.
        noted: what was counted on the way, by a word for the report.
    """

    kind: str
    parts: Sequence[Part]
    meta: Mapping[str, Any] = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)


class Kind(ABC):
    """A kind of source, opened."""

    name: ClassVar[str]
    advice: ClassVar[str] = "Is it of this kind?"  # where not one record is sound
    endings: ClassVar[tuple[str, ...]] = ()  # of its files
    options: ClassVar[tuple[str, ...]] = ()  # that change its documents, besides those of all

    def __init__(self, source: Path, options: IngestOptions) -> None:
        """Find out what is needed of `source`; raises what `files` raises."""
        self.source = source
        self.given = options
        self.media = Media(options.images, options.max_side, options.reencode)

    @property
    def label(self) -> str:
        """What the source is read as, for messages; final after `prepare`."""
        return self.name

    def files(self) -> tuple[SourceFile, ...]:
        """The files of the source in the order in which they are read.

        Raises:
            MissingError: there are none.
        """
        return find_files(self.source, self.endings)

    def prepare(  # noqa: B027 (most kinds need not)
        self, files: Sequence[SourceFile], vocabulary: Vocabulary | None
    ) -> None:
        """Look at the files, once, before there are workers.

        Raises:
            MissingError: a library is not there.
            ContentError: they are of another kind, or the tokenizer cannot write them.
        """

    @abstractmethod
    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Records of a file after the first `skip`.

        Raises:
            ContentError: the file is not of this kind at all.
            MissingError: it cannot be read.
        """

    @abstractmethod
    def document(self, file: SourceFile, raw: Raw) -> Made:
        """A record as a document; raises Dropped."""


def text_of(value: Any, what: str) -> str:
    """A text that can be trained on, without blanks at its ends; raises Dropped."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Dropped(Reason.text, f"{what} is no UTF-8 from byte {error.start} on") from error
    if not isinstance(value, str):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise Dropped(Reason.fields, f"{what} is {found}; wanted: text")
    if len(value) > MAX_TEXT:
        raise Dropped(Reason.large, f"{what} has {len(value):,} characters, {MAX_TEXT:,} go")
    if "\0" in value:
        raise Dropped(Reason.text, f"{what} holds a NUL, character {value.index(chr(0)) + 1}")
    check_unicode(value, what)
    if not value.strip():
        raise Dropped(Reason.no_text, f"{what} is empty")
    return value.strip()


def check_unicode(text: str, what: str) -> None:
    """Raise Dropped when a text holds half of a surrogate pair, as broken JSON makes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Dropped(
            Reason.text, f"character {error.start + 1} of {what} is half a character"
        ) from error


def table_of(value: Any, wanted: str) -> Mapping[str, Any]:
    """A JSON object; raises Dropped."""
    if not isinstance(value, Mapping):
        raise Dropped(Reason.fields, f"found a {type(value).__name__}; wanted: a table of {wanted}")
    return value
