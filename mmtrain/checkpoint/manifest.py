"""What a checkpoint folder says of itself; written last, trusted only when complete.

`manifest.json` names the step, the layout, every weight with its full shape and cut, and every
file with its size and SHA-256.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import ContentError, MissingError
from mmtrain.layout.dims import ParallelDims
from mmtrain.paths import inside

NAME = "manifest.json"
VERSION = 2  # 1 kept the optimizer by rank: it could go on with its own layout only


@dataclass(frozen=True)
class WeightEntry:
    """One full tensor: its shape, the dim the tensor ranks split (or None), its stage."""

    shape: tuple[int, ...]
    dim: int | None
    stage: int


@dataclass(frozen=True)
class FileEntry:
    """One file of the checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `manifest.json`."""

    step: int
    dims: ParallelDims
    state: dict[str, Any]  # TrainState as plain numbers
    recipe_hash: str
    code_version: str
    weights: dict[str, WeightEntry]
    files: dict[str, FileEntry]
    optimizer_steps: int = 0  # that the optimizer has counted; its states are kept if above 0
    averaged: tuple[str, ...] = ()  # weights whose running mean is kept too
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write `manifest.json` (not synced; the store does that)."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a committed checkpoint's manifest.

        Raises:
            MissingError: there is none.
            ContentError: it is not a manifest this version can read, or names files elsewhere.
        """
        path = folder / NAME
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise MissingError(
                f"{path}: not found; {folder} is not a committed checkpoint"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ContentError(
                f"{path}: not JSON ({error}); use an earlier checkpoint of the run"
            ) from error
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != VERSION:
            raise ContentError(
                f"{path}: format version {version}, this code reads {VERSION}; read it with the "
                "code that wrote it (`mmtrain convert` there, train.initialize_from here)"
            )
        try:
            manifest = cls._of(raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ContentError(
                f"{path}: damaged ({error!r}); use an earlier checkpoint of the run"
            ) from error
        for name in manifest.files:
            inside(folder, name, path)
        return manifest

    @classmethod
    def _of(cls, raw: dict[str, Any]) -> "Manifest":
        raw["dims"] = ParallelDims(**raw["dims"])
        raw["weights"] = {
            name: WeightEntry(tuple(entry["shape"]), entry["dim"], entry["stage"])
            for name, entry in raw["weights"].items()
        }
        raw["averaged"] = tuple(raw.get("averaged", ()))
        raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        return cls(**raw)


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file on disk."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def sampled_hash(paths: Iterable[Path]) -> str:
    """Hex hash of names, sizes and parts of files: tells big weights apart without reading all."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as handle:
            for part in range(_SAMPLES):
                handle.seek(part * size // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()
