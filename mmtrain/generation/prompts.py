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
from itertools import takewhile
from pathlib import Path

from PIL import Image, ImageSequence

from mmtrain.data.chat import Turn, prompt_parts, template_of
from mmtrain.data.document import Modality, Part
from mmtrain.data.images import DecodeError, encode_png, open_picture, opened
from mmtrain.data.video import read_frames
from mmtrain.errors import MmtrainError, Problem, RecipeError

ASKS_IMAGE = "[IMG]"
FRAMES = 8  # of a clip

_PICTURES = ("png", "jpg", "jpeg", "webp", "bmp")
_FILMS = ("mp4", "webm", "mkv", "mov", "avi")
_ANIMATED = ("gif",)
_READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # PIL goes by content, not by name
_MEDIA = re.compile(rf"\[([^\[\]]+\.(?:{'|'.join(_PICTURES + _FILMS + _ANIMATED)}))\]", re.I)

Row = list[str | Image.Image]
Piece = str | Image.Image | Part


@dataclass(frozen=True)
class Request:
    """A prompt, and whether it asks for an image.

    Attributes:
        pieces: what the model gets, texts and pictures in order; parts may be markup.
        wants_image: an image comes next.
        shown: what people see of it, when that is less.
    """

    pieces: Sequence[Piece]
    wants_image: bool = False
    shown: Row | None = None

    @property
    def row(self) -> Row:
        """Texts and pictures to look at."""
        if self.shown is not None:
            return self.shown
        return [piece for piece in self.pieces if not isinstance(piece, Part)]

    @property
    def plain(self) -> str:
        """The prompt in words, `[image]` for each picture."""
        words = [p.strip() if isinstance(p, str) else "[image]" for p in self.row]
        return " ".join(words)


def parse(prompts: Sequence[str]) -> list[Request]:
    """Read prompts, as in the module's examples, and open what they name.

    Raises:
        RecipeError: every picture and clip that is not there or cannot be opened, at once.
    """
    faults: list[Problem] = []
    requests = []
    for words in prompts:
        asked = words.strip()
        wants_image = asked.endswith(ASKS_IMAGE)
        row = _pieces(asked.removesuffix(ASKS_IMAGE), "--prompt", faults)
        requests.append(Request(row, wants_image))
    if faults:
        raise RecipeError(faults)
    return requests


def parse_chat(questions: Sequence[str], system: str) -> list[Request]:
    """Questions in the template that instruction tuning trains with (`data.chat`).

    Args:
        questions: texts with pictures and clips in brackets, one conversation each.
        system: the system message, as `data.chat.template_of` takes it.

    Raises:
        RecipeError: every picture and clip that is not there or cannot be opened, at once.
        MissingError: the file of the system message is not there.
    """
    faults: list[Problem] = []
    requests = []
    for question in questions:
        row = _pieces(question, "--chat", faults)
        turn = Turn(tuple(piece if isinstance(piece, str) else _stored(piece) for piece in row))
        parts = prompt_parts([turn], template_of(system, [turn]))
        requests.append(Request(parts, shown=row))
    if faults:
        raise RecipeError(faults)
    return requests


def asked_before(parts: Sequence[Part]) -> Request:
    """A stored conversation up to its first answer."""
    before = list(takewhile(lambda part: not part.answer, parts))
    shown: Row = []
    for part in before:
        if part.modality is not Modality.text:
            shown += map(open_picture, part.media)
        elif not part.markup:
            shown.append(part.text)
    return Request(before, shown=shown)


def _stored(picture: Image.Image) -> Part:
    return Part(modality=Modality.image, media=(encode_png(picture),))


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


def _pieces(words: str, option: str, faults: list[Problem]) -> Row:
    row: Row = []
    for index, piece in enumerate(_MEDIA.split(words)):
        if index % 2 == 0:
            row += [piece.strip()] if piece.strip() else []
            continue
        try:
            row += open_media(Path(piece))
        except (OSError, MmtrainError, DecodeError) as error:
            faults.append(Problem(option, f"{piece} cannot be opened: {error}"))
    return row


def open_media(path: Path) -> list[Image.Image]:
    """The picture, or the frames of the clip, in a file.

    Raises:
        OSError: it is not there or no picture.
        DecodeError: it has too many pixels.
        MmtrainError: it is a clip that cannot be decoded.
    """
    ending = path.suffix.lower().lstrip(".")
    if ending in _FILMS:
        blobs = read_frames(path, FRAMES, choose=released_frames)
        return list(map(open_picture, blobs))
    with opened(path, _READ) as picture:
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
