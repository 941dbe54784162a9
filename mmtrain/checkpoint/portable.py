"""Full tensors by canonical name, whatever layout wrote them.

Reads the rank files of a checkpoint and merges tensor slices and ZeRO-3 partitions, one tensor at
a time; or reads a folder of exported full tensors. Exports have the layout of Hugging Face
folders: `model-0000k-of-n.safetensors` and `model.safetensors.index.json`.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest
from mmtrain.errors import ContentError, MissingError, StorageError
from mmtrain.layout.plan import Slice

WEIGHT = "weight/"  # prefix of weights in a rank file
_INDEX = "model.safetensors.index.json"


class FullTensors(Protocol):
    """A source of full tensors."""

    def names(self) -> list[str]:
        """Canonical names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""

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

    def names(self) -> list[str]:
        """Canonical names, sorted."""
        return sorted(self.manifest.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self.manifest.weights[name].shape

    def get(self, name: str) -> Tensor:
        """Merge one tensor from the rank files that hold it."""
        entry, dims = self.manifest.weights[name], self.manifest.dims
        parts = [
            self._tensor_slice(name, entry.stage, tensor)
            for tensor in range(dims.tensor if entry.dim is not None else 1)
        ]
        if entry.dim is None:
            return parts[0]
        return torch.cat(parts, entry.dim).narrow(entry.dim, 0, entry.shape[entry.dim])

    def _tensor_slice(self, name: str, stage: int, tensor: int) -> Tensor:
        entry, dims = self.manifest.weights[name], self.manifest.dims
        holders = range(dims.data if dims.zero_stage == 3 else 1)
        shards: list[Tensor] = []
        for data in holders:
            path = self.folder / store.rank_file(dims.rank((stage, data, tensor)))
            shards.append(_read(path, WEIGHT + name))
        if dims.zero_stage != 3:
            return shards[0]
        shape = list(entry.shape)
        if entry.dim is not None:
            length = shape[entry.dim]
            shape[entry.dim] = Slice(entry.dim, True).local_length(length, dims.tensor)
        flat = torch.cat([shard.flatten() for shard in shards])
        return flat[: math.prod(shape)].view(shape)


class ExportedTensors:
    """Full tensors of an export folder."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            MissingError: the folder has no index.
            ContentError: the index is not JSON.
        """
        self.folder = folder
        try:
            self._files: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        except FileNotFoundError as error:
            raise MissingError(
                f"{folder / _INDEX}: not found; expected a folder written by `mmtrain convert`"
            ) from error
        except (ValueError, KeyError) as error:
            raise ContentError(f"{folder / _INDEX}: not a weight index ({error!r})") from error

    def names(self) -> list[str]:
        """Canonical names, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """The full tensor."""
        return _read(self.folder / self._files[name], name)


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def open_tensors(path: Path) -> FullTensors:
    """Full tensors of a run folder (newest checkpoint), a checkpoint or an export folder.

    Raises:
        MissingError: nothing of the kind is there.
    """
    if (path / _INDEX).exists():
        return ExportedTensors(path)
    if (path / "manifest.json").exists():
        return CheckpointTensors(path)
    found = store.committed(path / "checkpoints")
    if found:
        return CheckpointTensors(found[-1])
    raise MissingError(
        f"{path}: holds no weights; expected a run folder with a committed checkpoint, a "
        f"checkpoint (manifest.json) or an export ({_INDEX})"
    )


def _shards(tensors: FullTensors, limit_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name in tensors.names():
        tensor = tensors.get(name)
        if shard and size + tensor.nbytes > limit_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def export(tensors: FullTensors, out: Path, limit_bytes: int = 4 << 30) -> list[Path]:
    """Write full tensors as safetensors shards and an index; memory stays near one shard.

    Raises:
        StorageError: `out` exists already, or cannot be written.
    """
    if out.exists() and any(out.iterdir()):
        raise StorageError(f"{out}: is not empty; name a new folder, nothing was overwritten")
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        files, members = [], []
        for number, shard in enumerate(_shards(tensors, limit_bytes)):
            files.append(partial / f"shard-{number}.safetensors")
            members.append(list(shard))
            save_file(shard, files[-1])
        names = [
            f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
            for number in range(len(files))
        ]
        for file, name in zip(files, names, strict=True):
            file.rename(partial / name)
        index = {
            "weight_map": {
                tensor: name for name, group in zip(names, members, strict=True) for tensor in group
            }
        }
        (partial / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error}") from error
    return [out / name for name in names]
