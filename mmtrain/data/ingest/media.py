"""Pictures and clips that records name or hold, as documents store them.

Names never leave their folder: no absolute ones, no `..`, no links out, no addresses. Bytes are
kept as they are, after one decoding to see that they can be, unless a picture is larger than
`max_side` or `reencode` asks for another format.

Cost: that decoding, 4 ms for a JPEG of 512 px.
"""

import base64
import binascii
import io
import re
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from mmtrain.data import images
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile, find_files
from mmtrain.errors import ContentError, MissingError
from mmtrain.paths import inside

MAX_BYTES = 1 << 28  # of a picture or a member of an archive
_CONVERTED = ("GIF", "BMP")  # to PNG; documents hold `images.FORMATS`
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class _Member:
    """Where the bytes of a tar's member lie."""

    tar: Path
    offset: int
    size: int


class Media:
    """Pictures by name, below one folder or inside of its tars."""

    def __init__(self, place: Path | None, max_side: int | None, reencode: str | None) -> None:
        """Remember where they are; nothing is opened.

        Args:
            place: a folder of files, of tars, or a tar; None where records hold all bytes.
            max_side: pixels; larger pictures are made smaller, aspect kept.
            reencode: `jpeg`, `png` or `webp`; None keeps the format.
        """
        self.place, self._max_side, self._reencode = place, max_side, reencode

    @cached_property
    def tars(self) -> tuple[SourceFile, ...]:
        """The archives that hold pictures, beside those that are files.

        Raises:
            MissingError: the place is not there.
        """
        if self.place is None:
            return ()
        if not self.place.exists():
            raise MissingError(f"{self.place} is not there; --images names a folder, or tars")
        if self.place.is_dir() and not any(self.place.glob("*.tar")):
            return ()
        return find_files(self.place, (".tar",))

    @cached_property
    def _members(self) -> dict[str, _Member]:
        """Every member of the tars by its name and, where that is free, by its last part."""
        found: dict[str, _Member] = {}
        brief: dict[str, _Member] = {}
        for file in self.tars:
            try:
                with tarfile.open(file.path, "r:") as tar:
                    for info in tar:
                        if info.isreg() and not info.issparse():
                            member = _Member(file.path, info.offset_data, info.size)
                            found.setdefault(info.name.removeprefix("./"), member)
                            brief.setdefault(Path(info.name).name, member)
                        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
            except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                raise ContentError(
                    f"{file.path} is no whole, uncompressed tar ({error}); fetch it again"
                ) from error
        return brief | found

    def prepare(self) -> None:
        """Read the headers of all tars, once, before there are workers.

        Raises:
            MissingError: the place is not there.
            ContentError: an archive is damaged.
        """
        if self.tars:
            assert self._members is not None

    def path(self, name: str) -> Path:
        """The file or folder of that name; raises Dropped where the name leads out."""
        if _ADDRESS.match(name):
            raise Dropped(
                Reason.missing, f"{name[:80]} is an address, and nothing is fetched: name a file"
            )
        if self.place is None:
            raise Dropped(Reason.missing, f"{name[:80]} is a name; say --images, its folder")
        return located(self.place, name)

    def read(self, name: str) -> bytes:
        """The bytes of a picture as they are stored; raises Dropped."""
        if name.startswith("data:"):
            return self.stored(_embedded(name), name[:40])
        return self.stored(self._bytes(name), name)

    def _bytes(self, name: str) -> bytes:
        member = self._members.get(name)
        if member is None:
            return read_file(self.path(name), name)
        _bounded(member.size, name)
        with member.tar.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def stored(self, blob: bytes, name: str) -> bytes:
        """Encoded bytes as a document holds them; raises Dropped where they cannot be decoded.

        Args:
            blob: of a picture; PNG, JPEG and WebP stay, GIF (its first frame) and BMP become PNG.
            name: for messages.
        """
        _bounded(len(blob), name)
        if self._max_side is None and self._reencode is None:
            try:
                images.check(blob)
            except images.DecodeError as error:
                return images.encode_png(_foreign(blob, name, error))
            return blob
        try:
            picture, form = images.open_picture(blob), _format(blob)
        except images.DecodeError as error:
            picture, form = _foreign(blob, name, error), "png"
            blob = b""  # cannot stay as it is
        wanted = self._reencode or form
        side = self._max_side or max(picture.size)
        if blob and max(picture.size) <= side and wanted == form:
            return blob
        picture.thumbnail((side, side), Image.Resampling.BICUBIC)
        return encode(picture, wanted)


def located(folder: Path, name: str) -> Path:
    """The file of a folder that a record names; raises Dropped where the name leads out."""
    if "\0" in name:
        raise Dropped(Reason.missing, f"{name[:80]!r} cannot be read: it holds a NUL")
    try:
        return inside(folder, name, folder)
    except (ContentError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: links turn
        raise Dropped(
            Reason.outside,
            f"{name[:80]!r} is not below {folder.resolve()}; name a folder above both",
        ) from error


def encode(picture: Image.Image, form: str) -> bytes:
    """An RGB picture as `jpeg`, `png` or `webp`, the same bytes for the same picture."""
    if form == "png":
        return images.encode_png(picture)
    buffer = io.BytesIO()
    picture.save(buffer, form.upper(), quality=95)
    return buffer.getvalue()


def read_file(path: Path, name: str) -> bytes:
    """The bytes of a file that a record named; raises Dropped."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is a device or a pipe, which may have no end")
        if path.is_file():
            _bounded(path.stat().st_size, name)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        what = (
            "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        )
        raise Dropped(Reason.missing, f"{name[:80]} {what} ({path.parent.resolve()})") from error


def _bounded(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise Dropped(Reason.large, f"{name[:80]} has {size:,} bytes, {MAX_BYTES:,} are allowed")


def _format(blob: bytes) -> str:
    with images.opened(io.BytesIO(blob), images.FORMATS) as picture:
        return str(picture.format).lower()


def _foreign(blob: bytes, name: str, error: Exception) -> Image.Image:
    """GIF (its first frame) and BMP, as RGB; what is damaged stays so."""
    try:
        with images.opened(io.BytesIO(blob), _CONVERTED) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, images.DecodeError):
        pass  # told below, with the first reason
    raise Dropped(Reason.undecodable, f"{name[:80]} cannot be decoded ({error})") from error


def _embedded(name: str) -> bytes:
    head, _, body = name.partition(",")
    return from_base64(body if head.endswith(";base64") else "!", name)


def from_base64(body: str, name: str) -> bytes:
    """Bytes that a record holds as base64; raises Dropped."""
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Dropped(Reason.undecodable, f"{name[:40]}... is no base64") from error
