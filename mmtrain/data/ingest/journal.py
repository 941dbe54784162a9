"""A half-done ingest on disk: locked, journalled after every shard, gone on with after a kill.

    .OUT.partial/  lock                    held while a process writes (POSIX record lock)
                   journal.jsonl           what is ingested and how; then a line a finished shard
                   shards/                 becomes OUT by one rename
                   arriving/               the shard that is being written

A shard is flushed, renamed into `shards/`, then told in the journal with the position of the first
record that is not in it. So what the journal tells is on disk, and what it does not tell is made
again, the same.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.data.document import Document
from mmtrain.data.fetch import INDEX
from mmtrain.data.folders import publish, refuse_existing, storage_errors
from mmtrain.data.shards import ShardWriter
from mmtrain.disk import sync, try_lock
from mmtrain.errors import OccupiedError, Problem, RecipeError

Json = dict[str, Any]
_JOURNAL, _LOCK, _SHARDS, _ARRIVING = "journal.jsonl", "lock", "shards", "arriving"


@dataclass(frozen=True)
class Position:
    """Records before this one are done: `records` of the file number `file`, and earlier files."""

    file: int = 0
    records: int = 0


@dataclass
class _Told:
    """What a journal holds: its head, and a line for every finished shard."""

    head: Json = field(default_factory=dict)
    shards: list[Json] = field(default_factory=list)


class Partial:
    """A dataset in the making."""

    def __init__(self, out: Path, head: Mapping[str, Any], shard_bytes: int) -> None:
        """Begin, or go on where a process was killed.

        Args:
            out: folder to make.
            head: what is ingested and how, as JSON; must be that of the half-done ingest.
            shard_bytes: of a shard.

        Raises:
            ContentError: `out` exists.
            OccupiedError: another process is at it.
            RecipeError: the half-done ingest was begun with other options or another source.
            StorageError: the folder cannot be written.
        """
        refuse_existing(out)
        self._out, self._folder = out, out.with_name(f".{out.name}.partial")
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._folder)
        try:
            refuse_existing(out)  # the one who held the lock may just have published
            told = self._go_on(head)
            entries = [line["shard"] for line in told.shards]
            last = told.shards[-1] if told.shards else {}
            self.position = Position(*last.get("position", (0, 0)))
            self.counts: Json | None = last.get("counts")
            self._writer = ShardWriter(self._folder / _ARRIVING, shard_bytes, entries)
            self._finished = len(entries)
        except BaseException:
            self._lock.close()
            raise

    @property
    def folder(self) -> Path:
        """Where the shards lie until they are published."""
        return self._folder / _SHARDS

    @property
    def finished(self) -> int:
        """Shards that a kill would not lose."""
        return self._finished

    def write(self, document: Document, position: Position, counts: Callable[[], Json]) -> None:
        """Append a document.

        Args:
            document: the next one.
            position: of its record.
            counts: gives those of all records before it.

        Raises:
            ContentError: it is malformed.
            StorageError: writing failed.
        """
        self._writer.append(document)
        if len(self._writer.shards) == self._finished:
            return
        entry = self._writer.shards[-1]
        with storage_errors(self._folder):
            self._arrive(entry["raw_data"]["basename"])
            line = {"shard": entry, "position": [position.file, position.records]}
            with (self._folder / _JOURNAL).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"counts": counts()}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._finished += 1

    def finish(self) -> Path:
        """Write the last shard and the index; returns their folder, still unpublished."""
        self._writer.finish()
        with storage_errors(self._folder):
            for path in sorted((self._folder / _ARRIVING).iterdir()):
                self._arrive(path.name)
        assert (self.folder / INDEX).is_file()
        return self.folder

    def publish(self) -> None:
        """Give the folder its name, and take the rest away."""
        with storage_errors(self._out):
            publish(self.folder, self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock; a half-done ingest without a finished shard goes."""
        self._writer.cancel()
        if not self._finished:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _arrive(self, name: str) -> None:
        sync(self._folder / _ARRIVING / name)
        os.replace(self._folder / _ARRIVING / name, self.folder / name)
        sync(self.folder)

    def _go_on(self, head: Mapping[str, Any]) -> _Told:
        """Read the journal, and take away what it does not tell."""
        told = _read(self._folder / _JOURNAL)
        if told.shards and (problems := _changes(self._folder, told.head, head)):
            raise RecipeError(problems)
        kept = {line["shard"]["raw_data"]["basename"] for line in told.shards}
        with storage_errors(self._folder):
            for name in (_SHARDS, _ARRIVING):
                (self._folder / name).mkdir(exist_ok=True)
                for path in (self._folder / name).iterdir():
                    if name == _ARRIVING or path.name not in kept:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            _write(self._folder / _JOURNAL, [dict(head), *told.shards])
        return told


def _lock(folder: Path) -> Any:
    with storage_errors(folder):
        handle = (folder / _LOCK).open("a+")
    if not try_lock(handle, "start one ingest only"):
        handle.close()
        raise OccupiedError(
            f"{folder}: another process ingests into it; wait for it or end it, or name another OUT"
        )
    return handle


def _read(path: Path) -> _Told:
    """The journal up to a line that a kill has torn, or a shard that is not there whole."""
    told = _Told()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return told
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
            if not number:
                told.head = dict(value)
                continue
            info = value["shard"]["raw_data"]
            shard = path.with_name(_SHARDS) / info["basename"]
            if not shard.is_file() or shard.stat().st_size != info["bytes"]:
                break
        except (ValueError, KeyError, TypeError):
            break
        told.shards.append(value)
    return told


def _write(path: Path, lines: Sequence[Json]) -> None:
    arriving = path.with_name(f"{path.name}.arriving")
    with arriving.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(arriving, path)
    sync(path.parent)


def _changes(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    """A fault for every option and file that is not what it was."""
    then, now = _flat(old), _flat(json.loads(json.dumps(new)))
    return [
        Problem(
            key,
            f"{_shown(now, key)} now, {_shown(then, key)} when {folder} was begun; start it as it "
            "was begun to go on, or remove that folder to begin anew",
        )
        for key in sorted({*then, *now})
        if then.get(key, ...) != now.get(key, ...)
    ]


def _shown(found: Mapping[str, Any], key: str) -> str:
    return json.dumps(found[key]) if key in found else "not there"


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their flags, files by their names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "options":
            flat |= {f"--{name.replace('_', '-')}": given for name, given in value.items()}
        elif isinstance(value, list):
            for entry in value:
                told = {name: what for name, what in entry.items() if name != "name"}
                flat[f"{key} {entry['name']}"] = told
        else:
            flat[key] = value
    return flat
