"""torch's own weight files (`.bin`, `.pt`, `.pth`): read without running code, written as a stream.

A pickle can run any program while it is opened, so it is opened with `weights_only`, which allows
tensors and plain containers alone. It is opened in `FakeTensorMode`: what comes out are shapes and
the places of the numbers in the file, from which each tensor is read when it is asked for. (torch's
own `mmap=True` maps the whole file privately, which the kernel refuses for files larger than the
machine's memory.)

Writing: `torch.save` wants the whole state dict in memory. Here it writes the frame of the file for
tensors without numbers (`torch.serialization.skip_data`), then the numbers are put into their
places, and the archive's check sums corrected. Memory holds one tensor.
"""

import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmtrain.checkpoint.tensorfile import TensorInfo, info_of, read_bytes, write_bytes
from mmtrain.errors import ContentError

log = logging.getLogger(__name__)

SUFFIXES = (".bin", ".pt", ".pth")
_WRAPPERS = ("module", "model", "state_dict")  # DeepSpeed, OpenCLIP and Lightning put weights there
_PREFIX = "module."  # DistributedDataParallel names everything behind it
_REFUSED = re.compile(r"GLOBAL ([\w.]+\w)|unrecognized function (\S+)|but got (<class \S+>)")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what is known of it, and how it is read."""

    info: TensorInfo
    read: Callable[[], Tensor]


def read_pickle(path: Path) -> dict[str, Stored]:
    """Tensors of a file by name, wrappers taken off.

    Raises:
        ContentError: the file wants to run code, is damaged, or holds no state dict.
    """
    found = _unwrapped(load_frame(path))
    if not isinstance(found, Mapping):
        raise ContentError(
            f"{path}: holds a {type(found).__name__}; expected a state dict (name to tensor), bare "
            f"or below one of {', '.join(_WRAPPERS)}"
        )
    others = {str(k): type(v).__name__ for k, v in found.items() if not isinstance(v, Tensor)}
    if others or not found:
        shown = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:4])
        raise ContentError(
            f"{path}: not a state dict: {shown or 'it is empty'}; expected tensors by name, bare "
            f"or below one of {', '.join(_WRAPPERS)}"
        )
    if all(name.startswith(_PREFIX) for name in found):
        found = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
    return {name: stored(path, tensor) for name, tensor in found.items()}


def stored(path: Path, tensor: Tensor) -> Stored:
    """A tensor of `load_frame`, to be read when it is asked for."""
    info = info_of(tensor)
    if not isinstance(tensor, FakeTensor):
        return Stored(info, lambda: tensor)
    stride, width = tensor.stride(), info.dtype.itemsize
    steps = zip(info.shape, stride, strict=True)
    span = 1 + sum((length - 1) * step for length, step in steps) if tensor.numel() else 0
    begin: Any = tensor.untyped_storage()._checkpoint_offset
    place = int(begin) + int(tensor.storage_offset()) * width
    if not 0 <= place <= place + span * width <= path.stat().st_size:
        raise ContentError(f"{path}: a tensor of {info} lies outside of the file; it is forged")

    def read() -> Tensor:
        flat = read_bytes(path, place, span * width).view(info.dtype)
        return flat.as_strided(info.shape, stride) if span else flat.view(info.shape)

    return Stored(info, read)


def load_frame(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """What a file holds, its tensors without numbers.

    Args:
        path: the file.
        stand_ins: our own classes in the place of others that a file names, as in
            `(Nothing, "deepspeed.runtime.zero.config.ZeroStageEnum")`: theirs are not called.

    Raises:
        ContentError: the file wants to run code, or is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            _refuse_packed(path)
            with FakeTensorMode(), torch.serialization.safe_globals(list(stand_ins)):
                return torch.load(path, map_location="cpu", weights_only=True)
        # files of torch before 1.6 do not say where their numbers are
        log.info("%s: no zip archive; the whole file is read to memory", path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (wanted := _wanted_code(str(error))) is not None:
            raise ContentError(
                f"{path}: refused, nothing was run or written: opening it would call {wanted}, and "
                "weights need no code. Ask its author for safetensors, or open it on a machine "
                "without anything to lose and save the tensors alone: "
                "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
            ) from error
        raise ContentError(_damaged(path, error)) from error
    except OSError as error:
        raise ContentError(f"{path}: cannot be read: {error}") from error
    except ContentError:
        raise
    except Exception as error:  # damaged pickles raise whatever Python does at that place
        raise ContentError(_damaged(path, error)) from error


def _refuse_packed(path: Path) -> None:
    """Numbers are read at their places, so none may be packed; a bomb would be, torch's never."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or unpacked > path.stat().st_size:
        raise ContentError(
            f"{path}: {path.stat().st_size:,} bytes that unpack to {unpacked:,}; torch never "
            "compresses weights, so it was not opened. Save them again with torch.save"
        )


def _wanted_code(message: str) -> str | None:
    """What a refused pickle asked for, from torch's message; None when it is damaged."""
    hit = _REFUSED.search(message)
    return next(filter(None, hit.groups())) if hit else None


def _damaged(path: Path, error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:120]
    if not first or first.startswith("Weights only load failed"):
        first = type(error).__name__
    return (
        f"{path}: {path.stat().st_size:,} bytes, cannot be read as torch weights ({first}); the "
        "file is cut off, damaged or no weight file: copy it again and compare its size"
    )


def _unwrapped(found: Any) -> Any:
    """Take off wrapper after wrapper, as long as there is one and no tensor beside it."""
    while isinstance(found, Mapping) and not any(isinstance(v, Tensor) for v in found.values()):
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            return found
        found = inner
    return found


def write_pickle(path: Path, infos: Mapping[str, TensorInfo], get: Callable[[str], Tensor]) -> None:
    """Write a state dict as `torch.save` does, one tensor at a time.

    Args:
        path: file to make.
        infos: what it will hold.
        get: gives a tensor; it must be as announced.
    """
    with FakeTensorMode():
        frame = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(frame, path)
    with FakeTensorMode():
        placed = torch.load(path, weights_only=True)
    sums: dict[int, int] = {}
    with path.open("r+b") as handle:
        for name, info in infos.items():
            place = int(placed[name].untyped_storage()._checkpoint_offset)
            tensor = get(name)
            assert info_of(tensor) == info, (name, info_of(tensor), info)
            handle.seek(place)
            content = write_bytes(handle, tensor)
            sums[place] = zlib.crc32(content)
    _correct_sums(path, sums)


_LOCAL, _CENTRAL = 30, 46  # bytes of a zip's fixed headers, before the names


def _correct_sums(path: Path, sums: Mapping[int, int]) -> None:
    """Put the check sums of the members whose data begin at given places into the archive."""
    with zipfile.ZipFile(path) as archive:
        members, entry = archive.infolist(), archive.start_dir
    with path.open("r+b") as handle:
        for member in members:
            handle.seek(member.header_offset)
            head = handle.read(_LOCAL)
            data = member.header_offset + _LOCAL + _short(head, 26) + _short(head, 28)
            handle.seek(entry)
            record = handle.read(_CENTRAL)
            if (value := sums.get(data)) is not None and member.file_size:
                crc = value.to_bytes(4, "little")
                described = bool(member.flag_bits & 8)  # the sum follows the data, signature first
                local = data + member.file_size + 4 if described else member.header_offset + 14
                for place in (local, entry + 16):
                    handle.seek(place)
                    handle.write(crc)
            entry += _CENTRAL + sum(_short(record, place) for place in (28, 30, 32))
        handle.flush()
        os.fsync(handle.fileno())


def _short(record: bytes, place: int) -> int:
    return int.from_bytes(record[place : place + 2], "little")
