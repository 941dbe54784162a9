"""Numbers of a checkpoint by kind, parameter and place, whatever layout wrote them.

A rank file holds pieces: consecutive numbers of one tensor rank's slice of one parameter, flattened
row by row. A reader asks for any run of numbers of any rank's slice in its own layout, and gets it
from the pieces that overlap it; tensor, pipeline, data ranks and ZeRO stage may all differ. Memory
holds what is asked for, and at most the source slices that overlap it.

    weight/blocks.0.mlp.up.weight                    the whole slice
    moment.exp_avg/blocks.0.mlp.up.weight@4096       from its 4,096th number on
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, WeightEntry
from mmtrain.checkpoint.tensorfile import DamagedFileError, TensorFile, TensorInfo
from mmtrain.errors import ContentError, MissingError
from mmtrain.layout.plan import Slice

WEIGHT = "weight"  # as the model computes with it
MEAN = "ema"  # running mean, float32
MASTER = "master"  # float32 weight of the optimizer; only where the model's is of another type
MOMENT = "moment."  # prefix: a state of the optimizer by its own name


@dataclass(frozen=True)
class Place:
    """Numbers `[start, stop)` of the flattened slice of tensor rank `tensor` of `ranks`."""

    tensor: int
    ranks: int
    start: int
    stop: int


def key_of(kind: str, name: str, start: int = 0) -> str:
    """Name of a piece in a rank file."""
    return f"{kind}/{name}@{start}" if start else f"{kind}/{name}"


@dataclass(frozen=True)
class _Run:
    """Where a rank file holds numbers `[start, stop)` of a slice."""

    start: int
    stop: int
    file: TensorFile
    key: str


class Pieces:
    """Reads the pieces of one committed checkpoint; files are opened when needed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Nothing is read or verified yet."""
        self.folder, self.manifest = folder, manifest
        self._slices: dict[tuple[int, int], dict[tuple[str, str], list[_Run]]] = {}

    def has(self, kind: str, name: str) -> bool:
        """Whether any numbers of this kind are kept for a parameter."""
        return bool(self._runs(kind, name, 0))

    def kinds_of(self, name: str) -> list[str]:
        """What is kept for a parameter, sorted."""
        stage = self.manifest.weights[name].stage
        return sorted({kind for kind, kept in self._slice(stage, 0) if kept == name})

    def info(self, kind: str, name: str) -> TensorInfo:
        """Full shape, and number type as kept.

        Raises:
            ContentError: nothing of this kind is kept for the parameter.
        """
        entry, runs = self.manifest.weights[name], self._runs(kind, name, 0)
        if not runs:
            raise ContentError(f"{self.folder}: holds no {kind} of {name}")
        return TensorInfo(entry.shape, runs[0].file.infos[runs[0].key].dtype)

    def full(self, kind: str, name: str) -> Tensor:
        """The full tensor."""
        shape = self.manifest.weights[name].shape
        return self.read(kind, name, Place(0, 1, 0, math.prod(shape))).view(shape)

    def read(self, kind: str, name: str, place: Place) -> Tensor:
        """Numbers of one rank's slice, flat.

        Args:
            kind: as in `WEIGHT`.
            name: canonical name of the parameter.
            place: which numbers, in the layout that asks.

        Raises:
            ContentError: the files do not hold them all, or one is damaged.
            MissingError: a file is not there.
        """
        entry = self.manifest.weights[name]
        if entry.dim is None:
            return self._consecutive(kind, name, 0, place.start, place.stop)
        length, inner = entry.shape[entry.dim], math.prod(entry.shape[entry.dim + 1 :])
        source = _local_length(length, self.manifest.dims.tensor)
        target = _local_length(length, place.ranks)
        # whole rows of the dims before the cut that hold the wanted numbers
        first, last = place.start // (target * inner), -(-place.stop // (target * inner))
        low, high = place.tensor * target, min((place.tensor + 1) * target, length)
        out = torch.zeros(last - first, target, inner, dtype=self.info(kind, name).dtype)
        for rank in range(low // source, -(-high // source) if high > low else 0):
            row = source * inner
            block = self._consecutive(kind, name, rank, first * row, last * row)
            a, b = max(low, rank * source), min(high, (rank + 1) * source)
            kept = block.view(last - first, source, inner)
            out[:, a - low : b - low] = kept[:, a - rank * source : b - rank * source]
        skipped = first * target * inner
        return out.flatten()[place.start - skipped : place.stop - skipped]

    def _consecutive(self, kind: str, name: str, tensor: int, start: int, stop: int) -> Tensor:
        """Numbers of a source slice, from the pieces that hold them."""
        runs = self._runs(kind, name, tensor)
        parts, at = [], start
        number = max(0, bisect_right(runs, start, key=lambda run: run.start) - 1)
        for run in runs[number:]:
            if at >= stop or run.start > at:
                break
            if run.stop > at:
                end = min(stop, run.stop)
                parts.append(_read(run, at - run.start, end - run.start))
                at = end
        if at < stop:
            raise ContentError(
                f"{self.folder}: {kind} of {name}: numbers {at} to {stop} of tensor rank "
                f"{tensor}'s slice are in no file; use an earlier checkpoint of the run"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _runs(self, kind: str, name: str, tensor: int) -> list[_Run]:
        entry: WeightEntry = self.manifest.weights[name]
        return self._slice(entry.stage, tensor).get((kind, name), [])

    def _slice(self, stage: int, tensor: int) -> dict[tuple[str, str], list[_Run]]:
        """Every piece of one stage's tensor rank, over its data ranks."""
        if (stage, tensor) not in self._slices:
            found: dict[tuple[str, str], list[_Run]] = {}
            dims = self.manifest.dims
            for data in range(dims.data):
                path = self.folder / store.rank_file(dims.rank((stage, data, tensor)))
                file = opened(path)
                for key, info in file.infos.items():
                    kind, _, rest = key.partition("/")
                    name, _, start = rest.partition("@")
                    begin = int(start or 0)
                    run = _Run(begin, begin + math.prod(info.shape), file, key)
                    found.setdefault((kind, name), []).append(run)
            for runs in found.values():
                runs.sort(key=lambda run: run.start)
            self._slices[stage, tensor] = found
        return self._slices[stage, tensor]


def opened(path: Path) -> TensorFile:
    """The header of one file of a folder.

    Raises:
        MissingError: it is not there.
        ContentError: it is damaged.
    """
    try:
        return TensorFile.open(path)
    except FileNotFoundError as error:
        raise MissingError(
            f"{path}: not found, the files beside it say it is there; copy the whole folder"
        ) from error
    except DamagedFileError as error:
        raise ContentError(
            f"{path}: cut off or damaged ({error}); copy it again, or export the weights again"
        ) from error


def _local_length(length: int, ranks: int) -> int:
    return Slice(0, padded=True).local_length(length, ranks)


def _read(run: _Run, start: int, stop: int) -> Tensor:
    try:
        return run.file.get_numbers(run.key, start, stop)
    except DamagedFileError as error:
        raise ContentError(f"{error}; use an earlier checkpoint of the run") from error
