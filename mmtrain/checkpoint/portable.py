"""Full tensors by canonical name, whatever layout wrote them.

Reads the rank files of a checkpoint and merges tensor slices and ZeRO-3 partitions, one tensor at
a time; or reads a folder of exported full tensors. Exports have the layout of Hugging Face
folders: `model-0000k-of-n.safetensors` and `model.safetensors.index.json`. Beside them
`mmtrain.json` says what they are, and `dropped.safetensors` may keep what a release holds and no
model uses.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, sampled_hash
from mmtrain.checkpoint.pieces import MEAN, WEIGHT, Pieces, opened
from mmtrain.checkpoint.tensorfile import INDEX, TensorInfo, write_sharded
from mmtrain.errors import ContentError, MissingError, StorageError
from mmtrain.paths import inside

DESCRIPTION = "mmtrain.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a folder of full tensors is (`mmtrain.json`).

    Attributes:
        kind: what is in it, as in `emu`, `llama`, `eva`, `lora`, `unet`.
        model: the `model:` section it fits, as far as it is known.
        lora: `rank`, `alpha` and `targets` of the adapters, or None without any.
        foreign: what the way back needs, such as a diffusers configuration.
    """

    kind: str
    model: dict[str, Any]
    lora: dict[str, Any] | None = None
    foreign: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write `mmtrain.json`."""
        (folder / DESCRIPTION).write_text(self.text())

    def text(self) -> str:
        """The file's content."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Description | None":
        """Read a folder's description, None when it has none (exports before version 1).

        Raises:
            ContentError: it is not one this version can read.
        """
        path = folder / DESCRIPTION
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_text())
            version = raw.pop("version")
            if version != VERSION:
                raise ContentError(f"{path}: version {version}, this code reads {VERSION}")
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ContentError(f"{path}: not a description of weights ({error!r})") from error


class FullTensors(Protocol):
    """A source of full tensors."""

    def names(self) -> list[str]:
        """Canonical names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""

    def info(self, name: str) -> TensorInfo:
        """Full shape and number type of a tensor."""

    def get(self, name: str) -> Tensor:
        """The full tensor."""


class CheckpointTensors:
    """Full tensors of a committed checkpoint of any layout."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest and verify every file."""
        self.folder = folder
        self.manifest = Manifest.read(folder)
        for name in self.manifest.files:
            store.verify_file(folder, name, self.manifest)
        self._pieces = Pieces(folder, self.manifest)

    def names(self) -> list[str]:
        """Canonical names, sorted."""
        return sorted(self.manifest.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self.manifest.weights[name].shape

    def info(self, name: str) -> TensorInfo:
        """Full shape and number type of a tensor."""
        return self._pieces.info(self._kind(name), name)

    def get(self, name: str) -> Tensor:
        """Merge one tensor from the rank files that hold it."""
        return self._pieces.full(self._kind(name), name)

    def _kind(self, name: str) -> str:
        """What is read of a parameter."""
        return WEIGHT


class AveragedTensors(CheckpointTensors):
    """Running means of a checkpoint's weights; the weights themselves where none is kept."""

    def _kind(self, name: str) -> str:
        return MEAN if name in self._averaged else WEIGHT

    @cached_property
    def _averaged(self) -> frozenset[str]:
        return frozenset(self.manifest.averaged)


class ExportedTensors:
    """Full tensors of an export folder."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            MissingError: the folder has no index.
            ContentError: the index is not one, or names files elsewhere.
        """
        self.folder = folder
        try:
            files = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        except FileNotFoundError as error:
            raise MissingError(
                f"{folder / INDEX}: not found; expected a folder written by `mmtrain convert`"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ContentError(f"{folder / INDEX}: not a weight index ({error!r})") from error
        self._files = {name: inside(folder, file, folder / INDEX) for name, file in files.items()}

    def names(self) -> list[str]:
        """Canonical names, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self.info(name).shape

    def info(self, name: str) -> TensorInfo:
        """Full shape and number type of a tensor."""
        return opened(self._files[name]).infos[name]

    def get(self, name: str) -> Tensor:
        """The full tensor."""
        return opened(self._files[name]).get(name)


def open_tensors(path: Path) -> FullTensors:
    """Full tensors of a run folder (newest checkpoint), a checkpoint or an export folder.

    Raises:
        MissingError: nothing of the kind is there.
    """
    return _open(path, CheckpointTensors)


def open_averaged(path: Path) -> FullTensors:
    """As `open_tensors`, but running means (`train.ema`) of the weights where a run keeps them."""
    return _open(path, AveragedTensors)


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint that `open_tensors` reads of a run or a checkpoint; None for an export."""
    if (path / INDEX).exists():
        return None
    if (path / "manifest.json").exists():
        return path
    found = store.committed(path / "checkpoints")
    if found:
        return found[-1]
    raise MissingError(
        f"{path}: holds no weights; expected a run folder with a committed checkpoint, a "
        f"checkpoint (manifest.json) or an export ({INDEX})"
    )


def trained_checkpoint(path: Path, name: str | None) -> Path:
    """A committed checkpoint with everything that training goes on from.

    Args:
        path: a run, or a checkpoint of one.
        name: as in `step-00000100`; None = the newest, or `path` itself.

    Raises:
        MissingError: there is none, or none of this name.
        ContentError: the folder is an export.
    """
    checkpoint = checkpoint_of(path)
    if checkpoint is None:
        raise ContentError(f"{path}: an export; it has no optimizer and no layout")
    if name is None:
        return checkpoint
    named = checkpoint.with_name(name)
    if named not in store.committed(checkpoint.parent):
        raise MissingError(f"{named}: no committed checkpoint of {path}")
    return named


def identity(path: Path) -> str:
    """Hex hash by which the weights that `open_tensors` reads are told from others."""
    checkpoint = checkpoint_of(path)
    if checkpoint is not None:  # its manifest holds the hash of every file
        return sampled_hash([checkpoint / "manifest.json"])
    return sampled_hash(sorted([path / INDEX, *path.glob("*.safetensors")]))


def _open(path: Path, kind: type[CheckpointTensors]) -> FullTensors:
    checkpoint = checkpoint_of(path)
    return ExportedTensors(path) if checkpoint is None else kind(checkpoint)


def export(
    tensors: FullTensors,
    out: Path,
    description: Description | None = None,
    limit_bytes: int = 4 << 30,
) -> list[Path]:
    """Write full tensors as safetensors shards and an index; memory holds one tensor.

    Raises:
        StorageError: `out` exists already, or cannot be written.
    """
    infos = {name: tensors.info(name) for name in tensors.names()}
    with new_folder(out) as partial:
        names = write_sharded(partial, infos, tensors.get, limit_bytes)
        if description is not None:
            description.write(partial)
    return [out / name for name in names]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well.

    Raises:
        StorageError: `out` exists and is not empty, or cannot be written.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise StorageError(f"{out}: is there already; name a new folder, nothing was overwritten")
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists():  # left by a conversion that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
