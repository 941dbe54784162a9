"""A checkpoint cut for another layout, without any rank running; memory holds one piece at a time.

Training reads a checkpoint of any layout by itself. Cut beforehand, each rank reads one file of its
own, which pays when many ranks share a slow file system.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import FileEntry, Manifest, WeightEntry, describe_file
from mmtrain.checkpoint.pieces import MEAN, WEIGHT, Pieces, Place, key_of
from mmtrain.checkpoint.tensorfile import TensorInfo, write_tensors
from mmtrain.errors import ContentError, StorageError
from mmtrain.layout.dims import ParallelDims
from mmtrain.layout.plan import Slice


@dataclass(frozen=True)
class _Piece:
    """What one rank will hold."""

    kind: str
    name: str
    place: Place
    info: TensorInfo


def reshape(folder: Path, root: Path, dims: ParallelDims, stages: Mapping[str, int]) -> Path:
    """Write a committed checkpoint again, cut for another layout.

    Args:
        folder: the checkpoint; its files are verified first.
        root: `checkpoints` folder of the run that gets the new one.
        dims: the layout.
        stages: pipeline stage of every parameter in it.

    Returns:
        The new committed folder.

    Raises:
        ContentError, MissingError: the checkpoint is damaged.
        StorageError: the new one exists already, or cannot be written.
    """
    for fault in store.faults(folder):
        raise fault
    manifest = Manifest.read(folder)
    if unknown := manifest.weights.keys() ^ stages.keys():
        raise ContentError(f"{folder}: not of this model: {sorted(unknown)[:5]}")
    final = store.folder_of(root, manifest.step)
    if final.exists():
        raise StorageError(f"{final}: is there already; name another folder")
    source = Pieces(folder, manifest)
    partial = store.begin(root, manifest.step)
    files = dict(_write(source, partial, rank, dims, stages) for rank in range(dims.world_size))
    weights = {
        name: WeightEntry(entry.shape, entry.dim, stages[name])
        for name, entry in manifest.weights.items()
    }
    return store.commit(root, replace(manifest, dims=dims, weights=weights, files=files))


def _write(
    source: Pieces, partial: Path, rank: int, dims: ParallelDims, stages: Mapping[str, int]
) -> tuple[str, FileEntry]:
    pieces = {key_of(p.kind, p.name, p.place.start): p for p in _pieces(source, rank, dims, stages)}
    path = partial / store.rank_file(rank)

    def get(key: str) -> Tensor:
        piece = pieces[key]
        return source.read(piece.kind, piece.name, piece.place)

    try:
        write_tensors(path, {key: piece.info for key, piece in pieces.items()}, get)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error
    return path.name, describe_file(path)


def _pieces(
    source: Pieces, rank: int, dims: ParallelDims, stages: Mapping[str, int]
) -> Iterator[_Piece]:
    """What a rank holds: its part of every slice that ZeRO cuts, its turn of the others."""
    stage, data, tensor = dims.coord(rank)
    for turn, (name, entry) in enumerate(sorted(source.manifest.weights.items())):
        if stages[name] != stage or (tensor and entry.dim is None):
            continue
        shape = list(entry.shape)
        if entry.dim is not None:
            cut = Slice(entry.dim, padded=True)
            shape[entry.dim] = cut.local_length(shape[entry.dim], dims.tensor)
        numbers = math.prod(shape)
        for kind in source.kinds_of(name):
            least = 3 if kind in (WEIGHT, MEAN) else 1  # ZeRO stage that cuts it
            if dims.zero_stage >= least:
                share = -(-numbers // dims.data)
                start, stop = min(data * share, numbers), min((data + 1) * share, numbers)
            else:
                start, stop = 0, numbers if turn % dims.data == data else 0
            if stop > start:
                info = TensorInfo((stop - start,), source.info(kind, name).dtype)
                yield _Piece(kind, name, Place(tensor, dims.tensor, start, stop), info)
