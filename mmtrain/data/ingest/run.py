"""From what people have to shards: `mmtrain data ingest`.

Source files in one order are cut into records, workers make documents of them, one writer puts
those into shards. The folder depends on the source and the options alone: not on the number of
workers, nor on kills in between (`journal`). Broken records are left out, counted by reason, the
first ones shown with a line each; too many, and nothing is published, since wrong folders and
wrong formats break every record, and a data set that lost a third in silence is worse than none.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from mmtrain import __version__
from mmtrain.data.document import Document
from mmtrain.data.folders import refuse_existing, storage_errors
from mmtrain.data.ingest import files
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile
from mmtrain.data.ingest.journal import Partial, Position
from mmtrain.data.ingest.kind import IngestOptions, Kind, Raw
from mmtrain.data.ingest.kinds import KINDS
from mmtrain.data.ingest.progress import Progress
from mmtrain.data.ingest.report import Counts, Report, token_facts
from mmtrain.data.ingest.workers import ordered_map
from mmtrain.data.shards import build_index, load_lengths, open_shards
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import ContentError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1  # of the journal and the manifest
_SHOWN = 20  # faults shown a line each; the others are counted
_LARGEST = 1 << 30  # bytes of a document's pictures; shards count them in 32 bits
_HOPELESS = 1000  # broken records without a sound one before an ingest gives up
_ALWAYS = ("max_side", "reencode", "shard_bytes")  # options of every kind


@dataclass(frozen=True, kw_only=True)
class Work:
    """How an ingest is done; none of it changes a document.

    Attributes:
        workers: processes that make documents.
        max_failures: share of broken records beyond which nothing is published.
        tokenizer: folder; the lengths are counted with it when given.
    """

    workers: int = 1
    max_failures: float = 0.05
    tokenizer: Path | None = None


class _Task(NamedTuple):
    """A record on its way to a worker."""

    position: Position
    raw: Raw


class _Outcome(NamedTuple):
    """What a worker made of it."""

    task: _Task  # its content left behind
    document: Document | None
    noted: dict[str, int]
    dropped: Dropped | None


def ingest(name: str, source: Path, out: Path, options: IngestOptions, work: Work) -> Report:
    """Write a source as a dataset folder.

    Args:
        name: a key of `KINDS`.
        source: a file, a folder or a glob.
        out: folder to make; must not exist.
        options: how records become documents.
        work: how it is done.

    Raises:
        MissingError: the source, the tokenizer or a library is not there.
        ContentError: the source is of another kind, or too much of it is broken; `out` exists.
        RecipeError: a half-done ingest into `out` was begun with other options.
        StorageError: writing failed; the same command goes on.
    """
    refuse_existing(out)
    vocabulary = None if work.tokenizer is None else load_vocabulary(work.tokenizer)
    kind = KINDS[name](source, options)
    found = kind.files()
    kind.media.prepare()
    kind.prepare(found, vocabulary)
    recipe = _recipe(name, kind, found)
    head = {"format": FORMAT, **recipe}
    head["modified"] = [{"name": file.name, "ns": files.modified(file)} for file in found]
    partial = Partial(out, head, options.shard_bytes)
    try:
        counts = _write(kind, found, partial, work)
        report = _publish(kind.label, partial, out, counts, recipe, vocabulary, work.workers)
    finally:
        partial.close()
    return report


def _recipe(name: str, kind: Kind, found: tuple[SourceFile, ...]) -> dict[str, Any]:
    """What decides about every byte of the shards."""
    taken = {*_ALWAYS, *kind.options}
    given = {
        field.name: getattr(kind.given, field.name)
        for field in fields(IngestOptions)
        if field.name in taken
    }
    if given.get("images") is not None:
        given["images"] = str(given["images"])
    recipe = {
        "kind": name,
        "source": str(kind.source),
        "mmtrain": __version__,
        "pillow": PIL.__version__,  # encodes what is made smaller
        "options": given,
        "files": [files.fingerprint(file) for file in found],
    }
    system = Path(kind.given.system)
    if "system" in taken and system.is_file():
        recipe["system"] = [files.fingerprint(SourceFile(system, system.name))]
    if kind.media.tars:
        recipe["images"] = [files.fingerprint(file) for file in kind.media.tars]
    return recipe


def _write(kind: Kind, found: tuple[SourceFile, ...], partial: Partial, work: Work) -> Counts:
    """Write all documents from the partial's position on."""
    counts = Counts() if partial.counts is None else Counts.from_json(partial.counts)
    begun = partial.position
    if partial.finished:
        log.info(
            "goes on behind %d finished shards, at record %d of %s",
            partial.finished,
            begun.records + 1,
            found[begun.file].path,
        )

    def made(task: _Task) -> _Outcome:
        return _made(kind, found[task.position.file], task)

    results = ordered_map(made, _tasks(kind, found, begun), work.workers)
    with Progress(counts) as progress, closing(results) as outcomes:
        for outcome in outcomes:
            position = outcome.task.position
            if outcome.document is not None:
                partial.write(outcome.document, position, counts.to_json)
                counts.keep(outcome.document, outcome.noted)
            elif outcome.dropped is not None:
                counts.drop(outcome.dropped.reason)
                _tell(kind, found[position.file], outcome, counts)
            progress.passed(counts)
    _judge(kind, counts, partial, work.max_failures)
    return counts


def _tasks(kind: Kind, found: tuple[SourceFile, ...], begun: Position) -> Iterator[_Task]:
    """Records of all files; one of several files that stops being readable is one broken record."""
    for number in range(begun.file, len(found)):
        done = begun.records if number == begun.file else 0
        try:
            for raw in kind.records(found[number], done):
                yield _Task(Position(number, raw.number - 1), raw)
                done = raw.number
        except ContentError as error:
            if len(found) == 1:
                raise
            fault = Dropped(Reason.cut, str(error))
            yield _Task(Position(number, done), Raw(done + 1, None, fault=fault))


def _made(kind: Kind, file: SourceFile, task: _Task) -> _Outcome:
    raw = task.raw
    told = _Task(task.position, Raw(raw.number, None, raw.name))
    try:
        if raw.fault is not None:
            raise raw.fault
        made = kind.document(file, raw)
        document = Document(
            sample_id=f"{file.name}-{raw.number:08d}",
            kind=made.kind,
            parts=tuple(made.parts),
            meta=_sound(made.meta),
        )
        size = sum(len(blob) for part in document.parts for blob in part.media)
        if size > _LARGEST:
            raise Dropped(Reason.large, f"{size:,} bytes of pictures, {_LARGEST:,} are allowed")
    except Dropped as dropped:
        return _Outcome(told, None, {}, dropped)
    return _Outcome(told, document, dict(made.noted), None)


def _sound(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without halves of characters, which names and addresses of others may hold."""
    text = json.dumps(meta, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        found: dict[str, Any] = json.loads(text.encode("utf-8", "replace"))
        return found
    return meta


def _tell(kind: Kind, file: SourceFile, outcome: _Outcome, counts: Counts) -> None:
    dropped = outcome.dropped
    assert dropped is not None
    if not dropped.reason.by_rule:
        raw = outcome.task.raw
        if counts.broken <= _SHOWN:
            own = f" (id {raw.name})" if raw.name else ""
            text = f"{file.path} record {raw.number}{own} left out: {dropped}"
            log.warning("%s", text.encode("utf-8", "backslashreplace").decode())
        if counts.broken == _SHOWN:
            log.warning("further broken records are counted, not shown")
    if counts.broken == counts.records == _HOPELESS:
        raise _none_is_sound(kind, counts)


def _judge(kind: Kind, counts: Counts, partial: Partial, max_failures: float) -> None:
    if not counts.records:
        raise ContentError(f"{kind.source} holds no record")
    if not counts.documents:
        raise _none_is_sound(kind, counts)
    if counts.broken > max_failures * counts.records:
        way = (
            "start the same command with a higher --max-failures, it goes on"
            if partial.finished
            else "repair them, or raise --max-failures"
        )
        raise ContentError(
            f"{kind.source}: {counts.broken:,} of {counts.records:,} records are broken as "
            f"{kind.label} ({counts.reasons}), allowed is a share of {max_failures}; nothing was "
            f"published: {way}"
        )


def _none_is_sound(kind: Kind, counts: Counts) -> ContentError:
    return ContentError(
        f"{kind.source}: all of the {counts.records:,} records read are left out as {kind.label} "
        f"({counts.reasons}); nothing was published. {kind.advice}"
    )


def _publish(
    label: str,
    partial: Partial,
    out: Path,
    counts: Counts,
    recipe: dict[str, Any],
    vocabulary: Vocabulary | None,
    workers: int,
) -> Report:
    """The index, the lengths and the manifest; then the folder gets its name."""
    folder = partial.finish()
    tokens = None
    if vocabulary is not None:
        build_index(folder, vocabulary, lambda count, numbers: ordered_map(count, numbers, workers))
        tokens = token_facts(load_lengths(open_shards(folder), vocabulary))
    manifest = {"format": FORMAT, "counts": counts.to_json(), "text": tokens, "recipe": recipe}
    with storage_errors(folder):
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        shards = sorted(folder.glob("*.mds"))
        size = sum(path.stat().st_size for path in shards)
    partial.publish()
    found = None if tokens is None else int(tokens["tokens"])
    return Report(out, label, counts, len(shards), size, found)
