"""Safetensors files read and written one tensor at a time.

`safetensors.torch.save_file` wants every tensor of a file at once, and copies it; here the header
is written first and memory holds one tensor. `safe_open` maps the whole file, privately: a file
larger than the memory of the machine is refused by the kernel ("Cannot allocate memory" for a
release of 28 GB on 24 GB); here each tensor is read by its place. Format: eight bytes of length, a
JSON header, then the tensors one after another (huggingface.co/docs/safetensors).
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, as safetensors' own readers allow


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __str__(self) -> str:
        """As in `32000x5120 bf16`."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{shape} {_NAMES.get(self.dtype, str(self.dtype)).lower()}"


def info_of(tensor: Tensor) -> TensorInfo:
    """Shape and number type."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


class DamagedFileError(ValueError):
    """A file that is cut off, or not of its format."""


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file.

    Attributes:
        path: the file.
        infos: shape and number type of every tensor.
        places: first byte of each in the file.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    places: Mapping[str, int]

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Read the header, and hold it against the size of the file.

        Raises:
            DamagedFileError: the file is cut off, too long, or no safetensors file.
            OSError: it cannot be read.
        """
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise DamagedFileError(f"it ends inside its header of {length:,} bytes")
            if length > MAX_HEADER:
                raise DamagedFileError(
                    f"its header claims {length:,} bytes, the format allows {MAX_HEADER:,}"
                )
            text = handle.read(length)
        infos, places, spans = {}, {}, [(0, 0)]
        try:
            entries = json.loads(text)
            for name, entry in entries.items():
                if name == "__metadata__":
                    continue
                infos[name] = TensorInfo(_numbers(entry["shape"]), DTYPES[entry["dtype"]])
                first, last = _numbers(entry["data_offsets"])
                if last - first != infos[name].bytes:
                    raise DamagedFileError(f"{name} ({infos[name]}) has {last - first:,} bytes")
                places[name] = 8 + length + first
                spans.append((first, last))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, DamagedFileError):
                raise
            raise DamagedFileError(f"its header cannot be read: {error!r}"[:200]) from error
        spans.sort()
        for (_, end), (begin, _) in pairwise(spans):
            if begin != end:
                raise DamagedFileError(f"its tensors overlap or leave a gap at byte {begin:,}")
        end = spans[-1][1]
        if size != 8 + length + end:
            raise DamagedFileError(f"its header asks for {8 + length + end:,} bytes")
        return cls(path, infos, places)

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        shape = self.infos[name].shape
        return self.get_numbers(name, 0, math.prod(shape)).view(shape)

    def get_numbers(self, name: str, start: int, stop: int) -> Tensor:
        """Read numbers `[start, stop)` of one flattened tensor."""
        dtype = self.infos[name].dtype
        place = self.places[name] + start * dtype.itemsize
        return read_bytes(self.path, place, (stop - start) * dtype.itemsize).view(dtype)


def _numbers(values: Any) -> tuple[int, ...]:
    """Sizes or places that a header holds."""
    if any(type(value) is not int or not 0 <= value < 1 << 63 for value in values):
        raise ValueError(f"found {values!r} where sizes belong")
    return tuple(values)


def read_bytes(path: Path, place: int, count: int) -> Tensor:
    """`count` bytes of a file from `place` on, as a tensor of its own.

    Raises:
        DamagedFileError: the file ends before.
    """
    with path.open("rb", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        if place + count > size:  # told before memory is taken for what is not there
            raise DamagedFileError(f"{path}: ends at byte {size:,}, wanted is {place + count:,}")
        out = torch.empty(count, dtype=torch.uint8)
        handle.seek(place)
        view: memoryview = out.numpy().data
        done = 0
        while done < count:
            step = handle.readinto(view[done:])
            if not step:
                raise DamagedFileError(f"{path}: ends at byte {place + done:,}")
            done += step
    return out


def write_bytes(handle: BinaryIO, tensor: Tensor) -> memoryview:
    """Write a tensor's numbers; returns them as bytes."""
    whole = tensor.detach().cpu().contiguous()
    # a dim of length 1 may have any stride in a contiguous tensor, and bytes want 1
    flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
    content: memoryview = flat.numpy().data
    handle.write(content)
    return content


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], get: Callable[[str], Tensor]
) -> None:
    """Write and sync one file.

    Args:
        path: file to make.
        infos: what it will hold.
        get: gives a tensor; it must be as announced.
    """
    # wide numbers first: readers view bytes in place, which must stay aligned
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    place = 0
    for name in order:
        info = infos[name]
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [place, place + info.bytes],
        }
        place += info.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = get(name)
            assert info_of(tensor) == infos[name], (name, info_of(tensor), infos[name])
            write_bytes(handle, tensor)
        handle.flush()
        os.fsync(handle.fileno())


def shards(infos: Mapping[str, TensorInfo], limit_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut so that no group of several exceeds the limit."""
    group: list[str] = []
    size = 0
    for name, info in infos.items():
        if group and size + info.bytes > limit_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += info.bytes
    yield group


def write_sharded(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    get: Callable[[str], Tensor],
    limit_bytes: int,
) -> list[str]:
    """Write `model-0000k-of-n.safetensors` and their index into a folder; returns file names."""
    groups = list(shards(infos, limit_bytes))
    names, weight_map = [], {}
    for number, group in enumerate(groups, start=1):
        names.append(f"model-{number:05d}-of-{len(groups):05d}.safetensors")
        write_tensors(folder / names[-1], {name: infos[name] for name in group}, get)
        weight_map.update(dict.fromkeys(group, names[-1]))
    total = sum(info.bytes for info in infos.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return names
