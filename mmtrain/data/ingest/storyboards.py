"""Storyboards of videos (YT-Storyboard): a folder a video, or a sample a video in tars.

Raw: one JSON of `sb` (a list of [width, height, columns, rows, frames, type]), `duration` and
`subtitle` (a list of `text`, `start`; or a file `subtitles.json` beside it), and the sheets, whose
names end in their number: `0.webp`, `1.webp`, ... Merged by the exact rules of `data.storyboard`.

As the tool leaves it: `0.txt`, `0.png`, `1.txt`, ..., text before its frame; `final_meta.json`
gives the times back.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmtrain.data import images
from mmtrain.data.document import Modality, Part
from mmtrain.data.ingest.archives import samples, whole
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile, find_files
from mmtrain.data.ingest.kind import Kind, Made, Raw, text_of
from mmtrain.data.ingest.media import located, read_file
from mmtrain.data.storyboard import (
    Sheet,
    Subtitle,
    cut_sheets,
    storyboard_document,
    timeline,
)

_SHEETS = 100  # of a video, as in the released tool
_CELLS = 10_000  # of a sheet
_NUMBERED = re.compile(r"(\d+)\.(?:webp|png|jpe?g)", re.ASCII)
_ENDS_IN_NUMBER = re.compile(r"(?:.*\D)?(\d+)\.(?:webp|png|jpe?g)", re.ASCII)


Read = Callable[[str], bytes]  # a member of a video by its name


class Storyboards(Kind):
    """Documents of frames and subtitles on one time line."""

    name = "storyboard"
    advice = "Is SRC a folder with one folder a video, or tars of the released tool?"
    endings = (".tar",)

    def files(self) -> tuple[SourceFile, ...]:
        """Tars; or the source as one file, whose folders are the records."""
        if self.source.is_dir() and not any(self.source.glob("*.tar")):
            return (SourceFile(self.source, self.source.resolve().name),)
        return find_files(self.source, self.endings)

    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Folders of videos by name; or samples of a tar."""
        if not file.path.is_dir():
            yield from samples(file.path, _is_member, skip)
            return
        names = sorted(
            path.name
            for path in file.path.iterdir()
            if path.is_dir() and not path.name.startswith(".")
        )
        for number, name in enumerate(names[skip:], skip + 1):
            yield Raw(number, name, name)

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """Subtitles and frames in order of time; raises Dropped."""
        if isinstance(raw.content, str):
            read, names = _folder(located(file.path, raw.content))
        else:
            members = whole(raw.content)
            read, names = members.__getitem__, sorted(members)
        cut = any(name.endswith(".txt") and name[:-4].isdecimal() for name in names)
        told = _told(read, names)
        parts = _stored(read, names, told) if cut else _merged(read, names, told, raw.name)
        if not any(part.media for part in parts):
            raise Dropped(Reason.no_image, "no frame")
        parts = [self._encoded(part) for part in parts]
        meta = {"key": raw.name, "frames": sum(bool(part.media) for part in parts)}
        duration = told.get("duration")
        return Made(
            "storyboard", parts, meta | ({} if duration is None else {"duration": duration})
        )

    def _encoded(self, part: Part) -> Part:
        if not part.media:
            return part
        blob = self.media.stored(part.media[0], "frame")
        return Part(modality=part.modality, media=(blob,), time=part.time)


def _is_member(ending: str) -> bool:
    return ending.endswith((".json", ".txt")) or bool(_ENDS_IN_NUMBER.fullmatch(ending))


def _folder(folder: Path) -> tuple[Read, list[str]]:
    """How the files of a folder are read, and their names."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise Dropped(Reason.missing, f"{folder.name} cannot be read: {error.strerror}") from error
    return lambda name: read_file(located(folder, name), name), names


def _told(read: Read, names: Sequence[str]) -> dict[str, Any]:
    """What the video's JSON tells; its subtitles may be a list of their own."""
    told: dict[str, Any] = {}
    for name in names:
        if not name.endswith(".json"):
            continue
        value = _json(read, name)
        if isinstance(value, Mapping):
            told |= value
        elif isinstance(value, list):
            told["subtitle"] = value
    duration = told.get("duration")
    if duration is not None and (
        type(duration) not in (int, float) or not 0 <= duration < float("inf")
    ):
        raise Dropped(Reason.fields, f"duration is {duration!r}; wanted: seconds")
    return told


def _json(read: Read, name: str) -> Any:
    try:
        return json.loads(read(name))
    except (ValueError, RecursionError) as error:
        raise Dropped(Reason.syntax, f"{name} is no JSON: {error}") from error


def _merged(
    read: Read, names: Sequence[str], told: Mapping[str, Any], video: str
) -> Sequence[Part]:
    """Sheets and subtitles on one time line."""
    frames = cut_sheets(list(_sheets(read, names, told)))
    if not frames:
        raise Dropped(Reason.no_image, "the first sheet is missing, or sb counts no frame")
    subtitles = _subtitles(told)
    document = storyboard_document(video, frames, told.get("duration"), subtitles)
    if document is None:
        raise Dropped(Reason.untimed, "no subtitles, or no duration; the released tool skips it")
    return document.parts


def _sheets(read: Read, names: Sequence[str], told: Mapping[str, Any]) -> Iterator[Sheet | None]:
    entries = told.get("sb")
    if not isinstance(entries, list):
        raise Dropped(Reason.fields, "no JSON with sb, a list of sheets")
    by_number = {int(m[1]): name for name in names if (m := _ENDS_IN_NUMBER.fullmatch(name))}
    for number, entry in enumerate(entries[:_SHEETS]):
        _, _, columns, rows, frames = _whole(entry, number)
        if number not in by_number:
            yield None
            return
        picture = _picture(read, by_number[number])
        if columns > picture.width or rows > picture.height:
            raise Dropped(Reason.fields, f"sheet {number} is smaller than its grid")
        yield Sheet(picture, rows, columns, frames)


def _whole(entry: Any, number: int) -> list[int]:
    """Width, height, columns, rows and frames of a sheet."""
    told = entry[:5] if isinstance(entry, list) else []
    if len(told) != 5 or any(type(value) is not int or value < 0 for value in told):
        raise Dropped(
            Reason.fields, f"sb {number} is no list of width, height, columns, rows, frames"
        )
    if not 0 < told[2] * told[3] <= _CELLS or told[4] > told[2] * told[3]:
        raise Dropped(
            Reason.fields, f"sb {number} counts {told[4]} frames in {told[3]} x {told[2]}"
        )
    return told


def _subtitles(told: Mapping[str, Any]) -> list[Subtitle] | None:
    lines = told.get("subtitle", told.get("subtitles"))
    if lines is None:
        return None
    try:
        found = [Subtitle(line["text"], line["start"]) for line in lines]
    except (TypeError, KeyError) as error:
        raise Dropped(Reason.fields, "subtitle is no list of text, start") from error
    for line in found:
        if type(line.start) not in (int, float) or not 0 <= line.start < float("inf"):
            raise Dropped(Reason.fields, f"a subtitle starts at {line.start!r}; wanted: seconds")
        if not isinstance(line.text, str):
            raise Dropped(Reason.fields, "a subtitle's text is no text")
        if line.text.strip():
            text_of(line.text, "a subtitle")
    return found


def _stored(read: Read, names: Sequence[str], told: Mapping[str, Any]) -> list[Part]:
    """What the released tool has cut and merged: text k, then frame k."""
    pictures = {int(m[1]): name for name in names if (m := _NUMBERED.fullmatch(name))}
    texts = {int(n[:-4]): n for n in names if n.endswith(".txt") and n[:-4].isdecimal()}
    members = sorted({*pictures, *texts})
    if members != list(range(len(members))):
        raise Dropped(Reason.missing, f"one of the members 0 to {members[-1]} is not there")
    contents = [read(texts[k]).strip() if k in texts else b"" for k in members]
    said = [text_of(content, f"{k}.txt") if content else "" for k, content in enumerate(contents)]
    moments = timeline(len(pictures), told.get("duration"), _subtitles(told)) or []
    timed = [moment.text.strip() for moment in moments] == said
    parts: list[Part] = []
    for k, text in enumerate(said):
        if text:
            time = moments[k].text_time if timed else None
            parts.append(Part(modality=Modality.text, text=text, time=time))
        if k in pictures:
            time = moments[k].time if timed else None
            blob = read(pictures[k])
            parts.append(Part(modality=Modality.image, media=(blob,), time=time))
    return parts


def _picture(read: Read, name: str) -> Image.Image:
    try:
        return images.open_picture(read(name))
    except images.DecodeError as error:
        raise Dropped(Reason.undecodable, f"{name} cannot be decoded ({error})") from error
