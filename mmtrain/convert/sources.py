"""Other people's weights, read one tensor at a time.

A source is a file or a folder: safetensors (one file, or shards and their index) or torch's own
files (`mmtrain.convert.pickles`). Opening looks at headers alone, and everything that can be found
wrong without reading numbers is found there: cut-off files, shards that are missing, indexes that
promise what no shard holds.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtrain.checkpoint.tensorfile import DamagedFileError, TensorFile, TensorInfo
from mmtrain.convert.pickles import SUFFIXES, read_pickle
from mmtrain.errors import ContentError, MissingError
from mmtrain.paths import inside

# what a folder's weights may be called, in the order they are looked for
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")


@dataclass(frozen=True)
class Source:
    """Named tensors on disk.

    Attributes:
        path: file or folder.
        infos: shape and number type of every tensor.
        files: file that holds each tensor.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    files: Mapping[str, Path]
    _get: Callable[[str], Tensor] = field(repr=False)

    def get(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ContentError: its numbers cannot be read.
        """
        try:
            return self._get(name)
        except (DamagedFileError, OSError) as error:
            raise ContentError(f"{self.files[name]}: {name} cannot be read: {error}") from error

    def renamed(self, rename: Callable[[str], str]) -> "Source":
        """The same tensors under other names.

        Raises:
            ContentError: two tensors would get one name.
        """
        old: dict[str, str] = {}
        for name in self.infos:
            new = rename(name)
            if new in old:
                raise ContentError(f"{self.path}: {old[new]} and {name} are both {new}; keep one")
            old[new] = name
        return Source(
            self.path,
            {new: self.infos[name] for new, name in old.items()},
            {new: self.files[name] for new, name in old.items()},
            lambda new: self.get(old[new]),
        )


def open_source(path: Path, stems: Sequence[str] = STEMS) -> Source:
    """Open a weight file, or the weights of a folder.

    Args:
        path: file or folder.
        stems: what the weights of a folder may be called.

    Raises:
        MissingError: nothing is there, or shards of an index are not.
        ContentError: a file is damaged or wants to run code; an index and its shards differ.
    """
    if path.is_file():
        return open_index(path) if path.name.endswith(".index.json") else open_file(path)
    if not path.is_dir():
        raise MissingError(f"{path}: not found; expected a weight file or a folder with one")
    for stem in stems:
        for name in (f"{stem}.safetensors", f"{stem}.bin", f"{stem}.fp16.safetensors"):
            index = path / f"{name}.index.json"
            if index.is_file():
                return open_index(index)
            if (path / name).is_file():
                return open_file(path / name)
    here = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
    wanted = " or ".join(f"{stem}.safetensors / .bin" for stem in stems)
    raise MissingError(f"{path}: no weights; expected {wanted} (or its .index.json); found {here}")


def open_file(path: Path) -> Source:
    """Open one weight file; its suffix says of which kind."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in SUFFIXES:
        stored = read_pickle(path)
        infos = {name: part.info for name, part in stored.items()}
        return Source(path, infos, dict.fromkeys(infos, path), lambda name: stored[name].read())
    allowed = ", ".join((".safetensors", *SUFFIXES))
    raise ContentError(f"{path}: unknown kind of weight file; expected {allowed}")


def _open_safetensors(path: Path) -> Source:
    try:
        file = TensorFile.open(path)
    except DamagedFileError as error:
        raise ContentError(
            f"{path}: {path.stat().st_size:,} bytes, not a whole safetensors file ({error}); it is "
            "cut off or damaged: copy it again and compare its size"
        ) from error
    return Source(path, file.infos, dict.fromkeys(file.infos, path), file.get)


def open_index(index: Path) -> Source:
    """Open shards by their index."""
    try:
        held: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ContentError(f"{index}: not a weight index ({error!r})") from error
    for name in held.values():
        inside(index.parent, name, index, links=True)
    names = sorted(set(held.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise MissingError(
            f"{index.parent}: {len(absent)} of {len(names)} shards are missing: "
            f"{', '.join(absent[:6])}; {index.name} names them, copy them beside it"
        )
    shards = {name: open_file(index.parent / name) for name in names}
    lost = [f"{name} (in {held[name]})" for name in held if name not in shards[held[name]].infos]
    if lost:
        raise ContentError(f"{index}: names tensors that are not there: {', '.join(lost[:6])}")
    stray = [n for file, s in shards.items() for n in s.infos if held.get(n) != file]
    if stray:
        raise ContentError(f"{index}: shards hold tensors it does not name: {', '.join(stray[:6])}")
    return Source(
        index.parent,
        {name: shards[file].infos[name] for name, file in held.items()},
        {name: index.parent / file for name, file in held.items()},
        lambda name: shards[held[name]].get(name),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside weights.

    Raises:
        MissingError: the file is not there.
        ContentError: it is no JSON object.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise MissingError(f"{path}: not found; the folder needs it beside its weights") from error
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ContentError(f"{path}: holds a {type(found).__name__}; expected a JSON object")
    return found
