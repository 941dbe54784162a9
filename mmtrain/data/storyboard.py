"""Storyboards: thumbnail sheets and subtitles of a video to one time line.

The exact semantics of the released tool (baaivision/Emu, Emu1/data/yt-sb-1b), whose output is the
golden file of the tests: frame i is shown at i * interval seconds, the interval is a whole number
(halves round to even, 0 happens), a frame comes before a subtitle of the same second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mmtrain.data.document import Document, Modality, Part
from mmtrain.data.images import encode_png


@dataclass(frozen=True)
class Sheet:
    """A picture of rows x columns thumbnails in reading order, `frames` of them counted."""

    picture: Image.Image
    rows: int
    columns: int
    frames: int


@dataclass(frozen=True)
class Subtitle:
    """A line of speech and the second at which it starts."""

    text: str
    start: float


@dataclass(frozen=True)
class Moment:
    """What was said since the previous frame, then a frame (None after the last one).

    Attributes:
        text: subtitles joined by single blanks; may be empty.
        frame: index of the frame, or None for what is said after the last.
        time: second of the frame, None without one.
        text_time: second of the first subtitle, None without one.
    """

    text: str
    frame: int | None
    time: float | None
    text_time: float | None


def cut_sheets(sheets: Sequence[Sheet | None]) -> list[Image.Image]:
    """Frames of a video's sheets, up to the first missing one.

    A sheet that is not full and not the last keeps its blank cells, and as many frames are lost
    at the end: so does the released tool, and the times of frames depend on it.
    """
    cells: list[Image.Image] = []
    counted = 0
    for sheet in sheets:
        if sheet is None:
            break
        width = sheet.picture.width // sheet.columns
        height = sheet.picture.height // sheet.rows
        for row in range(sheet.rows):
            for column in range(sheet.columns):
                left, top = column * width, row * height
                cells.append(sheet.picture.crop((left, top, left + width, top + height)))
        counted += sheet.frames
    return cells[:counted]


def frame_times(frames: int, duration_seconds: float) -> list[int]:
    """Second of every frame of a video of `duration_seconds`."""
    return [index * round(duration_seconds / frames) for index in range(frames)]


def timeline(
    frames: int, duration_seconds: float | None, subtitles: Sequence[Subtitle] | None
) -> list[Moment] | None:
    """Merge frames and subtitles; None where the tool skips a video (no duration, no subtitles).

    Args:
        frames: number of frames; at least 1.
        duration_seconds: of the video.
        subtitles: in any order; equal times keep it.
    """
    if duration_seconds is None or subtitles is None or frames < 1:
        return None
    times = frame_times(frames, duration_seconds)
    events: list[tuple[float, int | Subtitle]] = [(time, i) for i, time in enumerate(times)]
    events += [(line.start, line) for line in subtitles]
    events.sort(key=lambda event: event[0])  # stable: frames were put in first
    moments, text, since = [], "", None
    for time, event in events:
        if isinstance(event, Subtitle):
            text = f"{text} {event.text}" if text else event.text
            since = time if since is None else since
            continue
        moments.append(Moment(text, event, time, since))
        text, since = "", None
    return [*moments, Moment(text, None, None, since)] if text else moments


def storyboard_document(
    sample_id: str,
    frames: Sequence[Image.Image],
    duration_seconds: float | None,
    subtitles: Sequence[Subtitle] | None,
) -> Document | None:
    """A stored document for the rule `storyboard`; None where the tool skips the video."""
    moments = timeline(len(frames), duration_seconds, subtitles)
    if moments is None:
        return None
    parts = []
    for moment in moments:
        if moment.text:
            parts.append(Part(modality=Modality.text, text=moment.text, time=moment.text_time))
        if moment.frame is not None:
            media = (encode_png(frames[moment.frame]),)
            parts.append(Part(modality=Modality.image, media=media, time=moment.time))
    meta = {"duration": duration_seconds, "frames": len(frames)}
    return Document(sample_id=sample_id, kind="storyboard", parts=tuple(parts), meta=meta)
