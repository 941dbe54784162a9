"""Folders of full tensors, runs and checkpoints, as the source or the target of a conversion."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.portable import (
    DESCRIPTION,
    Description,
    FullTensors,
    open_averaged,
    open_tensors,
)
from mmtrain.convert.plan import Draft, raise_faults
from mmtrain.convert.sources import Source, open_file
from mmtrain.convert.writing import DROPPED
from mmtrain.errors import ContentError
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.sizes import Sizes, expected_shapes, lora_of, sizes_of
from mmtrain.nn.lora import LoraConfig

EVERYTHING = ("vision", "vision_norm", "causal", "embed", "blocks", "head")


@dataclass(frozen=True)
class Canonical:
    """Full tensors with what is known of them.

    Attributes:
        source: the tensors.
        description: of the folder, or of the run.
        dropped: what a release held beside them, or None.
    """

    source: Source
    description: Description
    dropped: Source | None = None

    def part(self, prefixes: Iterable[str], without: Iterable[str] = ()) -> "Canonical":
        """The tensors of some parts of the model (first component of the name)."""
        wanted, unwanted = set(prefixes), set(without)
        infos = {
            name: info
            for name, info in self.source.infos.items()
            if name.partition(".")[0] in wanted and name not in unwanted
        }
        return replace(self, source=replace(self.source, infos=infos))

    @property
    def head_width(self) -> int | None:
        """Channels of a head of the trunk, where the description knows."""
        language = self.description.model.get("language", {})
        heads, width = language.get("heads"), language.get("width")
        return width // heads if heads and width else None

    def lora(self, alpha: float | None) -> LoraConfig:
        """Adapters: rank and targets by shape, alpha as described or given."""
        found = lora_of(shapes_of(self.source))
        known = (self.description.lora or {}).get("alpha", found.alpha)
        return replace(found, alpha=known if alpha is None else alpha)


def open_canonical(
    path: Path, description: Description | None = None, *, averaged: bool = False
) -> Canonical:
    """Open a folder of full tensors, a run folder or a checkpoint.

    Args:
        path: the folder.
        description: of the weights; None to read the folder's own.
        averaged: running means of the weights (`train.ema`) where a run keeps them.

    Raises:
        MissingError: nothing of the kind is there.
        ContentError: its files are damaged.
    """
    tensors = open_averaged(path) if averaged else open_tensors(path)
    known = description or Description.read(path) or Description(kind="full tensors", model={})
    dropped = path / DROPPED
    return Canonical(
        _as_source(path, tensors), known, open_file(dropped) if dropped.is_file() else None
    )


def _as_source(path: Path, tensors: FullTensors) -> Source:
    infos = {name: tensors.info(name) for name in tensors.names()}
    return Source(path, infos, dict.fromkeys(infos, path), tensors.get)


def shapes_of(source: Source) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor."""
    return {name: info.shape for name, info in source.infos.items()}


def made_shapes(draft: Draft) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that is made so far."""
    return {name: made.info.shape for name, made in draft.made.items()}


def read_sizes(
    draft: Draft, shapes: Mapping[str, tuple[int, ...]], head_width: int | None = None
) -> Sizes:
    """Sizes of what a draft makes.

    Raises:
        ContentError: tensors that tell them are missing.
    """
    try:
        return sizes_of(shapes, head_width)
    except (KeyError, ZeroDivisionError, ValueError) as error:
        fault = f"its sizes cannot be read: {error.args[0]} is missing or of no use"
        raise_faults(draft.source, draft.what, [fault, *draft.faults])
        raise


def describe(
    kind: str, sizes: Sizes, config: EmuConfig | None, lora: LoraConfig | None = None
) -> dict[str, str]:
    """The file `mmtrain.json`.

    Args:
        kind: what the folder holds.
        sizes: read off its shapes.
        config: of the recipe it must fit, when there is one; it knows all sizes.
        lora: adapters in the folder.
    """
    known = Sizes(config, sizes.sections) if config is not None else sizes
    adapters = described_lora(lora) if lora is not None and lora.rank else None
    description = Description(kind=kind, model=known.described(), lora=adapters)
    return {DESCRIPTION: description.text()}


def described_lora(lora: LoraConfig) -> dict[str, Any]:
    """What a description keeps of adapters."""
    kept = ("rank", "alpha", "targets")
    return {key: value for key, value in asdict(lora).items() if key in kept}


def require_whole(
    folder: Canonical, parts: Iterable[str], what: str, without: Iterable[str] = ()
) -> Sizes:
    """Check that a folder holds whole parts of a model, in one set of sizes.

    Args:
        folder: what is checked.
        parts: first components of layer names.
        what: what will be made of it, for messages.
        without: tensors of those parts that do not count.

    Raises:
        ContentError: tensors are missing, or their shapes differ from one another.
    """
    draft = Draft(folder.source, what)
    wanted = folder.part(parts, without)
    if not wanted.source.infos:
        raise ContentError(
            f"{folder.source.path}: holds no tensor of {', '.join(parts)}, which {what} needs; its "
            f"kind is {folder.description.kind}"
        )
    sizes = read_sizes(draft, shapes_of(wanted.source), folder.head_width)
    shapes = expected_shapes(sizes.config, parts)
    expected = {name: shape for name, shape in shapes.items() if name not in set(without)}
    here = shapes_of(wanted.source)
    faults = [
        f"{name}: {'missing' if name not in here else _differs(here[name], shape)}"
        for name, shape in expected.items()
        if here.get(name) != shape
    ]
    faults += [f"{name}: the model has no such tensor" for name in here.keys() - expected.keys()]
    if faults:
        raise_faults(folder.source, what, faults)
    return sizes


def _differs(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"has shape {found}, expected {wanted}"
