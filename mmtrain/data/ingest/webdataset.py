"""WebDataset tars of pictures with captions, as LAION-2B and LAION-COCO are passed around.

Members of one sample follow each other and share their name up to its first dot: `000123.jpg`,
`000123.txt`, `000123.json`. The caption is `.txt`, or a key of `.json`; with `--text KEY` it is
always that key.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mmtrain.data.document import Modality, Part
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile
from mmtrain.data.ingest.kind import Kind, Made, Raw, table_of, text_of
from mmtrain.data.ingest.media import MAX_BYTES

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("caption", "text", "TEXT", "top_caption")  # keys of a caption, the first that is there
_READ = (*PICTURES, "txt", "json")
_KEPT = ("url", "key", "similarity")  # of the JSON, in the document's meta


class WebDataset(Kind):
    """Documents of a picture and its caption."""

    name = "webdataset"
    advice = "Is --text a key of the JSON members?"
    endings = (".tar", ".tar.gz", ".tgz")
    options = ("text",)

    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Samples of a tar; those that are passed over are not read."""
        number, key = 0, ""
        fields: dict[str, bytes | Dropped] = {}
        fault: Dropped | None = None
        try:
            with tarfile.open(file.path, "r:*") as tar:
                for info in _members(tar):
                    own, ending = _key_of(info.name)
                    if not info.isfile() or ending not in _READ:
                        continue
                    if own != key or not number:
                        if number > skip:
                            yield Raw(number, fields, key)
                        number, key, fields = number + 1, own, {}
                    if number > skip:
                        fields[ending] = _content(tar, info)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            where = f"behind {key}" if number else "at its begin"
            fault = Dropped(Reason.cut, f"the tar breaks off {where} ({error}); fetch it again")
            number = max(number, 1)
        if number > skip:
            yield Raw(number, fields, key, fault)

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """The picture, then its caption; raises Dropped."""
        fields: dict[str, Any] = raw.content
        for content in fields.values():
            if isinstance(content, Dropped):
                raise content
        told = _json_of(fields)
        name = next((ending for ending in PICTURES if ending in fields), None)
        if name is None:
            raise Dropped(Reason.no_image, f"holds {', '.join(sorted(fields))}, no picture")
        text = self._caption(fields, told)
        picture = self.media.stored(fields[name], f"{raw.name}.{name}")
        meta = {kept: told[kept] for kept in _KEPT if isinstance(told.get(kept), str | float | int)}
        parts = (
            Part(modality=Modality.image, media=(picture,)),
            Part(modality=Modality.text, text=text),
        )
        return Made("caption", parts, {"key": raw.name} | meta)

    def _caption(self, fields: dict[str, Any], told: dict[str, Any]) -> str:
        wanted = self.given.text
        if wanted is None and "txt" in fields:
            return text_of(fields["txt"], "txt")
        keys = CAPTIONS if wanted is None else (wanted,)
        key = next((key for key in keys if told.get(key) is not None), None)
        if key is None:
            raise Dropped(Reason.no_text, f"no txt, and no {' or '.join(keys)} in json")
        return text_of(told[key], key)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members up to the mark of the end; tarfile itself takes a damaged header for that mark."""
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        yield info
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _key_of(name: str) -> tuple[str, str]:
    """What a sample is called, and what the member holds of it."""
    pure = PurePosixPath(name)
    base, _, ending = pure.name.partition(".")
    key = str(pure.with_name(base)) if base else name
    return key.encode("utf-8", "backslashreplace").decode(), ending.lower()


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | Dropped:
    if info.size > MAX_BYTES or info.issparse():
        return Dropped(Reason.large, f"{info.name[:80]} has {info.size:,} bytes")
    stream = tar.extractfile(info)
    content = b"" if stream is None else stream.read()
    if len(content) != info.size:
        raise EOFError("a member is cut")
    return content


def _json_of(fields: dict[str, Any]) -> dict[str, Any]:
    if "json" not in fields:
        return {}
    try:
        return dict(table_of(json.loads(fields["json"]), "caption"))
    except (ValueError, RecursionError) as error:
        raise Dropped(Reason.syntax, f"json is no JSON: {error}") from error
