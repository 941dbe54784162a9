"""Whether a resumed run still has the plan of packs that its checkpoint was made by.

A batch is a pure function of recipe, seed and step only while nothing that the plan is made from
changes. So a checkpoint keeps that, by recipe key, and a run that finds a difference is refused
before anything is written. `data.plan_from_step` is the way out: from that step on packs are
planned anew, again as a function of the recipe alone.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain.data.mixture import Source
from mmtrain.data.pack import Mark
from mmtrain.errors import Problem, RecipeError
from mmtrain.nn.noise import seed_of
from mmtrain.schema import join, to_plain
from mmtrain.settings import Recipe
from mmtrain.train.state import TrainState

log = logging.getLogger(__name__)

_DATA = ("tokenizer", "weights_by", "packing", "pack_tokens", "pack_images", "window_documents",
         "shuffle", "plan_from_step")  # fmt: skip
_SOURCE = ("rule", "max_images", "max_tokens", "image_first", "overlong", "epochs")


def plan_seed(recipe: Recipe) -> int:
    """Seeds orders, rules and packs; another one for a plan that begins amid a run."""
    begin = recipe.data.plan_from_step
    return recipe.seed if not begin else seed_of("plan", recipe.seed, begin)


def origin(recipe: Recipe, sources: Sequence[Source], group_length: int) -> dict[str, Any]:
    """What a plan is made from, by recipe key, as plain data.

    Args:
        recipe: of the run.
        sources: its training sources, opened.
        group_length: positions of one image.
    """
    data = recipe.data
    found: dict[str, Any] = {"seed": recipe.seed, "model (positions of an image)": group_length}
    found["train.global_batch_packs"] = recipe.train.global_batch_packs
    for name in _DATA:
        found[f"data.{name}"] = to_plain(getattr(data, name))
    found["data.tokenizer"] = sources[0].lengths.fingerprint
    found["data.sources"] = [source.name for source in sources]
    for source in sources:
        place, config = join("data.sources", source.name), data.sources[source.name]
        found[f"{place}.path (hash of its index.json)"] = source.lengths.dataset
        for name in _SOURCE:
            found[f"{place}.{name}"] = to_plain(getattr(config, name))
        found[f"{place}.weight"] = {"0": config.weight, **config.weight_steps}
    return found


def check(recipe: Recipe, now: Mapping[str, Any], state: TrainState, folder: Path) -> None:
    """Refuse to go on from a checkpoint whose plan was another one.

    Args:
        recipe: of the run.
        now: `origin` of the recipe.
        state: of the checkpoint.
        folder: of the checkpoint, for messages.

    Raises:
        RecipeError: every key that differs: what the checkpoint has, what the recipe has, and the
            way out.
    """
    step, begin = state.data_step, recipe.data.plan_from_step
    before = state.plan_origin
    if step == begin and begin:
        log.warning("packs are planned anew from step %d on (data.plan_from_step)", begin + 1)
        return
    if not before:
        if step and not begin:
            log.warning("%s does not say what its packs were planned from; not compared", folder)
        elif begin:
            raise RecipeError([_other_begin(begin, step, folder)])
        return
    if begin != before["data.plan_from_step"]:
        raise RecipeError([_other_begin(begin, step, folder)])
    found = list(_differences(before, now, step))
    if found:
        advice = (
            f"put it back, or set data.plan_from_step={step}: packs are then planned anew from "
            "here on, and every source begins a new epoch"
        )
        raise RecipeError([Problem(key, f"{text}; {advice}") for key, text in found])


def adopt(state: TrainState, recipe: Recipe, now: dict[str, Any]) -> None:
    """Let a state that `check` has passed go on by the recipe's plan."""
    begin = recipe.data.plan_from_step
    if begin and state.data_step == begin and state.plan_origin != now:
        state.mark = Mark(0, begin * recipe.train.global_batch_packs)
    state.plan_origin = now


def _other_begin(begin: int, step: int, folder: Path) -> Problem:
    text = (
        f"found {begin}, but {folder} stands at step {step} of the data and its plan does not "
        f"begin there; use {step} to plan anew from here on, or the value that the run had before"
    )
    return Problem("data.plan_from_step", text)


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], step: int
) -> Iterator[tuple[str, str]]:
    names = "data.sources"
    if before[names] != now[names]:
        yield names, _both(before[names], now[names])
    for key in before.keys() & now.keys() if before[names] == now[names] else _shared(before, now):
        old, new = before[key], now[key]
        if key.endswith(".weight"):
            old, new = _past(old, step), _past(new, step)
        if old != new:
            yield key, _both(old, new)


def _shared(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys of both; those of sources are noise when the list of sources differs."""
    return [key for key in before if key in now and not key.startswith("data.sources")]


def _past(weights: Mapping[str, float], step: int) -> dict[int, float]:
    """Steps and weights up to a step; those to come may change."""
    held: float | None = None
    kept: dict[int, float] = {}
    for begin, weight in sorted((int(begin), weight) for begin, weight in weights.items()):
        if begin <= step and weight != held:
            kept[begin] = held = weight
    return kept


def _both(old: Any, new: Any) -> str:
    return f"the checkpoint has {old}, the recipe has {new}"
