"""Sources in other people's formats, ingested through the command line, and what came of them."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmtrain.cli import main
from mmtrain.data.document import Document
from mmtrain.data.ingest.journal import Partial
from mmtrain.data.shards import open_shards

Json = dict[str, Any]
SMALL = ("--shard-mb", "0.0025")  # shards of a few documents


def ingest(kind: str, source: Path, out: Path, *options: object) -> int:
    """Run the command with one worker unless told otherwise."""
    words = [str(option) for option in options]
    if "--workers" not in words:
        words += ["--workers", "1"]
    return main(["data", "ingest", kind, str(source), str(out), *words])


def documents(out: Path) -> list[Document]:
    """What a folder holds, in stored order."""
    shards = open_shards(out)
    return [shards.document(number) for number in range(len(shards))]


def manifest(out: Path) -> Json:
    """What is told about it."""
    found: Json = json.loads((out / "manifest.json").read_text())
    return found


def counts(out: Path) -> Json:
    """Its counts."""
    found: Json = manifest(out)["counts"]
    return found


def shown(document: Document) -> str:
    """A document as text, `(n)` for a picture or clip of n images."""
    return "".join(part.text or f"({len(part.media)})" for part in document.parts)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar of members in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def partial_of(out: Path) -> Path:
    """The folder of a half-done ingest."""
    return out.with_name(f".{out.name}.partial")


def journal(out: Path) -> list[Json]:
    """Lines of its journal: the head, and one for every finished shard."""
    path = partial_of(out) / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Stopped(Exception):
    """Ends an ingest in the middle, as a full disk or a bug would."""


def stopped(
    source: Path,
    out: Path,
    shards: int,
    kind: str = "webdataset",
    options: tuple[object, ...] = (*SMALL, "--max-failures", "0.2"),
) -> None:
    """Go on with an ingest until so many shards are finished."""
    write = Partial.write

    def until(self: Partial, *arguments: Any) -> None:
        write(self, *arguments)
        if self.finished >= shards:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "write", until)
        with pytest.raises(Stopped):
            ingest(kind, source, out, *options)
