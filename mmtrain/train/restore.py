"""Loading a checkpoint into an engine of any layout.

Tensor, pipeline, data ranks and ZeRO stage may have changed since it was written: each rank reads
its own part from the pieces that hold it (`checkpoint.pieces`). On the same layout the numbers come
back bit for bit.
"""

import logging
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

import torch

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest
from mmtrain.checkpoint.pieces import MASTER, MEAN, WEIGHT, Pieces, Place
from mmtrain.errors import ContentError, MissingError
from mmtrain.parallel.build import canonical_parameters
from mmtrain.parallel.mesh import Mesh
from mmtrain.train.ema import Ema
from mmtrain.train.engine import Engine
from mmtrain.train.held import Held, held, make_states
from mmtrain.train.state import TrainState

log = logging.getLogger(__name__)


def newest_sound(root: Path, mesh: Mesh) -> Path | None:
    """The newest checkpoint whose every file is what its manifest says; None when there is none.

    A collective: each file is hashed by one rank. Damaged checkpoints are set aside with a warning.

    Raises:
        ContentError: there are checkpoints, and all of them are damaged.
    """
    candidates: list[Path] = mesh.gather(list(reversed(store.committed(root))))[0]
    damaged: dict[Path, str] = {}
    for folder in candidates:
        wrong = [fault for part in mesh.gather(_own_faults(folder, mesh)) for fault in part]
        if not wrong:
            for bad, reason in damaged.items() if mesh.rank == 0 else ():
                store.set_aside(bad, f"damaged, {folder.name} is used: {reason}")
            return folder
        damaged[folder] = wrong[0]
    if not candidates:
        return None
    raise ContentError(
        f"{root}: damaged, with no sound checkpoint to go back to: {'; '.join(damaged.values())}; "
        "bring one back, or name another run to start from nothing"
    )


def _own_faults(folder: Path, mesh: Mesh) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        files = sorted(Manifest.read(folder).files)
    except (ContentError, MissingError, OSError) as error:
        return [str(error)]
    share = files[mesh.rank :: mesh.dims.world_size]
    return [str(fault) for fault in store.faults(folder, share)]


def restore(engine: Engine, ema: Ema | None, folder: Path) -> TrainState:
    """Load a checkpoint of any layout into the engine; exact to the bit on the same one.

    Raises:
        ContentError: the model is another one, or the files do not hold what they should.
    """
    mesh, manifest = engine.mesh, Manifest.read(folder)
    _compare(engine, manifest, folder)
    pieces = Pieces(folder, manifest)
    make_states(engine, manifest.optimizer_steps)
    if manifest.dims != mesh.dims:
        log.info("%s was written by %s; cut for %s", folder, manifest.dims, mesh.dims)
    if ema is not None and not manifest.averaged:
        log.info("%s holds no running means of the weights; they begin at its weights", folder)
    with torch.no_grad():
        for part in held(engine, ema):
            _fill(part, pieces, mesh)
    return state_of(folder)


def state_of(folder: Path) -> TrainState:
    """What a checkpoint knows besides weights.

    Raises:
        ContentError: it knows more than this version does.
    """
    manifest = Manifest.read(folder)
    known = {field.name for field in fields(TrainState)}
    if strange := set(manifest.state) - known:
        raise ContentError(f"{folder}: state {sorted(strange)} is of a newer mmtrain; update it")
    return TrainState(**manifest.state)


def _fill(part: Held, pieces: Pieces, mesh: Mesh) -> None:
    count = part.numbers.numel()
    if not count:
        return
    kind = part.kind
    if not pieces.has(kind, part.name):
        if kind not in (MEAN, MASTER):
            part.numbers.zero_()  # a moment of a parameter that was not trained before
            return
        kind = WEIGHT
    place = Place(mesh.tensor, mesh.dims.tensor, part.start, part.start + count)
    part.numbers.copy_(pieces.read(kind, part.name, place))


def _compare(engine: Engine, manifest: Manifest, folder: Path) -> None:
    """Parameters of this rank against those of a checkpoint.

    Raises:
        ContentError: names or full shapes differ.
    """
    mesh, layers = engine.mesh, list(engine.named_layers())
    named = dict(canonical_parameters(layers))
    mine = tuple(f"{layer}." for layer, _ in layers)
    faults = [
        f"{name}: not in the model"
        for name in manifest.weights
        if name.startswith(mine) and name not in named
    ]
    for name, parameter in named.items():
        entry = manifest.weights.get(name)
        if entry is None:
            like = get_close_matches(name, manifest.weights, 1)
            hint = f", which has {like[0]}" if like else ""
            faults.append(f"{name}: not in the checkpoint{hint}")
            continue
        shape = list(entry.shape)
        if entry.dim is not None:
            shape[entry.dim] = -(-shape[entry.dim] // mesh.dims.tensor)
        found = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if found != tuple(shape):
            faults.append(f"{name}: {tuple(shape)} in the checkpoint, {found} in the model")
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ContentError(
            f"{folder}: another model wrote it; the recipe's model section must be what it was "
            "(or name a new run, and begin from these weights with train.initialize_from):\n"
            + "\n".join(faults[:10])
            + more
        )
