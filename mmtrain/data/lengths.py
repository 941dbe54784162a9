"""The length index: what a plan must know of every document, without opening media.

For a named tokenizer: sample id, kind, and for each part its modality, its size (tokens of a
text, images of a picture or clip), its matched text, its time, and whether it is an answer or
markup of a conversation. Stored next to the shards as plain arrays that are memory-mapped, so a
source of any size costs nothing at start.

D documents   S parts of all documents
"""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from streaming.base.hashing import get_hash

from mmtrain.data.document import DocumentLengths, Modality, PartLength
from mmtrain.data.fetch import HASH, ExpectedFile, Folder
from mmtrain.errors import ContentError, MissingError

FORMAT = 2  # of the stored arrays; 1 knew no conversations and had no `flags`
MANIFEST = "manifest.json"
LEFT_OUT = "left out: "  # begins the kind of documents that cannot be used; the reason ends it
_MODALITIES = (Modality.text, Modality.image, Modality.video)  # code = position
_ARRAYS = ("ids", "kinds", "offsets", "modalities", "sizes", "matches", "times", "flags")
_ANSWER, _MARKUP = 1, 2  # bits of a flag


@dataclass(frozen=True)
class Lengths:
    """Lengths of all documents of a source.

    Attributes:
        fingerprint: of the tokenizer that counted.
        dataset: hash of the shards' `index.json`.
        shard_sizes: documents of each shard, in order.
        kind_names: what the codes of `arrays["kinds"]` mean.
        arrays: `ids` S-bytes [D], `kinds` u2 [D], `offsets` i8 [D + 1], and of each part
            `modalities` u1 [S], `sizes` i4 [S], `matches` i4 [S] (-1: none), `times` f8 [S] (NaN),
            `flags` u1 [S].
    """

    fingerprint: str
    dataset: str
    shard_sizes: tuple[int, ...]
    kind_names: tuple[str, ...]
    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        """Documents."""
        return len(self.arrays["ids"])

    @property
    def left_out(self) -> dict[str, int]:
        """Documents that cannot be used, by reason; they have no parts here."""
        counts = np.bincount(self.arrays["kinds"], minlength=len(self.kind_names)).tolist()
        return {
            name.removeprefix(LEFT_OUT): count
            for name, count in zip(self.kind_names, counts, strict=True)
            if name.startswith(LEFT_OUT)
        }

    def document(self, number: int) -> DocumentLengths:
        """Lengths of the document `number` (its place in the shards)."""
        arrays = self.arrays
        start, stop = int(arrays["offsets"][number]), int(arrays["offsets"][number + 1])
        parts = tuple(
            PartLength(
                _MODALITIES[modality],
                size,
                None if match < 0 else match,
                None if time != time else time,  # NaN
                bool(flag & _ANSWER),
                bool(flag & _MARKUP),
            )
            for modality, size, match, time, flag in zip(
                arrays["modalities"][start:stop].tolist(),
                arrays["sizes"][start:stop].tolist(),
                arrays["matches"][start:stop].tolist(),
                arrays["times"][start:stop].tolist(),
                arrays["flags"][start:stop].tolist(),
                strict=True,
            )
        )
        sample_id = bytes(arrays["ids"][number]).decode()
        return DocumentLengths(sample_id, self.kind_names[int(arrays["kinds"][number])], parts)


def collect(
    documents: Iterable[DocumentLengths],
    *,
    fingerprint: str,
    dataset: str,
    shard_sizes: Sequence[int],
) -> Lengths:
    """Lengths as arrays; `documents` in stored order, consumed one by one."""
    ids: list[bytes] = []
    kinds: dict[str, int] = {}  # by first appearance
    codes, counts = array("H"), array("q", [0])
    modalities, sizes, matches, times = array("B"), array("i"), array("i"), array("d")
    flags = array("B")
    for document in documents:
        ids.append(document.sample_id.encode())
        codes.append(kinds.setdefault(document.kind, len(kinds)))
        counts.append(len(document.parts))
        for part in document.parts:
            modalities.append(_MODALITIES.index(part.modality))
            sizes.append(part.size)
            matches.append(-1 if part.match is None else part.match)
            times.append(float("nan") if part.time is None else part.time)
            flags.append(_ANSWER * part.answer | _MARKUP * part.markup)
    assert sum(shard_sizes) == len(ids), (sum(shard_sizes), len(ids))
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.array(ids, dtype=f"S{max(map(len, ids), default=1)}"),
        "kinds": np.array(codes, np.uint16),
        "offsets": np.cumsum(np.array(counts, np.int64)),
        "modalities": np.array(modalities, np.uint8),
        "sizes": np.array(sizes, np.int32),
        "matches": np.array(matches, np.int32),
        "times": np.array(times, np.float64),
        "flags": np.array(flags, np.uint8),
    }
    return Lengths(fingerprint, dataset, tuple(shard_sizes), tuple(kinds), arrays)


def folder_name(fingerprint: str) -> str:
    """Name of the index folder of a tokenizer, inside the folder of the shards."""
    return f"lengths-{fingerprint[:16]}"


def save(lengths: Lengths, folder: Path) -> None:
    """Write arrays, then the manifest, into an empty `folder`."""
    for name, values in lengths.arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    manifest = {
        "format": FORMAT,
        "tokenizer": lengths.fingerprint,
        "dataset": lengths.dataset,
        "documents": len(lengths),
        "shard_sizes": list(lengths.shard_sizes),
        "kinds": list(lengths.kind_names),
        "files": {f"{name}.npy": _record(folder / f"{name}.npy") for name in _ARRAYS},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _record(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), HASH: get_hash(HASH, content)}


def _expected(name: str, record: dict[str, Any]) -> ExpectedFile:
    return ExpectedFile(f"{name}.npy", int(record["bytes"]), {HASH: str(record[HASH])})


def load(folder: Folder, *, fingerprint: str, dataset: str, advice: str) -> Lengths:
    """Map an index written by `save`, fetched when its folder is remote.

    Args:
        folder: where the index is or is fetched to.
        fingerprint: of the tokenizer that is in use.
        dataset: hash of the shards' `index.json`.
        advice: how to make the index anew, for messages.

    Raises:
        MissingError: there is no index.
        ContentError: it counts another tokenizer or other shards, or its files are damaged.
    """
    try:
        path = folder.ensure(ExpectedFile(MANIFEST))
    except MissingError as error:
        raise MissingError(f"{error}: no length index for this tokenizer; {advice}") from error
    try:
        manifest = json.loads(path.read_text())
        found = (manifest["format"], manifest["tokenizer"], manifest["dataset"])
        stored = [name for name in _ARRAYS if f"{name}.npy" in manifest["files"]]
        records = {name: _expected(name, manifest["files"][f"{name}.npy"]) for name in stored}
        sizes = tuple(int(size) for size in manifest["shard_sizes"])
        kinds = tuple(str(kind) for kind in manifest["kinds"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ContentError(f"{path} is damaged ({error!r}); {advice}") from error
    names = ("index format", "tokenizer fingerprint", "hash of index.json")
    wanted = (FORMAT, fingerprint, dataset)
    for name, has, wants in zip(names, found, wanted, strict=True):
        if has != wants and (name, has) != (names[0], 1):
            raise ContentError(f"{path.parent} is stale: {name} {has}, expected {wants}; {advice}")
    if lacking := set(_ARRAYS if found[0] == FORMAT else _ARRAYS[:-1]) - set(records):
        raise ContentError(f"{path} is damaged (it names no {sorted(lacking)}); {advice}")
    arrays = {}
    for name, expected in records.items():
        try:
            path = folder.ensure(expected)
        except ContentError as error:
            raise ContentError(f"{error}; {advice}") from error
        # small arrays are read whole: a run may outlive the folder it was started from
        mapping: Literal["r"] | None = "r" if (expected.size_bytes or 0) > 1 << 20 else None
        try:
            arrays[name] = np.load(path, mmap_mode=mapping, allow_pickle=False)
        except (ValueError, EOFError) as error:  # Python objects are pickles, and refused
            raise ContentError(f"{path} is no array of numbers ({error}); {advice}") from error
    if "flags" not in arrays:
        arrays["flags"] = np.zeros(len(arrays["modalities"]), np.uint8)
    codes = arrays["kinds"]
    if sum(sizes) != len(codes) or (len(codes) and int(codes.max()) >= len(kinds)):
        raise ContentError(f"{folder.local / MANIFEST} is damaged (other documents); {advice}")
    return Lengths(fingerprint, dataset, sizes, kinds, arrays)
