"""Encoded images to normalised pixels.

As released for Emu: the picture is squashed to a square with bicubic filtering, no crop, no
aspect preserved, then normalised with CLIP's mean and standard deviation. Beyond the release:
pictures stand upright (EXIF), 16 bits are scaled to 8, what is transparent is white, and the
filter is torch's, whose weights have 16 bits, unless `Resize.exact` asks for Pillow's.
Cost: about 0.1 ms for a 56 px PNG, 3 ms for a 512 px JPEG, on one core.
"""

import io
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from mmtrain.data.choices import Resize
from mmtrain.data.tokens import SequenceFormat

FORMATS = ("PNG", "JPEG", "WEBP")  # what a document may hold
# Told by the header, before anything is decoded. 67 million (8192 x 8192) is above every camera in
# use and 200 MB as RGB, which every worker can hold; 20,000 x 20,000 would be 1.2 GB of each worker
MAX_PIXELS = 1 << 26
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels"
LYING = "more pixels than its bytes can hold"
_EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where a turn may be told
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(Exception):
    """A stored image cannot be decoded; `args[0]` is a short reason without sample detail."""


def decode(blob: bytes, layout: SequenceFormat) -> Tensor:
    """Decode an image to normalised pixels.

    Args:
        blob: encoded PNG, JPEG or WebP.
        layout: size, mean and standard deviation.

    Returns:
        float32 `[3, image_size, image_size]`.

    Raises:
        DecodeError: the bytes are damaged, truncated, of another format, or too large.
    """
    return stack([pixels_of(blob, layout)], 1, layout)[0]


def pixels_of(blob: bytes, layout: SequenceFormat) -> Tensor:
    """The same before it is normalised: uint8 `[3, H, W]`; raises DecodeError as `decode`."""
    picture = _open(blob)
    side = (layout.image_size, layout.image_size)
    if layout.crops_images and picture.width != picture.height:
        picture = picture.crop(_middle(picture))
    if picture.size != side and layout.resize is Resize.exact:
        picture = picture.resize(side, Image.Resampling.BICUBIC)
    pixels_3HW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    if picture.size == side:
        return pixels_3HW.contiguous()
    return functional.interpolate(pixels_3HW[None], side, mode="bicubic", antialias=True)[0]


def _middle(picture: Image.Image) -> tuple[int, int, int, int]:
    """The largest square in the middle of a picture: left, top, right, bottom."""
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short


def open_picture(blob: bytes) -> Image.Image:
    """Decode to an RGB picture of its own size; raises DecodeError exactly when `decode` does."""
    return _open(blob).copy()  # without its file


def check(blob: bytes) -> None:
    """Decode and throw away: raises DecodeError exactly when `decode` does."""
    _open(blob)


def to_picture(pixels: Tensor, layout: SequenceFormat) -> Image.Image:
    """Undo `stack` for looking at; rounds and clips to 8 bits."""
    mean = torch.tensor(layout.image_mean).view(3, 1, 1)
    std = torch.tensor(layout.image_std).view(3, 1, 1)
    colours = ((pixels.float().cpu() * std + mean) * 255.0).round().clamp(0, 255)
    return Image.fromarray(colours.permute(1, 2, 0).to(torch.uint8).numpy())


def encode_png(picture: Image.Image) -> bytes:
    """PNG bytes, the same for the same picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


class Room:
    """Memory for batches of pixels, used again as soon as no tensor holds it.

    The page faults of fresh memory cost more than the arithmetic: 0.45 ms a picture of 224 px.
    """

    def __init__(self) -> None:
        """Nothing is held yet."""
        self._rows: list[npt.NDArray[np.float32]] = []

    def __reduce__(self) -> tuple[type["Room"], tuple[()]]:
        """A copy in another process begins empty."""
        return Room, ()

    def tensor(self, *shape: int) -> Tensor:
        """float32 of `shape` with whatever numbers were there before."""
        size = math.prod(shape)
        # in a free row's count: the list, and the argument of getrefcount
        free = [n for n in range(len(self._rows)) if sys.getrefcount(self._rows[n]) == 2]
        row = next((self._rows[n] for n in free if self._rows[n].size == size), None)
        if row is None:  # free ones of other sizes go
            self._rows = [row for n, row in enumerate(self._rows) if n not in free]
            row = np.empty(size, np.float32)
            self._rows.append(row)
        return torch.from_numpy(row).view(shape)  # holds the row as long as its storage lives


def stack(
    pixels: Sequence[Tensor], slots: int, layout: SequenceFormat, room: Room | None = None
) -> Tensor:
    """Pictures of `pixels_of`, normalised, and zero dummies: float32 `[slots, 3, H, W]`.

    Each is written once, where it stays, and computed on while the cache holds it: a third of the
    time of torchvision's transforms and a copy.
    """
    side = layout.image_size
    out = (room or Room()).tensor(slots, 3, side, side)
    mean = torch.tensor(layout.image_mean).view(3, 1, 1)
    std = torch.tensor(layout.image_std).view(3, 1, 1)
    for slot, bytes_3HW in zip(out, pixels, strict=False):
        torch.div(bytes_3HW, 255.0, out=slot).sub_(mean).div_(std)
    out[len(pixels) :] = 0
    return out


def _open(blob: bytes) -> Image.Image:
    if not blob:
        raise DecodeError("empty")
    try:
        with opened(io.BytesIO(blob), FORMATS) as picture:
            if _is_impossible(picture, len(blob)):
                raise DecodeError(LYING)
            return _turned(_flattened(picture), picture)
    except DecodeError:
        raise
    except Exception as error:  # whatever PIL's parsers of foreign bytes stumble over
        raise DecodeError(_reason(error)) from error


def _is_impossible(picture: Image.Image, size_bytes: int) -> bool:
    """Whether a header claims more than any file of that size can hold.

    PIL fills up what is missing and says nothing, so a picture of 2 KB could cost a worker 200 MB.
    deflate makes at most 1,032 bytes of one (zlib's documentation, "maximum compression factor");
    a JPEG spends a bit on 64 pixels at least.
    """
    if picture.format == "PNG":
        return picture.height * (1 + picture.width // 8) > 1032 * size_bytes
    return picture.format == "JPEG" and picture.width * picture.height > 512 * size_bytes


def _reason(error: Exception) -> str:
    """One of a few words for what PIL says in many, with numbers of the sample."""
    if isinstance(error, UnidentifiedImageError):
        return "no PNG, JPEG or WebP"
    if isinstance(error, MemoryError):
        return "no memory"
    said = str(error).lower()
    return "truncated" if "truncated" in said or isinstance(error, EOFError) else "damaged"


@contextmanager
def opened(source: Path | BinaryIO, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """A picture whose header was looked at and nothing else; reading its pixels decodes it.

    Raises:
        DecodeError: it has more pixels than `MAX_PIXELS`, by its own or one of its frames' header.
        OSError: it is of another format, or cannot be read; other errors of PIL pass too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of remarks; once a picture is too often
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=formats) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise DecodeError(TOO_LARGE)
                yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(TOO_LARGE) from error


def _flattened(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, not the black that happens to lie under it."""
    if picture.mode.startswith("I"):
        return _of_16_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layered).convert("RGB")
    if picture.mode == "RGB":
        picture.load()
        return picture  # `convert` would copy it
    return picture.convert("RGB")


def _of_16_bits(picture: Image.Image) -> Image.Image:
    """RGB of 16-bit greys; PIL's own conversion clips them at 255, which leaves white alone."""
    greys = np.asarray(picture).astype(np.int32)
    narrow = np.clip(greys >> 8, 0, 255).astype(np.uint8)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        narrow[greys == clear] = 255
    return Image.fromarray(narrow).convert("RGB")


def _turned(picture: Image.Image, source: Image.Image) -> Image.Image:
    """`picture` as the camera that took `source` was held."""
    if not _EXIF & source.info.keys():
        return picture
    try:
        turn = _TURNS.get(source.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged remarks of a picture whose pixels are sound
        return picture
    return picture if turn is None else picture.transpose(turn)
