"""WebVid (Bain et al. 2021, arXiv:2104.00650): a CSV of captions, clips as video files.

Columns `videoid`, `name` (the caption; another by `--text`) and, where there is one, `page_dir`:
the clip is `--images`/page_dir/videoid.mp4, or `--images`/videoid.mp4. Frames are evenly spaced,
the first and the last among them; which of them a sequence keeps is the recipe's choice.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmtrain.data.document import Modality, Part
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile
from mmtrain.data.ingest.kind import Kind, Made, Raw, text_of
from mmtrain.data.video import read_frames
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError, MissingError

_LONGEST = 1 << 20  # characters of a line
_SIDE = 336  # pixels of a frame where nothing else is said


class WebVid(Kind):
    """Documents of a clip and its caption."""

    name = "webvid"
    advice = "Does --images name the folder of the clips?"
    endings = (".csv",)
    options = ("images", "text", "frames")

    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Rows of the CSV."""
        caption = self.given.text or "name"
        try:
            with file.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
                reader = csv.reader(_lines(text))
                names = next(reader, [])
                if not {"videoid", caption} <= set(names):
                    raise ContentError(
                        f"{file.path} has the columns {', '.join(names)[:200]}; wanted: videoid "
                        f"and {caption} (--text names another)"
                    )
                yield from _rows(reader, names, skip)
        except OSError as error:
            raise MissingError(f"{file.path} cannot be read: {error.strerror}") from error

    def prepare(self, files: Sequence[SourceFile], vocabulary: Vocabulary | None) -> None:
        """Look at the columns."""
        if self.media.place is None:
            raise MissingError("webvid needs --images, the folder of the clips")
        for file in files:
            next(self.records(file, 0), None)

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """The clip, then its caption; raises Dropped."""
        row: Mapping[str, str] = raw.content
        key = self.given.text or "name"
        text = text_of(row[key], key)
        frames = self._frames(self._clip(row))
        parts = (
            Part(modality=Modality.video, media=frames),
            Part(modality=Modality.text, text=text),
        )
        return Made("clip", parts, {"key": row["videoid"]})

    def _clip(self, row: Mapping[str, str]) -> Path:
        name = f"{row['videoid']}.mp4"
        places = [self.media.path(name)]
        if row.get("page_dir"):
            places.insert(0, self.media.path(f"{row['page_dir']}/{name}"))
        for place in places:
            if place.is_file():
                return place
        raise Dropped(Reason.missing, f"{name[:80]} is not there ({places[0].parent})")

    def _frames(self, clip: Path) -> tuple[bytes, ...]:
        side = self.given.max_side or _SIDE
        try:
            blobs = read_frames(clip, self.given.frames, longest_side=side)
        except ContentError as error:
            raise Dropped(Reason.undecodable, str(error)) from error
        if self.given.reencode in (None, "jpeg"):
            return tuple(blobs)
        return tuple(self.media.stored(blob, clip.name) for blob in blobs)


def _lines(text: io.TextIOBase) -> Iterator[str]:
    """Lines of bounded length: a quote that never ends would take the rest of the file."""
    while line := text.readline(_LONGEST):
        yield line


def _rows(reader: Iterator[list[str]], names: list[str], skip: int) -> Iterator[Raw]:
    number = 0
    while True:
        fault, cells = None, []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = Dropped(Reason.fields, f"the CSV cannot be read: {error}")
        if not cells and fault is None:
            continue
        number += 1
        if number <= skip:
            continue
        if fault is None and len(cells) != len(names):
            fault = Dropped(Reason.fields, f"{len(cells)} cells, {len(names)} columns")
        row = dict(zip(names, cells, strict=False))
        yield Raw(number, row, row.get("videoid", ""), fault)
