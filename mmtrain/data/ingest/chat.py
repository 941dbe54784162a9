"""Conversations, in the JSON that people have: LLaVA, ShareGPT, Alpaca, VideoChat and others.

An array, or one object a line. What a record says is read by `chat_formats`, how it is laid out as
a document by `data.chat`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mmtrain.data.chat import Content, Template, Turn, render, template_of
from mmtrain.data.document import CHAT, Modality, Part, text_fault
from mmtrain.data.ingest.chat_formats import FORMATS, Conversation, Reference, Said, detect
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile
from mmtrain.data.ingest.kind import IngestOptions, Made, Raw, check_unicode, table_of
from mmtrain.data.ingest.records import read_records
from mmtrain.data.ingest.text import JsonKind
from mmtrain.data.rules import spaced
from mmtrain.data.video import read_frames
from mmtrain.data.vocabulary import ASSISTANT, USER, Vocabulary
from mmtrain.errors import ContentError

_LOOKED_AT = 100  # records that decide about the format
_CLIPS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SIDE = 336  # pixels of a frame where nothing else is said


class Chat(JsonKind):
    """Documents of a conversation."""

    name = "chat"
    advice = "Is --format right, and --images the folder that names are relative to?"
    options = ("images", "format", "system", "frames")

    def __init__(self, source: Path, options: IngestOptions) -> None:
        """Pictures lie beside the JSON where no folder is said."""
        if options.images is None:
            options = replace(options, images=source.parent if source.is_file() else source)
        super().__init__(source, options)
        fixed = options.system != "auto"
        self._template = template_of(options.system, ()) if fixed else None
        self._last: tuple[Reference | None, Part | None] = (None, None)

    @property
    def label(self) -> str:
        """With the format."""
        return self._format

    def prepare(self, files: Sequence[SourceFile], vocabulary: Vocabulary | None) -> None:
        """Find out the format of the first file."""
        if vocabulary is not None:
            vocabulary.require([USER, ASSISTANT])
        records = (record for file in files for record in read_records(file.path))
        looked_at = [record.value for record in islice(records, _LOOKED_AT)]
        if not looked_at:
            raise ContentError(f"{self.source} holds no record")
        self._format = self.given.format or detect(looked_at, str(self.source))

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """The conversation in its template; raises Dropped."""
        form = FORMATS[self._format]
        conversation = form.read(table_of(raw.content, form.keys))
        _check_text(conversation)
        turns = [Turn(self._contents(q), self._contents(a)) for q, a in conversation.turns]
        template = self._template or template_of(self.given.system, turns)
        if conversation.system:
            template = Template(Part(modality=Modality.text, text=conversation.system))
        meta = {"format": self._format, "record": raw.number, "turns": len(turns)}
        noted = Counter({"turns": len(turns)})
        if conversation.cut:
            noted["last questions without an answer cut"] = conversation.cut
        return Made(CHAT, render(turns, template), meta, noted)

    def _contents(self, said: Said) -> tuple[Content, ...]:
        return tuple(part if isinstance(part, str) else self._part(part) for part in said)

    def _part(self, reference: Reference) -> Part:
        """The picture or clip; several records in a row often ask about the same one."""
        known, part = self._last
        if part is None or known != reference:
            clip = reference.modality is Modality.video
            media = self._clip(reference.name) if clip else (self.media.read(reference.name),)
            part = Part(modality=reference.modality, media=media)
            self._last = (reference, part)
        return part

    def _clip(self, name: str) -> tuple[bytes, ...]:
        """Frames, evenly spaced, of a video file or of a folder of pictures."""
        path = _found(self.media.path(name), name)
        if path.is_dir():
            return self._frames_of(path, name)
        side = self.given.max_side or _SIDE
        try:
            return tuple(read_frames(path, self.given.frames, longest_side=side))
        except ContentError as error:
            raise Dropped(Reason.undecodable, str(error)) from error

    def _frames_of(self, path: Path, name: str) -> tuple[bytes, ...]:
        try:
            files = [file for file in path.iterdir() if file.suffix.lower() in _PICTURES]
        except OSError as error:
            raise Dropped(Reason.missing, f"{name[:80]} cannot be read: {error}") from error
        files.sort(
            key=lambda file: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", file.name)]
        )
        if not files:
            raise Dropped(Reason.missing, f"{name[:80]} is a folder without pictures ({path})")
        chosen = [files[index].name for index in spaced(len(files), self.given.frames)]
        return tuple(self.media.read(f"{name.rstrip('/')}/{own}") for own in chosen)


def _check_text(conversation: Conversation) -> None:
    said = [part for turn in conversation.turns for half in turn for part in half]
    for part in (conversation.system, *said):
        text = part if isinstance(part, str) else part.name
        check_unicode(text, repr(text[:40]))
        if isinstance(part, str) and (fault := text_fault(text)):
            raise Dropped(Reason.text, f"{text[:40]!r}: {fault}")


def _found(path: Path, name: str) -> Path:
    """The clip as named, or, as data sets name clips by an id, with one of the usual endings."""
    try:
        candidates = [path, *(path.with_name(path.name + ending) for ending in _CLIPS)]
        return next(candidate for candidate in candidates if candidate.exists())
    except (StopIteration, OSError, ValueError) as error:
        raise Dropped(
            Reason.missing, f"{name[:80]} is not there ({path.parent.resolve()})"
        ) from error
