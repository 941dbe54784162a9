"""DeepSpeed's universal checkpoints (0.19.8): what lies in them, and a run's checkpoint out.

    OUT/latest_universal                          names the folder beside it
    OUT/global_step100_universal/
        mp_rank_00_model_states.pt                the step, and what mmtrain counts ("mmtrain")
        zero_pp_rank_0_mp_rank_00_model_states.pt the same, under the name that ZeRO-3 asks for
        zero/optimizer_state.pt                   what engines want beside the tensors
        zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
        ema/<parameter>/fp32.pt                   running means; DeepSpeed does not look at them

`checkpoint/ds_to_universal.py` writes these folders from a save of DeepSpeed's,
`runtime/base_optimizer.py` (ZeRO-1, 2) and `runtime/zero/stage3.py` read them. A tensor is full,
without the padding of a vocabulary, in `{"param": tensor, "cat_dim": dim}`; made from ZeRO-3 it is
bare and flat, and its step lies in optimizer_state.pt. A parameter that was not trained has fp32
alone. Back in: `convert.universal_reader`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest
from mmtrain.checkpoint.pieces import MASTER, MEAN, MOMENT, WEIGHT, Pieces
from mmtrain.checkpoint.portable import new_folder
from mmtrain.errors import ContentError
from mmtrain.layout.plan import TensorPlan
from mmtrain.models.census import LayerCensus

LATEST = "latest_universal"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
FILLER = "filler_{}"  # see train.optim.Filled: a stage's lent numbers, which train nothing
FP32, MOMENTS, STEP = "fp32", ("exp_avg", "exp_avg_sq"), "step"
OPTIMIZER, ZERO, EMA = "optimizer_state.pt", "zero", "ema"
OURS = "mmtrain"  # our entry in the model states
_INFO = {"universal_checkpoint_version": 0.4}  # checkpoint/constants.py


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a recipe says of the parameters.

    Attributes:
        census: its layers, in order.
        plan: the family's tensor plan.
        is_trained: canonical name -> whether the recipe trains it.
        dtype: of the weights.
    """

    census: Sequence[LayerCensus]
    plan: TensorPlan
    is_trained: Callable[[str], bool]
    dtype: torch.dtype

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter, by canonical name."""
        return {name: shape for layer in self.census for name, shape in layer.shapes.items()}

    def is_padded(self, name: str) -> bool:
        """Whether its rows may be padded to a multiple of the tensor ranks."""
        cut = self.plan.slice_of(name)
        return cut is not None and cut.padded


def engine_names(
    census: Sequence[LayerCensus], wrappers: Callable[[str], int], staged: bool
) -> dict[str, str]:
    """Canonical name -> name in DeepSpeed's engine, as in `layers.3.attention.q.weight`.

    Args:
        census: the layers, in order.
        wrappers: canonical layer name -> modules around it (`Recomputed`, `Partitioned`).
        staged: whether the engine has pipeline stages; layers are then named by number alone.
    """
    out = {}
    for number, layer in enumerate(census):
        prefix = str(number) if staged else f"layers.{number}"
        for name in layer.shapes:
            local = name.removeprefix(layer.name + ".")
            out[name] = ".".join([prefix, *["layer"] * wrappers(layer.name), local])
    return out


def spellings(census: Sequence[LayerCensus]) -> dict[str, str]:
    """Every name that an engine may give a parameter -> its canonical name."""
    out: dict[str, str] = {}
    for staged in (False, True):
        for count in (2, 1, 0):
            named = engine_names(census, lambda layer, count=count: count, staged)  # type: ignore[misc]
            out |= {spelled: name for name, spelled in named.items()}
    return out | {name: name for layer in census for name in layer.shapes}


def write(
    folder: Path, out: Path, names: Mapping[str, str], plan: TensorPlan, fillers: int = 0
) -> Path:
    """Write a committed checkpoint of any layout in DeepSpeed's universal format.

    Args:
        folder: the checkpoint; its files are verified first.
        out: folder to make, which `engine.load_checkpoint` is given.
        names: canonical name -> name in the folder.
        plan: the family's tensor plan.
        fillers: numbers that stages of a pipeline may lend to their optimizer groups.

    Returns:
        The folder that `latest_universal` names.

    Raises:
        ContentError, MissingError: the checkpoint is damaged, or of another model.
        StorageError: `out` exists already, or cannot be written.
    """
    for fault in store.faults(folder):
        raise fault
    manifest = Manifest.read(folder)
    if unknown := manifest.weights.keys() ^ names.keys():
        raise ContentError(f"{folder}: not of this model: {sorted(unknown)[:5]}")
    pieces = Pieces(folder, manifest)
    tag = f"global_step{manifest.step}_universal"
    with new_folder(out) as partial:
        zero = partial / tag / ZERO
        for name, target in names.items():
            _write_parameter(pieces, name, zero / target, plan)
        for number in range(fillers):
            _write_filler(zero / FILLER.format(number), manifest.optimizer_steps)
        for name in manifest.averaged:
            mean = pieces.full(MEAN, name)
            _save({"param": mean}, partial / tag / EMA / names[name] / f"{FP32}.pt")
        _save(_optimizer_state(manifest), zero / OPTIMIZER)
        for file in MODEL_STATES:
            _save(_model_states(pieces), partial / tag / file)
        (partial / LATEST).write_text(tag)
    return out / tag


def _write_parameter(pieces: Pieces, name: str, folder: Path, plan: TensorPlan) -> None:
    cut = plan.slice_of(name)
    how: dict[str, Any] = {"cat_dim": cut.dim if cut else 0}
    if cut is not None and cut.padded:
        how["vocab_tensor"] = True  # a reader pads it to a multiple of its tensor ranks
    master = MASTER if pieces.has(MASTER, name) else WEIGHT
    _save({"param": pieces.full(master, name).float(), **how}, folder / f"{FP32}.pt")
    if not _is_moved(pieces, name):
        return
    for moment in MOMENTS:
        _save({"param": pieces.full(MOMENT + moment, name), **how}, folder / f"{moment}.pt")
    _save(_steps(pieces.manifest.optimizer_steps), folder / f"{STEP}.pt")


def _is_moved(pieces: Pieces, name: str) -> bool:
    """Whether the optimizer has states of a parameter."""
    return all(pieces.has(MOMENT + moment, name) for moment in MOMENTS)


def _write_filler(folder: Path, steps: int) -> None:
    for state in (FP32, *MOMENTS):
        _save({"param": torch.zeros(1), "cat_dim": 0}, folder / f"{state}.pt")
    _save(_steps(steps), folder / f"{STEP}.pt")


def _steps(steps: int) -> Tensor:
    """As torch's AdamW counts them."""
    return torch.tensor(float(steps))


def _optimizer_state(manifest: Manifest) -> dict[str, Any]:
    """What ZeRO-1, 2 and 3 read beside the tensors.

    A group says nothing, so that the engine's own rates and decays stay. There are as many as
    parameters: DeepSpeed skips its groups beyond the last one here (base_optimizer.py, `zip`).
    """
    groups: list[dict[str, Any]] = [{"params": []} for _ in manifest.weights]
    inner = {"state": {0: {"step": _steps(manifest.optimizer_steps)}}, "param_groups": groups}
    return {
        "ds_version": version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": inner,
    }


def _model_states(pieces: Pieces) -> dict[str, Any]:
    manifest = pieces.manifest
    return {
        "module": None,
        "lr_scheduler": None,
        "global_steps": manifest.step,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": version("deepspeed"),
        "universal_checkpoint_info": _INFO,
        OURS: {
            "state": manifest.state,
            "averaged": list(manifest.averaged),
            "still": [name for name in manifest.weights if not _is_moved(pieces, name)],
        },
    }


def _save(content: object, path: Path) -> None:
    """Write one file; not synced: there are four a parameter, and a run can write them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
