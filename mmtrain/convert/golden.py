"""Round trips of a golden folder's releases: to full tensors and back, on disk, to the bit."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mmtrain.convert.canonical import open_canonical
from mmtrain.convert.kinds import EXPORTS, IMPORTS, Options, convert
from mmtrain.convert.sources import open_file
from mmtrain.convert.writing import SHARD_BYTES
from mmtrain.models.emu.golden import Comparison

_RELEASES = {"emu": "weights.safetensors", "emu-instruct": "instruct_weights.safetensors"}


def round_trips(folder: Path) -> Iterator[Comparison]:
    """How many tensors of each release come back changed, from each kind of file."""
    for kind, name in _RELEASES.items():
        for suffix in (".safetensors", ".bin"):
            with tempfile.TemporaryDirectory() as scratch:
                changed, count = _round_trip(folder / name, kind, Path(scratch), suffix)
            quantity = f"{kind}: release -> full tensors -> {suffix} ({count} tensors)"
            yield Comparison(quantity, float(changed), 0.0)


def _round_trip(release: Path, kind: str, scratch: Path, suffix: str) -> tuple[int, int]:
    full, out = scratch / "full", scratch / f"back{suffix}"
    come, go = IMPORTS[kind], EXPORTS[kind]
    convert(come.plan(release, Options()), come.form, "", full, None, SHARD_BYTES)
    convert(go.plan(open_canonical(full), Options()), go.form, go.name, out, None, SHARD_BYTES)
    was, now = open_file(release), open_file(out)
    names = was.infos.keys() | now.infos.keys()
    changed = [
        name
        for name in names
        if was.infos.get(name) != now.infos.get(name)
        or not torch.equal(was.get(name), now.get(name))
    ]
    return len(changed), len(was.infos)
