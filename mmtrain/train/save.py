"""Saving and restoring a running engine, bit for bit on the same layout.

Every rank writes its own weights, DeepSpeed's float32 masters and the optimizer's moments. No
random state is needed: batches and initial weights are pure functions of the recipe, and
dropout is one of the document and the position (`nn.noise`).
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain import __version__
from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, WeightEntry
from mmtrain.checkpoint.portable import MEAN, WEIGHT
from mmtrain.errors import ContentError
from mmtrain.layout.plan import TensorPlan
from mmtrain.parallel.build import canonical_parameters
from mmtrain.train.ema import Ema, local_part
from mmtrain.train.engine import Engine
from mmtrain.train.state import TrainState

log = logging.getLogger(__name__)


def _masters(optimizer: Any) -> tuple[list[Tensor], bool]:
    """The tensors the inner optimizer updates, in a fixed order; whether they are copies."""
    for attribute in (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # bf16 without ZeRO
    ):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute)), True
    return [p for group in optimizer.param_groups for p in group["params"]], False


def _weights(engine: Engine) -> dict[str, Tensor]:
    named = canonical_parameters(engine.named_layers())
    return {WEIGHT + name: local_part(parameter) for name, parameter in named}


def _means(ema: Ema | None) -> dict[str, Tensor]:
    return {} if ema is None else {MEAN + name: mean for name, mean in ema.means.items()}


def _optimizer_state(engine: Engine) -> dict[str, Tensor]:
    optimizer = engine.deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    out: dict[str, Tensor] = {}
    masters, copies = _masters(optimizer)
    for number, master in enumerate(masters):
        if copies:  # else the weights themselves, saved by name
            out[f"master/{number}"] = master.data
        for key, value in inner.state[master].items():
            out[f"moment/{number}/{key}"] = torch.as_tensor(value)
    return out


def save(
    engine: Engine,
    ema: Ema | None,
    state: TrainState,
    root: Path,
    keep: int,
    plan: TensorPlan,
    shapes: dict[str, tuple[int, ...]],
    recipe_hash: str,
) -> Path:
    """Commit a checkpoint of the current step; a collective over all ranks.

    Args:
        engine: what is saved.
        ema: running means of its weights, saved too; None = there are none.
        state: progress of the run.
        root: the run's `checkpoints` folder.
        keep: newest checkpoints kept.
        plan: the family's tensor plan.
        shapes: full shape of every parameter of the model.
        recipe_hash: of the resolved recipe.
    """
    mesh = engine.mesh
    if mesh.rank == 0:
        store.begin(root, state.step)
    mesh.barrier()
    partial = store.folder_of(root, state.step).with_suffix(".partial")
    tensors = _optimizer_state(engine)
    weights = _weights(engine)
    if mesh.data == 0 or mesh.dims.zero_stage == 3:
        tensors.update(weights | _means(ema))
    entry = store.write_part(partial, mesh.rank, tensors)
    entries = {}
    for key in weights:
        name = key.removeprefix(WEIGHT)
        cut = plan.slice_of(name)
        entries[name] = WeightEntry(shapes[name], cut.dim if cut else None, mesh.pipeline)
    gathered: list[Any] = [None] * mesh.dims.world_size
    dist.all_gather_object(gathered, (entry, entries))
    if mesh.rank == 0:
        manifest = Manifest(
            step=state.step,
            dims=mesh.dims,
            state=asdict(state),
            recipe_hash=recipe_hash,
            code_version=__version__,
            weights={name: e for _, part in gathered for name, e in part.items()},
            averaged=tuple(ema.means) if ema is not None else (),
            files=dict(file for file, _ in gathered),
        )
        store.commit(root, manifest)
        store.retain(root, keep)
    mesh.barrier()
    return store.folder_of(root, state.step)


def restore(engine: Engine, ema: Ema | None, folder: Path) -> TrainState:
    """Load a checkpoint of the same layout into the engine; exact to the bit.

    Raises:
        ContentError: another layout wrote it, or a tensor is missing or of another shape.
    """
    mesh, manifest = engine.mesh, Manifest.read(folder)
    if manifest.dims != mesh.dims:
        raise ContentError(
            f"{folder}: written by {manifest.dims}, this run has {mesh.dims}; start with the "
            "layout it was written by, or begin a new run from its weights with "
            f"train.initialize_from={folder}"
        )
    saved = store.read_part(folder, mesh.rank, manifest)
    owner = mesh.rank
    if mesh.data != 0 and mesh.dims.zero_stage != 3:
        owner = mesh.dims.rank((mesh.pipeline, 0, mesh.tensor))
        twin = store.read_part(folder, owner, manifest)
        saved.update({key: t for key, t in twin.items() if key.startswith((WEIGHT, MEAN))})
    with torch.no_grad():
        for key, held in _weights(engine).items():
            _copy(saved, key, held, folder)
        if ema is not None:
            _restore_means(saved, ema, manifest, folder)
        optimizer = engine.deepspeed.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        masters, copies = _masters(optimizer)
        for number, master in enumerate(masters):
            if copies:
                _copy(saved, f"master/{number}", master.data, folder)
            prefix = f"moment/{number}/"
            inner.state[master] = {
                key.removeprefix(prefix): _place(tensor, master)
                for key, tensor in saved.items()
                if key.startswith(prefix)
            }
    return TrainState(**manifest.state)


def _restore_means(saved: dict[str, Tensor], ema: Ema, manifest: Manifest, folder: Path) -> None:
    """Running means; a run that keeps them from now on begins with the weights as they are."""
    if not manifest.averaged:
        log.info("%s holds no running means of the weights; they begin at its weights", folder)
    for name, mean in ema.means.items():
        key = (MEAN if manifest.averaged else WEIGHT) + name
        _copy(saved, key, mean, folder)


def _place(tensor: Tensor, master: Tensor) -> Tensor:
    """Moments live beside their master; torch keeps the step count on the host."""
    return tensor if tensor.dim() == 0 and not master.is_cuda else tensor.to(master.device)


def _copy(saved: dict[str, Tensor], key: str, into: Tensor, folder: Path) -> None:
    found = saved.get(key)
    if found is None or found.shape != into.shape:
        shape = None if found is None else tuple(found.shape)
        raise ContentError(
            f"{folder}: {key} has shape {shape}, this run needs {tuple(into.shape)}; the model or "
            "the optimizer groups of the recipe have changed since it was written"
        )
    into.copy_(found)
