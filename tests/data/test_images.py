"""Pixels are those of the released preprocessing; what cannot be decoded says so."""

import io
import pickle
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mmtrain.data import images
from mmtrain.data.choices import Resize
from mmtrain.data.images import DecodeError, check, decode, encode_png, to_picture
from mmtrain.data.tokens import SequenceFormat

LAYOUT = SequenceFormat(
    bos=1, eos=2, pad=3, image_begin=4, image_end=5, image_slot=6, visual_tokens=3, image_size=56
)
EXACT = replace(LAYOUT, resize=Resize.exact)


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
    torch.testing.assert_close(decode(blob, EXACT), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width, height", [(56, 56), (100, 40), (31, 200), (512, 384), (256, 256)])
def test_the_fast_filter_gives_the_pixels_of_the_exact_one_but_for_rounding(
    width: int, height: int
) -> None:
    blob = encoded(noise(width, height))
    for side in (56, 224):
        exact, fast = (
            images.pixels_of(blob, replace(form, image_size=side)).int() for form in (EXACT, LAYOUT)
        )
        off = (fast - exact).abs()
        assert off.max() <= 10 and off.float().mean() < 0.5, (side, off.max(), off.float().mean())


def test_memory_of_pixels_is_used_again_once_nothing_holds_it() -> None:
    room = images.Room()
    first = room.tensor(2, 3, 8)
    second = room.tensor(2, 3, 8)
    view, place = first[1], first.data_ptr()
    assert second.data_ptr() != place
    del first
    assert room.tensor(2, 3, 8).data_ptr() != place  # a view holds it
    del view
    assert room.tensor(3, 16).data_ptr() == place
    assert pickle.loads(pickle.dumps(room)).tensor(4).shape == (4,)


def test_dummy_pictures_are_zero_in_used_memory() -> None:
    room, pictures = images.Room(), [torch.full((3, 56, 56), 200, dtype=torch.uint8)] * 3
    place = images.stack(pictures, 3, LAYOUT, room).data_ptr()
    again = images.stack(pictures[:1], 3, LAYOUT, room)
    assert again.data_ptr() == place
    assert not again[1:].any() and again[0].all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decode(encoded(noise(20, 20, mode)), LAYOUT).shape == (3, 56, 56)


CORNERS = {  # orientation -> where the red corner of the stored picture stands when it is upright
    1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1),
}  # fmt: skip


def cornered(orientation: int, kind: str) -> bytes:
    """A picture of 60 x 40 whose first corner is red, with an EXIF orientation."""
    picture = Image.new("RGB", (60, 40), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 20, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", images.FORMATS)
@pytest.mark.parametrize("orientation", CORNERS)
def test_pictures_stand_upright(orientation: int, kind: str) -> None:
    blob = cornered(orientation, kind)
    assert images.open_picture(blob).size == ((60, 40) if orientation < 5 else (40, 60))
    shown = to_picture(decode(blob, LAYOUT), LAYOUT)
    red = {
        (x, y)
        for x in (0, 1)
        for y in (0, 1)
        if shown.getpixel((3 + 49 * x, 3 + 49 * y))[0] > 200  # type: ignore[index]
    }
    assert red == {CORNERS[orientation]}


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0rubbish", b""])
def test_damaged_remarks_do_not_cost_a_picture(exif: bytes) -> None:
    buffer = io.BytesIO()
    noise(56, 56).save(buffer, "WEBP", exif=exif, lossless=True)
    assert (
        to_picture(decode(buffer.getvalue(), LAYOUT), LAYOUT).tobytes() == noise(56, 56).tobytes()
    )


def test_an_orientation_that_is_none_is_ignored() -> None:
    assert images.open_picture(cornered(77, "JPEG")).size == (60, 40)


def test_16_bits_become_8() -> None:
    ramp = np.linspace(0, 65535, 56 * 56).reshape(56, 56).astype(np.uint16)
    blob = encoded(Image.fromarray(ramp))
    shown = np.asarray(images.open_picture(blob))
    assert Image.open(io.BytesIO(blob)).mode.startswith("I;16")
    assert np.array_equal(shown, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, 2))
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG", transparency=0)
    assert images.open_picture(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_has_its_colours() -> None:
    picture = Image.new("RGB", (32, 32), (250, 20, 30)).convert("CMYK")
    shown = images.open_picture(encoded(picture, "JPEG")).getpixel((9, 9))
    assert np.allclose(shown, (250, 20, 30), atol=8)


def test_palettes_have_their_colours_and_holes_are_white() -> None:
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([9, 9, 9, 10, 200, 60])
    picture.paste(0, (0, 0, 10, 10))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=0)
    shown = images.open_picture(buffer.getvalue())
    assert shown.getpixel((2, 2)) == (255, 255, 255) and shown.getpixel((15, 15)) == (10, 200, 60)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(io.BytesIO(buffer.getvalue())), "n_frames", 1) == 3
    assert images.open_picture(buffer.getvalue()).getpixel((20, 15)) == (255, 0, 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def lying(side: int, kind: str) -> bytes:
    """Noise of 40 x 40 whose header says that it has `side` rows and columns."""
    blob = encoded(noise(40, 40), kind)
    if kind == "PNG":
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        return blob[:8] + chunk(b"IHDR", header) + blob[33:]
    place = blob.index(b"\xff\xc0") + 5
    return blob[:place] + struct.pack(">HH", side, side) + blob[place + 4 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_header_that_claims_the_impossible_is_refused_unread(kind: str) -> None:
    with pytest.raises(DecodeError, match="more pixels than its bytes can hold"):
        check(lying(4000 if kind == "JPEG" else 8000, kind))
    for side in (1, 39, 41, 400):  # what may be, costs little; where bytes are missing is not told
        try:
            assert images.open_picture(lying(side, kind)).size == (side, side)
        except DecodeError as error:
            assert str(error) in ("damaged", "truncated")


def test_plain_pictures_are_possible() -> None:
    for kind in images.FORMATS:
        check(encoded(Image.new("L", (3000, 3000)), kind))


def test_a_text_that_unpacks_to_gigabytes_is_refused() -> None:
    blob = encoded(noise(40, 40))
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (1 << 26), 9))
    with pytest.raises(DecodeError):
        check(blob[:33] + bomb + blob[33:])


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "no PNG, JPEG or WebP"),
        (encoded(noise(40, 40), "JPEG")[:-200], "truncated"),
        (encoded(noise(40, 40), "BMP"), "no PNG, JPEG or WebP"),
    ],
)
def test_reasons_are_few_words_without_numbers_of_the_sample(blob: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=f"^{reason}$"):
        check(blob)


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
    assert torch.equal(found, decode(encoded(middle), LAYOUT))


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
