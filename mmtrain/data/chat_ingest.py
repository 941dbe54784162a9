"""From a JSON of conversations to shards: `mmtrain data chat`.

Every record becomes a document of kind `chat`, or is left out and counted by its reason; the first
ones are shown, a line each. Too many, and nothing is written: wrong folders and wrong formats break
every record, and a data set that lost a third in silence is worse than none.

Cost: pictures are read, decoded once to see that they can be, and stored as they are.
"""

import base64
import binascii
import io
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mmtrain.data import images
from mmtrain.data.chat import Content, Template, Turn, chat_document, template_of
from mmtrain.data.chat_formats import (
    FORMATS,
    Broken,
    Conversation,
    Format,
    Reason,
    Reference,
    Said,
    detect,
)
from mmtrain.data.chat_records import Record, read_records
from mmtrain.data.document import Document, Modality, Part, text_fault
from mmtrain.data.rules import spaced
from mmtrain.data.shards import build_index, refuse_existing, write_shards
from mmtrain.data.video import read_frames
from mmtrain.data.vocabulary import ASSISTANT, USER, load_vocabulary
from mmtrain.errors import ContentError

log = logging.getLogger(__name__)

FRAMES = 8  # of a clip
_SHOWN = 20  # faults shown a line each; the others are counted
_HOPELESS = 1000  # broken records without a sound one before a run gives up
_LOOKED_AT = 100  # records that decide about the format
_CLIPS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
_CONVERTED = ("GIF", "BMP")  # to PNG; documents hold `images.FORMATS`
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a JSON is read.

    Attributes:
        format: a key of `FORMATS`, or None to find out.
        media: folder that names of pictures and clips are relative to; None = that of the JSON.
        system: as `chat.template_of` takes it; a record's own system message goes before it.
        tokenizer: folder; the lengths are counted with it when given.
        max_failures: share of broken records beyond which nothing is written.
    """

    format: str | None = None
    media: Path | None = None
    system: str = "auto"
    tokenizer: Path | None = None
    max_failures: float = 0.05


@dataclass
class ChatReport:
    """What was read and written."""

    format: str
    records: int = 0
    conversations: int = 0
    turns: int = 0
    images: int = 0
    broken: Counter[Reason] = field(default_factory=Counter)
    cut: int = 0  # conversations whose last question had no answer and was left out

    def described(self, out: Path) -> str:
        """What to tell the user."""
        lines = [
            f"{self.conversations:8,} conversations of {self.turns:,} turns with {self.images:,} "
            f"images, read as {self.format}: {out}"
        ]
        if self.broken:
            lines.append(f"{self.broken.total():8,} records left out: {self.reasons}")
        if self.cut:
            lines.append(f"{self.cut:8,} last questions without an answer cut")
        return "\n".join(lines)

    @property
    def reasons(self) -> str:
        """Broken records by reason, the most frequent first."""
        return ", ".join(f"{count} {reason.value}" for reason, count in self.broken.most_common())


def write_chat(source: Path, out: Path, options: ChatOptions) -> ChatReport:
    """Write the conversations of a JSON file as shards.

    Args:
        source: a JSON array, or one object a line.
        out: folder to make; must not exist.
        options: how it is read.

    Raises:
        MissingError: the file, the tokenizer or a library is not there.
        ContentError: it is no JSON, of no known format, or too much of it is broken; `out` exists.
        StorageError: writing failed.
    """
    refuse_existing(out)
    vocabulary = None
    if options.tokenizer is not None:
        vocabulary = load_vocabulary(options.tokenizer)
        vocabulary.require([USER, ASSISTANT])
    name = options.format or _detected(source)
    report = ChatReport(name)
    reader = _Reader(FORMATS[name], name, source, options)
    with write_shards(out) as writer:
        for record in read_records(source):
            report.records += 1
            try:
                document = reader.document(record, report)
            except Broken as broken:
                report.broken[broken.reason] += 1
                _tell(source, record, broken, report)
                continue
            writer.write(document)
        _judge(source, report, options.max_failures)
    if vocabulary is not None:
        build_index(out, vocabulary)
    return report


def _detected(source: Path) -> str:
    looked_at = [record.value for record in islice(read_records(source), _LOOKED_AT)]
    if not looked_at:
        raise ContentError(f"{source} holds no record")
    return detect(looked_at, str(source))


def _tell(source: Path, record: Record, broken: Broken, report: ChatReport) -> None:
    count = report.broken.total()
    if count <= _SHOWN:
        name = record.value.get("id") if isinstance(record.value, dict) else None
        own = f" (id {name})" if isinstance(name, str | int) else ""
        text = f"{source} record {record.number}{own} left out: {broken}"
        log.warning("%s", text.encode("utf-8", "backslashreplace").decode())
    if count == _SHOWN:
        log.warning("further broken records are counted, not shown")
    if count == report.records == _HOPELESS:
        raise _none_is_sound(source, report)


def _judge(source: Path, report: ChatReport, max_failures: float) -> None:
    if not report.records:
        raise ContentError(f"{source} holds no record")
    if not report.conversations:
        raise _none_is_sound(source, report)
    broken = report.broken.total()
    if broken > max_failures * report.records:
        raise ContentError(
            f"{source}: {broken} of {report.records} records are broken as {report.format} "
            f"({report.reasons}), allowed is a share of {max_failures}; nothing was written. "
            "Repair them, or raise --max-failures"
        )


def _none_is_sound(source: Path, report: ChatReport) -> ContentError:
    return ContentError(
        f"{source}: all of the {report.records} records read are broken as {report.format} "
        f"({report.reasons}); nothing was written. Is --format right, and --images the folder "
        "that names are relative to?"
    )


@dataclass
class _Reader:
    """Records of one file to documents."""

    form: Format
    name: str
    source: Path
    options: ChatOptions

    def __post_init__(self) -> None:
        self._folder = self.options.media or self.source.parent
        fixed = self.options.system != "auto"
        self._template = template_of(self.options.system, ()) if fixed else None
        self._last: tuple[Reference | None, Part | None] = (None, None)

    def document(self, record: Record, report: ChatReport) -> Document:
        """A record as a document, counted in `report`; raises Broken."""
        if record.fault:
            raise Broken(Reason.syntax, record.fault)
        if not isinstance(record.value, dict):
            raise Broken(Reason.fields, f"wanted: a table of {self.form.keys}")
        conversation = self.form.read(record.value)
        _check_text(conversation)
        turns = [Turn(self._contents(q), self._contents(a)) for q, a in conversation.turns]
        template = self._template or template_of(self.options.system, turns)
        if conversation.system:
            template = Template(Part(modality=Modality.text, text=conversation.system))
        document = chat_document(
            f"{_sound(self.source.stem)}-{record.number:08d}",
            turns,
            template,
            {"format": self.name, "record": record.number, "turns": len(turns)},
        )
        report.conversations += 1
        report.turns += len(turns)
        report.images += sum(len(part.media) for part in document.parts)
        report.cut += conversation.cut
        return document

    def _contents(self, said: Said) -> tuple[Content, ...]:
        return tuple(part if isinstance(part, str) else self._part(part) for part in said)

    def _part(self, reference: Reference) -> Part:
        """The picture or clip; several records in a row often ask about the same one."""
        known, part = self._last
        if part is None or known != reference:
            load = _clip if reference.modality is Modality.video else _picture
            part = Part(modality=reference.modality, media=load(self._folder, reference.name))
            self._last = (reference, part)
        return part


def _check_text(conversation: Conversation) -> None:
    said = [part for turn in conversation.turns for half in turn for part in half]
    for part in (conversation.system, *said):
        text = part if isinstance(part, str) else part.name
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Broken(
                Reason.text, f"character {error.start + 1} of {text[:40]!r} is half a character"
            ) from error
        if isinstance(part, str) and (fault := text_fault(text)):
            raise Broken(Reason.text, f"{text[:40]!r}: {fault}")


def _sound(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


# --- pictures and clips --------------------------------------------------------------------


def _picture(folder: Path, name: str) -> tuple[bytes, ...]:
    """The bytes of a picture as they are, or as PNG when documents do not hold its format."""
    blob = _embedded(name) if name.startswith("data:") else _bytes(_path(folder, name), name)
    try:
        images.check(blob)
    except images.DecodeError as error:
        return (_as_png(blob, name, error),)
    return (blob,)


def _as_png(blob: bytes, name: str, error: Exception) -> bytes:
    """GIF (its first frame) and BMP; what is damaged stays so."""
    try:
        with images.opened(io.BytesIO(blob), _CONVERTED) as picture:
            return images.encode_png(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, images.DecodeError):
        pass  # told below, with the first reason
    raise Broken(Reason.undecodable, f"{name[:80]} cannot be decoded ({error})") from error


def _embedded(name: str) -> bytes:
    head, _, body = name.partition(",")
    try:
        return base64.b64decode(body if head.endswith(";base64") else "!", validate=True)
    except (binascii.Error, ValueError) as error:
        raise Broken(Reason.undecodable, f"{name[:40]}... is no base64") from error


def _path(folder: Path, name: str) -> Path:
    if re.match(r"[a-z]+://", name) and not name.startswith("file://"):
        raise Broken(
            Reason.missing, f"{name[:80]} is an address, and nothing is fetched: name a file"
        )
    return folder / name.removeprefix("file://")


def _bytes(path: Path, name: str) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is a device or a pipe, which may have no end")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        what = (
            "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        )
        raise Broken(Reason.missing, f"{name[:80]} {what} ({path.parent.resolve()})") from error


def _clip(folder: Path, name: str) -> tuple[bytes, ...]:
    """8 frames, evenly spaced, of a video file or of a folder of pictures."""
    path = _found(_path(folder, name), name)
    if path.is_dir():
        return _frames_of(path, name)
    try:
        return tuple(read_frames(path, FRAMES))
    except ContentError as error:
        raise Broken(Reason.undecodable, str(error)) from error


def _found(path: Path, name: str) -> Path:
    """The clip as named, or, as data sets name clips by an id, with one of the usual endings."""
    try:
        candidates = [path, *(path.with_name(path.name + ending) for ending in _CLIPS)]
        return next(candidate for candidate in candidates if candidate.exists())
    except (StopIteration, OSError, ValueError) as error:
        raise Broken(
            Reason.missing, f"{name[:80]} is not there ({path.parent.resolve()})"
        ) from error


def _frames_of(path: Path, name: str) -> tuple[bytes, ...]:
    files = [file for file in path.iterdir() if file.suffix.lower() in _PICTURES]
    files.sort(
        key=lambda file: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", file.name)]
    )
    if not files:
        raise Broken(Reason.missing, f"{name[:80]} is a folder without pictures ({path})")
    chosen = [files[index] for index in spaced(len(files), FRAMES)]
    return tuple(blob for file in chosen for blob in _picture(path, file.name))
