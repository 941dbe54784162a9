"""Safetensors files written one tensor at a time, from sizes known before any number is.

`safetensors.torch.save_file` wants every tensor of a file at once, and copies it; here the header
is written first and memory holds one tensor. Format: eight bytes of length, a JSON header, then the
tensors one after another (huggingface.co/docs/safetensors).
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


def write_bytes(handle: BinaryIO, tensor: Tensor) -> memoryview:
    """Write a tensor's numbers; returns them as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
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
