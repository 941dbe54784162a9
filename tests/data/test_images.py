"""Pixels are those of the released preprocessing; what cannot be decoded says so."""

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mmtrain.data import images
from mmtrain.data.images import DecodeError, check, decode, encode_png, to_picture
from mmtrain.data.tokens import SequenceFormat

LAYOUT = SequenceFormat(
    bos=1, eos=2, pad=3, image_begin=4, image_end=5, image_slot=6, visual_tokens=3, image_size=56
)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(56, 56), (100, 40), (31, 200)])
@pytest.mark.parametrize("kind", images.FORMATS)
def test_pixels_equal_resize_and_normalise_of_torchvision(size: tuple[int, int], kind: str) -> None:
    blob = encoded(noise(*size), kind)
    bicubic = transforms.InterpolationMode.BICUBIC
    released = transforms.Compose(
        [
            transforms.Resize((56, 56), interpolation=bicubic),
            transforms.ToTensor(),
            transforms.Normalize(LAYOUT.image_mean, LAYOUT.image_std),
        ]
    )
    expected = released(Image.open(io.BytesIO(blob)).convert("RGB"))
    torch.testing.assert_close(decode(blob, LAYOUT), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decode(encoded(noise(20, 20, mode)), LAYOUT).shape == (3, 56, 56)


def test_transparent_is_white() -> None:
    clear = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    assert to_picture(decode(encoded(clear), LAYOUT), LAYOUT).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("width, height", [(112, 56), (56, 112), (56, 56)])
def test_a_cropped_picture_is_the_middle_square_of_the_stored_one(width: int, height: int) -> None:
    picture = noise(width, height)
    left, top = (width - 56) // 2, (height - 56) // 2
    middle = picture.crop((left, top, left + 56, top + 56))
    cropping = replace(LAYOUT, crops_images=True)
    found = decode(encoded(picture), cropping)
    assert torch.equal(found, images.normalise(middle, cropping))


def test_a_picture_survives_normalisation() -> None:
    picture = noise(56, 56)
    assert to_picture(decode(encode_png(picture), LAYOUT), LAYOUT).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"not a picture",
        encoded(noise(40, 40))[:-60],
        encoded(noise(40, 40), "JPEG")[:-200],
        encoded(noise(40, 40), "BMP"),  # a format that is not allowed
        encoded(noise(40, 40))[:200] + b"\0" * 50 + encoded(noise(40, 40))[250:],
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "bmp", "overwritten"],
)
def test_a_damaged_picture_is_refused_with_and_without_pixels(blob: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(blob, LAYOUT)
    with pytest.raises(DecodeError):
        check(blob)


def test_a_picture_that_claims_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(DecodeError, match="more than"):
        decode(encoded(noise(20, 20)), LAYOUT)


def _memory(key: str) -> int:
    """A figure of this process in kB, as in `VmHWM`, the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts this memory")
def test_a_huge_picture_costs_neither_time_nor_memory(huge_png: bytes) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the most held is counted from here
    before, start = _memory("VmRSS"), time.perf_counter()
    for use in (check, images.open_picture):
        with pytest.raises(DecodeError, match="more than 67,108,864 pixels"):
            use(huge_png)
    assert time.perf_counter() - start < 0.5  # milliseconds; decoding takes seconds
    assert _memory("VmHWM") - before < 50_000  # decoded it is 1.2 GB
