"""Prompts as people type them: text, pictures and clips in brackets, `[IMG]` to ask for an image.

[cat.png] the animal is                      text after a picture
a red circle [IMG]                           an image after a text
[a.png][b.png][IMG]                          a blend of two pictures
[1.png] one [2.png] two [3.png]              examples, then the question
[clip.mp4] the film shows                    8 frames of a clip, as the release takes them
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageSequence

from mmtrain.data.video import read_frames
from mmtrain.errors import MmtrainError, Problem, RecipeError

ASKS_IMAGE = "[IMG]"
FRAMES = 8  # of a clip

_PICTURES = ("png", "jpg", "jpeg", "webp", "bmp")
_FILMS = ("mp4", "webm", "mkv", "mov", "avi")
_ANIMATED = ("gif",)
_MEDIA = re.compile(rf"\[([^\[\]]+\.(?:{'|'.join(_PICTURES + _FILMS + _ANIMATED)}))\]", re.I)

Row = list[str | Image.Image]


@dataclass(frozen=True)
class Request:
    """A prompt: its texts and pictures in order, and whether it asks for an image."""

    pieces: Row
    wants_image: bool

    @property
    def plain(self) -> str:
        """The prompt in words, `[image]` for each picture."""
        words = [p.strip() if isinstance(p, str) else "[image]" for p in self.pieces]
        return " ".join(words)


def parse(prompts: Sequence[str], option: str = "--prompt") -> list[Request]:
    """Read prompts and open what they name.

    Args:
        prompts: as in the module's examples.
        option: where they came from, for messages.

    Raises:
        RecipeError: every picture and clip that is not there or cannot be opened, at once.
    """
    faults: list[Problem] = []
    requests = [_parse(words, option, faults) for words in prompts]
    if faults:
        raise RecipeError(faults)
    return requests


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines do not count.

    Raises:
        RecipeError: the file cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Problem("--prompts", f"{path} cannot be read: {error}")]) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise RecipeError([Problem("--prompts", f"{path} holds no prompt; write one a line")])
    return found


def _parse(words: str, option: str, faults: list[Problem]) -> Request:
    words = words.strip()
    wants_image = words.endswith(ASKS_IMAGE)
    words = words.removesuffix(ASKS_IMAGE) if wants_image else words
    pieces: Row = []
    for index, piece in enumerate(_MEDIA.split(words)):
        if index % 2 == 0:
            pieces += [piece.strip()] if piece.strip() else []
            continue
        try:
            pieces += open_media(Path(piece))
        except (OSError, MmtrainError) as error:
            faults.append(Problem(option, f"{piece} cannot be opened: {error}"))
    return Request(pieces, wants_image)


def open_media(path: Path) -> list[Image.Image]:
    """The picture, or the frames of the clip, in a file.

    Raises:
        OSError: it is not there or no picture.
        MmtrainError: it is a clip that cannot be decoded.
    """
    ending = path.suffix.lower().lstrip(".")
    if ending in _FILMS:
        blobs = read_frames(path, FRAMES, choose=released_frames)
        return [Image.open(BytesIO(blob)).convert("RGB") for blob in blobs]
    with Image.open(path) as picture:
        if ending not in _ANIMATED:
            return [picture.convert("RGB")]
        frames = list(_frames(picture))
    return [frames[index] for index in released_frames(len(frames), FRAMES)]


def _frames(picture: Image.Image) -> Iterator[Image.Image]:
    for frame in ImageSequence.Iterator(picture):
        yield frame.convert("RGB")


def released_frames(count: int, keep: int) -> list[int]:
    """Which frames of a clip Emu is shown: start + round(i (n - 1) / k), start = (n - 1) / 2k.

    As in the released inference code; a frame beyond the end is the last one.
    """
    start = int((count - 1) / (2 * keep))
    return [min(start + round(i * (count - 1) / keep), count - 1) for i in range(keep)]
