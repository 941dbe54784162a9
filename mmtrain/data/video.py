"""Video files to frames, while ingesting; training reads stored frames as images.

Decoding at training time would need a video library in every worker and seconds a clip, so clips
are stored as encoded frames (`Part.media` of a video part). Needs the extra `mmtrain[video]`.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmtrain.data.images import MAX_PIXELS, TOO_LARGE
from mmtrain.data.rules import spaced
from mmtrain.errors import ContentError, MissingError

try:
    import av
except ImportError:  # the extra is optional; read_frames says how to get it
    av = None

# FFmpeg's names of what a clip may be: files that hold their frames, no playlists or scripts
MAX_FRAMES = 1 << 18  # 2.4 hours at 30 frames a second; what a header says of them is not believed
CONTAINERS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif")


def read_frames(
    path: Path,
    frames: int,
    *,
    choose: Callable[[int, int], list[int]] = spaced,
    longest_side: int = 336,
    quality: int = 95,
) -> list[bytes]:
    """Frames of a video file, evenly spaced with the first and the last unless told otherwise.

    Args:
        path: one of `CONTAINERS`.
        frames: how many at most.
        choose: (frames there are, frames wanted) -> which.
        longest_side: pixels; larger frames are made smaller, aspect kept.
        quality: of the JPEG.

    Returns:
        JPEG bytes in order of time.

    Raises:
        MissingError: PyAV or the file is not there.
        ContentError: the file holds no video that can be decoded.
    """
    if av is None:
        raise MissingError("reading video files needs PyAV: pip install 'mmtrain[video]'")
    if not path.is_file():
        raise MissingError(f"{path} is not there")
    try:
        # counted by decoding: packet counts of broken and variable-rate files lie
        count = sum(1 for _ in _frames(path))
        wanted = choose(count, frames) if count else []
        kept = {
            index: _jpeg(frame.to_image(), longest_side, quality)
            for index, frame in enumerate(_frames(path))
            if index in wanted
        }
    except Exception as error:  # whatever FFmpeg and its binding stumble over
        raise ContentError(f"{path} cannot be decoded as video: {error}") from error
    if not wanted:
        raise ContentError(f"{path} holds no frame")
    return [kept[index] for index in wanted]


def _frames(path: Path) -> Iterator[Any]:
    """Every frame of the first video stream."""
    with _opened(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index == MAX_FRAMES:
                raise ValueError(f"more than {MAX_FRAMES:,} frames")
            yield frame


def _opened(path: Path) -> Any:
    """The container, read from this one file by its own demuxer, and its header looked at."""
    # FFmpeg goes by content, not by name: a playlist named .mp4 would have it open other files
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    container = av.open(str(path), options=options)
    for stream in container.streams.video:
        if stream.width * stream.height > MAX_PIXELS:
            container.close()
            raise ValueError(f"frames of {stream.width} x {stream.height}, {TOO_LARGE}")
        # and every frame's own header, which may claim more than the container's
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container


def _jpeg(picture: Image.Image, longest_side: int, quality: int) -> bytes:
    picture = picture.convert("RGB")
    picture.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
