"""DeepSpeed's universal checkpoints back in; `convert.universal` says what lies in them.

Everything is looked at before anything is written: headers, shapes, check sums and steps, and all
faults are told at once. Pickles are opened as `convert.pickles` does: no code of theirs is run.
"""

import logging
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain import __version__
from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest, WeightEntry, describe_file
from mmtrain.checkpoint.pieces import MASTER, MEAN, MOMENT, WEIGHT, key_of
from mmtrain.checkpoint.tensorfile import DamagedFileError, TensorInfo, write_tensors
from mmtrain.convert.pickles import Stored, load_frame, stored
from mmtrain.convert.universal import (
    EMA,
    FILLER,
    FP32,
    LATEST,
    MODEL_STATES,
    MOMENTS,
    OPTIMIZER,
    OURS,
    STEP,
    ZERO,
    Model,
    spellings,
)
from mmtrain.errors import ContentError, MissingError, MmtrainError, StorageError
from mmtrain.layout.dims import ParallelDims

log = logging.getLogger(__name__)

_SHOWN = 10  # faults that are printed


class _Nothing:
    """Stands for an object of DeepSpeed's in optimizer_state.pt, which is not looked at."""

    def __init__(self, *values: object) -> None: ...


_STAND_INS: Sequence[tuple[type, str]] = [
    (_Nothing, f"deepspeed.runtime.{name}")
    for name in (
        "fp16.loss_scaler.LossScaler",
        "fp16.loss_scaler.DynamicLossScaler",
        "zero.config.ZeroStageEnum",
    )
]


@dataclass(frozen=True, kw_only=True)
class _Ours:
    """What `write` has added to the model states; empty for folders of others."""

    state: dict[str, Any]
    averaged: frozenset[str] = frozenset()
    still: frozenset[str] = frozenset()  # parameters without moments


@dataclass
class _Found:
    """What a folder holds, by (kind of ours, canonical name)."""

    tensors: dict[tuple[str, str], Stored] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def read(source: Path, root: Path, model: Model, recipe_hash: str, step: int | None = None) -> Path:
    """Write a universal checkpoint as a committed checkpoint of ours, cut for one rank.

    Args:
        source: folder that holds `latest_universal`, or the one that it names.
        root: `checkpoints` folder of the run that gets it.
        model: the run's model.
        recipe_hash: of the run's recipe.
        step: of the run; None = as the folder says.

    Returns:
        The committed folder.

    Raises:
        ContentError: files are damaged, want to run code or are of another model; all are named.
        MissingError: there is no such folder, or it does not say its step.
        StorageError: the run has this step or a later one, or cannot be written.
    """
    folder = _tagged(source)
    ours = _ours(folder, step)
    found = _Found()
    _look_at_zero(folder, model, ours, found)
    _look_at_means(folder, model, ours, found)
    if not found.steps and not found.faults:
        found.steps |= _common_steps(folder)
    if len(found.steps) > 1:
        found.faults.append(
            f"parameters have made different numbers of steps: {sorted(found.steps)}"
        )
    _refuse(folder, found.faults)
    later = [path for path in store.committed(root) if store.step_of(path) >= ours.state["step"]]
    if later:
        raise StorageError(
            f"{later[-1]}: is there already, and training would go on from it instead of step "
            f"{ours.state['step']}; name the folder of a new run, nothing was overwritten"
        )
    manifest = Manifest(
        step=ours.state["step"],
        dims=ParallelDims(zero_stage=0),
        state=dict(ours.state),
        recipe_hash=recipe_hash,
        code_version=__version__,
        weights={name: _entry(name, shape, model) for name, shape in model.shapes.items()},
        files={},
        optimizer_steps=max(found.steps, default=0),
        averaged=tuple(sorted(ours.averaged)),
    )
    return _commit(root, manifest, found, model)


def _entry(name: str, shape: tuple[int, ...], model: Model) -> WeightEntry:
    cut = model.plan.slice_of(name)
    return WeightEntry(shape, cut.dim if cut else None, 0)


def _commit(root: Path, manifest: Manifest, found: _Found, model: Model) -> Path:
    """Write the one file of the checkpoint, and commit it."""
    sources = {key_of(kind, name): (kind, name) for kind, name in found.tensors}
    infos = {
        key: TensorInfo(model.shapes[name], model.dtype if kind == WEIGHT else torch.float32)
        for key, (kind, name) in sources.items()
    }

    def get(key: str) -> Tensor:
        full = found.tensors[sources[key]].read().view(-1)
        count = infos[key].meta().numel()  # what follows is padding: rows of a vocabulary
        return full[:count].view(infos[key].shape).to(infos[key].dtype)

    path = store.begin(root, manifest.step) / store.rank_file(0)
    try:
        write_tensors(path, infos, get)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error
    except DamagedFileError as error:
        raise ContentError(str(error)) from error
    manifest.files[path.name] = describe_file(path)
    return store.commit(root, manifest)


def _tagged(source: Path) -> Path:
    """The folder that holds `zero/`."""
    if (source / ZERO).is_dir():
        return source
    try:
        tag = (source / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(
            f"{source}: holds neither {ZERO}/ nor {LATEST}; name a universal checkpoint, as "
            "`python -m deepspeed.checkpoint.ds_to_universal` or `universal_checkpoint.py out` "
            "write it"
        ) from error
    if Path(tag).name != tag or not (source / tag / ZERO).is_dir():
        raise MissingError(f"{source / LATEST}: names {tag!r}, which is no folder with {ZERO}/")
    return source / tag


def _ours(folder: Path, step: int | None) -> _Ours:
    """The step, and what `write` has added."""
    path = next((folder / name for name in MODEL_STATES if (folder / name).is_file()), None)
    if path is None:
        if step is None:
            raise MissingError(
                f"{folder / MODEL_STATES[0]}: not found, and it says the step; name it (--step)"
            )
        return _Ours(state={"step": step})
    content = load_frame(path)
    try:
        entry = content.get(OURS, {})
        counts = {str(key): _plain(value) for key, value in entry.get("state", {}).items()}
        counts["step"] = int(content["global_steps"]) if step is None else step
        averaged, still = (frozenset(map(str, entry.get(key, ()))) for key in ("averaged", "still"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ContentError(
            f"{path}: does not say its step ({error!r}); name it (--step)"
        ) from error
    if not entry:
        log.info("%s: no save of mmtrain's; tokens and images are counted from 0 on", path)
    return _Ours(state=counts, averaged=averaged, still=still)


def _look_at_zero(folder: Path, model: Model, ours: _Ours, found: _Found) -> None:
    """Collect weights, masters, moments and steps, and all faults."""
    held = _parameters(folder / ZERO, model, found)
    for name in model.shapes:
        if name not in held:
            found.faults.append(f"{ZERO}/: {name} is missing")
            continue
        files = {path.stem: path for path in held[name].glob("*.pt")}
        wanted = {FP32, *MOMENTS} if _must_move(name, model, ours) else {FP32}
        if files.keys() & set(MOMENTS):
            wanted |= set(MOMENTS)
        place = held[name].relative_to(folder)
        found.faults += [f"{place}/{state}.pt: missing" for state in sorted(wanted - files.keys())]
        for state in sorted(files.keys() - {FP32, *MOMENTS, STEP}):
            found.faults.append(f"{place}/{state}.pt: no state of AdamW")
        for state in sorted(wanted & files.keys()):
            tensor = _tensor(files[state], name, model, folder, found)
            for kind in _kinds(state, model, moves=len(wanted) > 1) if tensor else ():
                assert tensor is not None
                found.tensors[kind, name] = tensor
        if STEP in files:
            found.steps |= set(_number(files[STEP], folder, found))


def _must_move(name: str, model: Model, ours: _Ours) -> bool:
    return model.is_trained(name) and name not in ours.still


def _plain(value: Any) -> Any:
    """Numbers, words, lists and tables of them, as a manifest holds them."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, str, float)) else int(value)


def _kinds(state: str, model: Model, moves: bool) -> tuple[str, ...]:
    """What a file of a parameter becomes."""
    if state != FP32:
        return (MOMENT + state,)
    return (WEIGHT, MASTER) if moves and model.dtype != torch.float32 else (WEIGHT,)


def _look_at_means(folder: Path, model: Model, ours: _Ours, found: _Found) -> None:
    held = _parameters(folder / EMA, model, found) if (folder / EMA).is_dir() else {}
    for name in sorted(ours.averaged | held.keys()):
        path = held[name] / f"{FP32}.pt" if name in held else None
        if name not in ours.averaged:
            found.faults.append(f"{EMA}/: {name} is not named in the model states")
        elif path is None or not path.is_file():
            found.faults.append(f"{EMA}/: {name} is missing")
        elif tensor := _tensor(path, name, model, folder, found):
            found.tensors[MEAN, name] = tensor


def _parameters(folder: Path, model: Model, found: _Found) -> dict[str, Path]:
    """Canonical name -> folder of its files."""
    known = spellings(model.census)
    out: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        place = f"{folder.name}/{path.name}"
        name = known.get(path.name)
        if name is None:
            if not re.fullmatch(FILLER.format(r"\d+"), path.name):
                like = get_close_matches(path.name, known, 1)
                hint = f", which has {like[0]}" if like else ""
                found.faults.append(f"{place}: no parameter of the recipe's model{hint}")
        elif name in out:
            found.faults.append(f"{place}: is {name}, and so is {out[name].name}")
        else:
            out[name] = path
    return out


def _tensor(path: Path, name: str, model: Model, folder: Path, found: _Found) -> Stored | None:
    """The tensor of a file; None, and a fault, if it is not as it should be."""
    place = path.relative_to(folder)
    content = _frame(path, found)
    if content is None:
        return None
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(tensor, Tensor):
        found.faults.append(f"{place}: holds a {type(content).__name__}; expected a tensor")
        return None
    shape = model.shapes[name]
    info, expected = stored(path, tensor).info, TensorInfo(shape, torch.float32)
    fits = any(_fits(info.shape, shape, rows) for rows in _rows(info, shape, name, model))
    if fits and info.dtype == torch.float32:
        return stored(path, tensor)
    found.faults.append(f"{place}: {info}; the recipe's model has {expected}")
    return None


def _rows(info: TensorInfo, shape: tuple[int, ...], name: str, model: Model) -> Iterator[int]:
    """Lengths that the first dim may have: its own, or a longer one of a padded vocabulary."""
    yield shape[0] if shape else 1
    row = TensorInfo(shape[1:], info.dtype).bytes
    if shape and row and model.is_padded(name) and info.bytes % row == 0:
        yield max(shape[0], info.bytes // row)


def _fits(found: tuple[int, ...], shape: tuple[int, ...], rows: int) -> bool:
    """Whether a tensor is a parameter with so many rows, as it is or flat (made from ZeRO-3)."""
    long = (rows, *shape[1:]) if shape else shape
    return found in (long, (TensorInfo(long, torch.uint8).bytes,))


def _frame(path: Path, found: _Found) -> Any:
    """What a file holds, without numbers; None, and a fault, if it cannot be read."""
    try:
        content = load_frame(path)
        with zipfile.ZipFile(path) as archive:  # torch does not look at check sums
            wrong = archive.testzip()
        if wrong is None:
            return content
        found.faults.append(f"{path}: damaged, {wrong} in it has another check sum; copy it again")
    except MmtrainError as error:
        found.faults.append(str(error))
    except (OSError, zipfile.BadZipFile) as error:
        found.faults.append(f"{path}: cannot be read as torch weights ({error}); copy it again")
    return None


def _number(path: Path, folder: Path, found: _Found) -> Iterator[int]:
    """The steps that a file says."""
    content = _frame(path, found)
    if isinstance(content, Tensor) and content.numel() == 1:
        yield int(stored(path, content).read())
    elif isinstance(content, int):
        yield content
    elif content is not None:
        found.faults.append(f"{path.relative_to(folder)}: holds no number of steps")


def _common_steps(folder: Path) -> set[int]:
    """Steps as optimizer_state.pt says them, where parameters have none of their own (ZeRO-3).

    Raises:
        ContentError: it says none.
    """
    path = folder / ZERO / OPTIMIZER
    if not path.is_file():
        raise ContentError(f"{path}: missing, and no parameter says the steps of the optimizer")
    content = load_frame(path, _STAND_INS)
    try:
        said = content["optimizer_state_dict"]["state"][0][STEP]
        return {int(stored(path, said).read() if isinstance(said, Tensor) else said)}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ContentError(
            f"{path}: does not say the steps of the optimizer ({error!r})"
        ) from error


def _refuse(folder: Path, faults: Sequence[str]) -> None:
    """Report all faults at once.

    Raises:
        ContentError: there are some.
    """
    if len(faults) == 1:
        raise ContentError(f"{folder}: {faults[0]}; nothing was written")
    if faults:
        more = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        lines = [f"{folder}: {len(faults)} faults, nothing was written:", *faults[:_SHOWN], *more]
        raise ContentError("\n".join(lines))
