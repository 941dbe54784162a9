"""The stored document: text, images and video in one order, and its lengths.

`Document` is what a shard holds: parts in reading order, media still encoded. Stored as one MDS
row: `id`, `kind`, `parts` (JSON list), `media` (all encoded images end to end), `meta` (JSON
object). `DocumentLengths` is what planning knows of it. Standard library alone, so that a recipe
can be checked without loading an engine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mmtrain.errors import ContentError

# MDS columns of a document; `media` is apart so that text can be read without parsing images
COLUMNS = {"id": "str", "kind": "str", "parts": "str", "media": "bytes", "meta": "str"}
CHAT = "chat"  # the kind of conversations: the loss counts answers alone
# characters of one text; the longest novels have 3 million. A sequence takes thousands of them,
# and more than this is a dump whose tokenising holds up a worker
MAX_TEXT = 1 << 22
TOO_LONG = f"text of more than {MAX_TEXT:,} characters"
NO_DOCUMENT = "row is no document"


class SampleError(ContentError):
    """One document that cannot be used, where the others can.

    Attributes:
        reason: the same for all samples with this fault: what failures are counted by.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        """Keep the reason; the message itself if there is none."""
        super().__init__(message)
        self.reason = reason or message


class Modality(Enum):
    """What a part or a span holds."""

    text = "text"
    image = "image"
    video = "video"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One piece of a document.

    Attributes:
        modality: text, image or video.
        text: the text of a text part.
        media: encoded images (PNG, JPEG, WebP): one of an image part, the frames of a video part.
        match: index of the text part that an image illustrates (MMC4), or None.
        time: seconds on the document's time line (storyboards), or None.
        answer: belongs to an answer of a conversation: what is learnt of it.
        markup: special tokens inside its text are honoured (`[USER]`, `</s>`, ...); everywhere
            else text that looks like one stays text.
    """

    modality: Modality
    text: str = ""
    media: tuple[bytes, ...] = ()
    match: int | None = None
    time: float | None = None
    answer: bool = False
    markup: bool = False


@dataclass(frozen=True, kw_only=True)
class Document:
    """A stored document: `sample_id` is unique in its source, `meta` is any JSON object."""

    sample_id: str
    kind: str
    parts: tuple[Part, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What is wrong with the parts; empty for a good document."""
        found = [] if self.sample_id else ["sample_id is empty"]
        if fault := text_fault(self.sample_id):
            found.append(f"sample_id: {fault}")
        for index, part in enumerate(self.parts):
            place = f"part {index} ({part.modality.value})"
            if part.modality is Modality.text:
                if part.media:
                    found.append(f"{place} holds {len(part.media)} images; text holds none")
                if fault := text_fault(part.text):
                    found.append(f"{place}: {fault}")
            elif part.text:
                found.append(f"{place} holds text; put it in a text part")
            elif part.modality is Modality.image and len(part.media) != 1:
                found.append(f"{place} holds {len(part.media)} images; an image part holds one")
            elif not part.media or not all(part.media):
                found.append(f"{place} holds an empty image or no frame")
            if part.markup and part.modality is not Modality.text:
                found.append(f"{place} is markup; only text can be")
            if part.match is not None and not self._is_text(part.match):
                found.append(f"{place} matches part {part.match}, which is no text part")
        return found

    def _is_text(self, index: int) -> bool:
        return 0 <= index < len(self.parts) and self.parts[index].modality is Modality.text


@dataclass(frozen=True)
class PartLength:
    """Length of one part.

    Attributes:
        modality: text, image or video.
        size: tokens of a text part, images of a picture (1) or clip.
        match: index of the text part an image illustrates, or None.
        time: seconds on the time line, or None.
        answer: belongs to an answer of a conversation.
        markup: its text holds special tokens.
    """

    modality: Modality
    size: int
    match: int | None = None
    time: float | None = None
    answer: bool = False
    markup: bool = False


@dataclass(frozen=True)
class DocumentLengths:
    """Lengths of one document."""

    sample_id: str
    kind: str
    parts: tuple[PartLength, ...]


def is_edit(document: Document) -> bool:
    """Whether a document is a picture, words and another picture."""
    form = tuple(part.modality for part in document.parts)
    return form == (Modality.image, Modality.text, Modality.image)


def text_fault(text: str) -> str | None:
    """Why no model should read a text, or None."""
    if "\0" in text:
        return "text holds NUL"
    if len(text) > MAX_TEXT:
        return TOO_LONG
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as broken JSON escapes make them
            return "text is no Unicode"
    return None


def to_row(document: Document) -> dict[str, Any]:
    """The MDS row of a document.

    Raises:
        SampleError: the document is malformed (`Document.problems`).
    """
    problems = document.problems()
    if problems:
        message = f"document {document.sample_id!r}: " + "; ".join(problems)
        raise SampleError(message, _reason(document))
    return {
        "id": document.sample_id,
        "kind": document.kind,
        "parts": json.dumps([_part_to_json(part) for part in document.parts], ensure_ascii=False),
        "media": b"".join(blob for part in document.parts for blob in part.media),
        "meta": json.dumps(document.meta, ensure_ascii=False, sort_keys=True),
    }


def from_row(row: Mapping[str, Any]) -> Document:
    """Undo `to_row`.

    Raises:
        SampleError: a column is missing, the JSON is broken, the sizes do not add up, or the
            document is malformed (`Document.problems`).
    """
    name = row.get("id", "without id")
    try:
        document = _from_row(row)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SampleError(
            f"document {name!r}: the row is not a document ({type(error).__name__}: {error}); "
            f"found columns {sorted(row)}, expected {sorted(COLUMNS)}",
            NO_DOCUMENT,
        ) from error
    if problems := document.problems():
        message = f"document {name!r}: the row is not a document ({'; '.join(problems)})"
        raise SampleError(message, _reason(document))
    return document


def _reason(document: Document) -> str:
    texts = (part.text for part in document.parts)
    return next(filter(None, map(text_fault, texts)), NO_DOCUMENT)


def _from_row(row: Mapping[str, Any]) -> Document:
    entries, meta, media = json.loads(row["parts"]), json.loads(row["meta"]), row["media"]
    if not isinstance(entries, list) or not isinstance(meta, dict):
        raise TypeError("`parts` must be a list and `meta` an object")
    parts, offset = [], 0
    for entry in entries:
        if not isinstance(entry, dict):
            raise TypeError(f"a part is {type(entry).__name__}, no object")
        blobs = []
        for size in _checked(entry, "sizes", list, ()):
            blobs.append(media[offset : offset + size])
            if len(blobs[-1]) != size:
                raise ValueError(f"an image of {size} bytes, {len(media) - offset} are left")
            offset += size
        part = Part(
            modality=Modality(entry["modality"]),
            text=_checked(entry, "text", str, ""),
            media=tuple(blobs),
            match=_checked(entry, "match", int, None),
            time=_checked(entry, "time", (int, float), None),
            answer=bool(entry.get("answer", False)),
            markup=bool(entry.get("markup", False)),
        )
        parts.append(part)
    if offset != len(media):
        raise ValueError(f"parts name {offset} bytes of media, the row holds {len(media)}")
    return Document(sample_id=row["id"], kind=row["kind"], parts=tuple(parts), meta=meta)


def _checked(entry: dict[str, Any], key: str, kinds: type | tuple[type, ...], default: Any) -> Any:
    found = entry.get(key)
    if found is None:
        return default
    if not isinstance(found, kinds):
        raise TypeError(f"`{key}` of a part is {type(found).__name__}")
    return found


def _part_to_json(part: Part) -> dict[str, Any]:
    entry: dict[str, Any] = {"modality": part.modality.value}
    if part.modality is Modality.text:
        entry["text"] = part.text
    else:
        entry["sizes"] = [len(blob) for blob in part.media]
    if part.match is not None:
        entry["match"] = part.match
    if part.time is not None:
        entry["time"] = part.time
    return entry | {name: True for name in ("answer", "markup") if getattr(part, name)}
