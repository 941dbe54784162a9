"""A recipe: one YAML, one run. Reading it, and writing the resolved recipe back.

A YAML may name a `base:` (a path relative to itself) and say only what differs; overrides from
the command line come last. `${a.b}` copies another key; resolvers as `${oc.env:HOME}` are refused
(`mmtrain.interpolations`). In the tables (`data.sources`, `optimizer.learning_rates`, ...) the
entries of all files add up; `null` takes one out.

All faults are reported at once, as one `RecipeError`, before anything is written.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmtrain import decoder_faults, faults, interpolations
from mmtrain.errors import Problem, RecipeError
from mmtrain.interpolations import checked, one_line, resolved
from mmtrain.models.families import FAMILIES, spec_of
from mmtrain.models.spec import ModelSpec
from mmtrain.schema import Reader, dotted_keys, suggestion, to_plain
from mmtrain.settings import Phase, Recipe, TrainConfig

BASE = "base"


@dataclass(frozen=True)
class Examined:
    """A YAML, read as far as it goes.

    Attributes:
        recipe: None when it is too faulty to be built.
        faults: everything that is wrong with it in itself.
        missing: files that it names and that are not there.
    """

    recipe: Recipe | None
    faults: tuple[Problem, ...]
    missing: tuple[Problem, ...] = ()


def load(path: str | Path, overrides: Iterable[str] = (), world_size: int | None = None) -> Recipe:
    """Read a recipe and check it.

    Args:
        path: the YAML.
        overrides: `dotted.key=value`, applied in order; a key that holds dots stands in brackets:
            `optimizer.learning_rates[vision.stem]=1e-5`.
        world_size: ranks that the launcher started; None when that is not known yet.

    Raises:
        RecipeError: all faults of spelling, type, layout and files at once.
    """
    seen = examine(path, overrides, world_size)
    if seen.recipe is None or seen.faults or seen.missing:
        raise RecipeError([*seen.faults, *seen.missing])
    return seen.recipe


def read(path: str | Path, overrides: Iterable[str] = (), world_size: int | None = None) -> Recipe:
    """Read a recipe whose files need not be there: of a run, or for its sizes.

    The arguments are those of `load`.

    Raises:
        RecipeError: all faults of the recipe in itself at once.
    """
    seen = examine(path, overrides, world_size)
    if seen.recipe is None or seen.faults:
        raise RecipeError(seen.faults)
    return seen.recipe


def examine(
    path: str | Path, overrides: Iterable[str] = (), world_size: int | None = None
) -> Examined:
    """Read a recipe and collect its faults; the arguments are those of `load`."""
    found: list[Problem] = []
    layers = _chain(Path(path), found)
    if found and not layers:
        return Examined(None, tuple(found))
    layers += _parsed(overrides, found)
    written: dict[str, Any] = reduce(_merge, layers, {})
    spec = _family(written, found)
    types: dict[str, Any] = {"model": spec.config_type} if spec else {}
    plain = resolved(OmegaConf.create(_merge(_defaults(spec), written)), found)
    if plain is None:
        return Examined(None, tuple(found))
    doubtful = {p.place.rpartition(" ")[2] for p in found}  # a file or an override may stand before
    reader = Reader(types, dotted_keys(Recipe, types), found, doubtful)
    recipe = reader.read(Recipe, plain, "")
    if spec is None or not isinstance(recipe, Recipe):
        return Examined(None, tuple(found))
    try:
        recipe = replace(recipe, model=spec.settled(recipe.model))
    except RecipeError as error:
        found += error.problems
    late = faults.problems(recipe, spec, world_size)
    found += [p for p in late if not _mentions(p, reader.doubtful)]
    missing = [p for p in _missing(recipe, spec) if not _mentions(p, reader.doubtful)]
    return Examined(recipe, tuple(found), tuple(missing))


def _missing(recipe: Recipe, spec: ModelSpec) -> list[Problem]:
    missing = list(faults.missing_files(recipe, spec))
    if recipe.phase is Phase.decoder:
        missing += decoder_faults.missing(recipe, _other)
    return missing


def _other(path: Path) -> tuple[Recipe | None, int]:
    """The recipe that another run was made by, and how many faults it has."""
    seen = examine(path)
    return seen.recipe, len(seen.faults)


def problems(recipe: Recipe, world_size: int | None = None) -> list[Problem]:
    """Every fault of a well-typed recipe; see `mmtrain.faults`."""
    spec = spec_of(recipe.family, recipe.phase)
    return [*faults.problems(recipe, spec, world_size), *_missing(recipe, spec)]


def to_yaml(recipe: Recipe) -> str:
    """The whole resolved recipe; `load` gives the same object back."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True)


def _chain(path: Path, found: list[Problem], above: tuple[Path, ...] = ()) -> list[Any]:
    """The recipe and its bases, the farthest base first."""
    path = path.resolve()
    if path in above:
        loop = " -> ".join(map(str, (*above[above.index(path) :], path)))
        found.append(Problem(str(path), f"its base chain comes back to itself: {loop}"))
        return []
    if not path.is_file():
        asked = f" (base of {above[-1]})" if above else ""
        found.append(Problem(str(path), f"there is no such recipe{asked}"))
        return []
    try:
        content = interpolations.read_file(path)
    except ValueError as error:
        found.append(Problem(str(path), f"cannot be read as YAML: {error}"))
        return []
    if not isinstance(content, DictConfig):
        found.append(Problem(str(path), "holds a list; wanted: a table of keys"))
        return []
    own: dict[str, Any] = checked(_plain(content), str(path), found)
    base = own.pop(BASE, None)
    if base is None:
        return [own]
    if not isinstance(base, str):
        found.append(Problem(f"{path} {BASE}", f"found {base!r}; wanted: the path of one recipe"))
        return [own]
    return [*_chain(path.parent / base, found, (*above, path)), own]


def _parsed(overrides: Iterable[str], found: list[Problem]) -> list[Any]:
    out = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[[^\]]+\])*", key):
            text = "wanted: key=value, as in train.steps=100"
            found.append(Problem(f"override {override!r}", text))
            continue
        try:
            given = _plain(OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
            found.append(Problem(f"override {override!r}", one_line(error)))
            continue
        out.append(checked(given, "override", found))
    return out


def _family(written: Mapping[str, Any], found: list[Problem]) -> ModelSpec | None:
    name = str(written.get("family", Recipe.family))
    if name not in FAMILIES:
        near = suggestion(name, list(FAMILIES))
        allowed = ", ".join(FAMILIES)
        found.append(Problem("family", f"there is no family {name!r}{near}; allowed: {allowed}"))
        return None
    known = {phase.value: phase for phase in Phase}
    # a misspelt phase is the schema's matter
    phase = known.get(str(written.get("phase", Recipe.phase.value)), Recipe.phase)
    if phase not in FAMILIES[name]:
        allowed = ", ".join(phase.value for phase in FAMILIES[name])
        text = f"family {name} has no phase {phase.value}; allowed: {allowed}"
        found.append(Problem("phase", text))
        return None
    return spec_of(name, phase)


def _defaults(spec: ModelSpec | None) -> Any:
    """What a recipe may leave out, so that `${...}` can point at it."""
    if spec is None:
        return to_plain(Recipe(model={}))
    train = TrainConfig(loss_weights=dict.fromkeys(spec.losses, 1.0))
    return to_plain(Recipe(model=spec.config_type(), train=train))


def _merge(under: Any, over: Any) -> Any:
    """Tables add up, key by key; anything else is replaced, also by a value of another kind.

    OmegaConf's own merge raises on a list where a table stands, which is a fault to be collected.
    """
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    added = {key: _merge(under[key], over[key]) if key in under else over[key] for key in over}
    return {**under, **added}


def _plain(config: DictConfig | ListConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


def _mentions(problem: Problem, doubtful: set[str]) -> bool:
    """Whether a fault derives from a key that is reported already."""
    text = f"{problem.place} {problem.text}"
    # families name the other keys of a section of theirs by their last component
    own = {key.rpartition(".")[0] + "." for key in doubtful if key.startswith("model.")}
    return problem.place.startswith(tuple(own)) or any(
        re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", text) for key in doubtful
    )
