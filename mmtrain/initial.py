"""Where the weights of a new run come from: drawn by name, or from the weights of another run.

What is found must be the model, strictly, with two exceptions that instruction tuning needs: a
start without adapters gets them drawn, and a start with fewer tokens gets rows for the new ones.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from mmtrain.checkpoint import portable
from mmtrain.checkpoint.portable import FullTensors
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError
from mmtrain.interpolations import read_file
from mmtrain.models.spec import ModelSpec
from mmtrain.nn.init import draw_by_name
from mmtrain.nn.lora import LoraConfig, is_adapter
from mmtrain.settings import Recipe

log = logging.getLogger(__name__)

Initial = Callable[[str, tuple[int, ...]], Tensor]  # (canonical name, full shape) -> full tensor
Shapes = Mapping[str, tuple[int, ...]]


def initial_weights(
    recipe: Recipe, spec: ModelSpec, shapes: Shapes, vocabulary: Vocabulary
) -> Initial:
    """Full tensors by name: from `train.initialize_from` when the recipe names it, else drawn.

    Args:
        recipe: of the run.
        spec: its family.
        shapes: full shape of every parameter.
        vocabulary: the run's tokenizer; it says which rows `train.new_rows` speaks of.

    Raises:
        ContentError: the weights found are not those of this model.
        MissingError: there are no weights.
    """
    drawn = partial(_draw, rules=spec.initial(recipe.model), seed=recipe.seed)
    if recipe.train.initialize_from is None:
        return drawn
    source = Path(recipe.train.initialize_from)
    likened = {
        vocabulary.ids[token]: NewRow(token, word, tuple(vocabulary.encode(word)))
        for token, word in recipe.train.new_rows.items()
    }
    tables = spec.vocabulary_tables
    start = Start(source, portable.open_tensors(source), tables, likened, shapes, drawn)
    start.check()
    if any(map(is_adapter, start.found)):
        _check_alpha(source, recipe)
    start.describe()
    return start.tensor


def _check_alpha(source: Path, recipe: Recipe) -> None:
    """Shapes do not tell alpha; another one would scale the adapters that were found.

    Raises:
        ContentError: they were trained with another alpha than the recipe's.
    """
    ours = getattr(recipe.model, "lora", None)
    trained = _alpha_of(source)
    if isinstance(ours, LoraConfig) and trained not in (None, ours.alpha):
        raise ContentError(
            f"train.initialize_from {source}: its adapters were trained with alpha {trained:g}, "
            f"model.lora.alpha is {ours.alpha:g}; set model.lora.alpha={trained:g}"
        )


def _alpha_of(source: Path) -> float | None:
    """Alpha of the adapters of an export, a run or a checkpoint, as far as it is written down."""
    description = portable.Description.read(source)
    if description is not None:
        return (description.lora or {}).get("alpha")
    for folder in (source, source.parent.parent):  # a run; a checkpoint of one
        path = folder / "recipe.yaml"
        if path.is_file():
            return _alpha_in(path)
    return None


def _alpha_in(recipe: Path) -> float | None:
    try:
        table = OmegaConf.to_container(read_file(recipe))
    except ValueError as error:
        raise ContentError(f"{recipe}: {error}") from error
    for key in ("model", "lora", "alpha"):
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, int | float) else None


def _draw(name: str, shape: tuple[int, ...], rules: Any, seed: int) -> Tensor:
    return draw_by_name(name, shape, rules, seed)


@dataclass(frozen=True)
class NewRow:
    """A token whose row is the mean of the rows of a word's tokens."""

    token: str
    word: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Another run's weights, as far as they go.

    Attributes:
        folder: for messages.
        tensors: what was found.
        tables: parameters with one row for each token.
        likened: new row -> what it is made of; other new rows are the mean of all rows found.
        shapes: what the model needs.
        drawn: for what is not there.
    """

    folder: Path
    tensors: FullTensors
    tables: tuple[str, ...]
    likened: Mapping[int, NewRow]
    shapes: Shapes
    drawn: Initial

    @cached_property
    def found(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is there."""
        return {name: self.tensors.shape(name) for name in self.tensors.names()}

    @cached_property
    def draws_adapters(self) -> bool:
        """Whether the start has no adapters at all, and the model has."""
        wanted = any(map(is_adapter, self.shapes))
        return wanted and not any(map(is_adapter, self.found))

    def is_short(self, name: str) -> bool:
        """Whether a table lacks rows for the last tokens, and nothing else."""
        found, wanted = self.found.get(name), self.shapes.get(name)
        if name not in self.tables or found is None or wanted is None:
            return False
        return found[1:] == wanted[1:] and 0 < found[0] < wanted[0]

    def check(self) -> None:
        """Compare what was found with the model.

        Raises:
            ContentError: a tensor is missing, of another shape, or belongs to another model.
        """
        wrong = [
            f"{name}: {self.found.get(name)} instead of {shape}"
            for name, shape in self.shapes.items()
            if self.found.get(name) != shape
            and not self.is_short(name)
            and not (self.draws_adapters and is_adapter(name))
        ]
        strange = [name for name in self.found if name not in self.shapes]
        wrong += [f"{n}: not a parameter of the model" for n in strange if not is_adapter(n)]
        if without := [name for name in strange if is_adapter(name)]:
            wrong.append(
                f"{without[0]} and {len(without) - 1} more: adapters that the model does not have "
                "(set model.lora as they were trained)"
            )
        wrong += [
            f"{name} has no row for {new.word!r}, which train.new_rows names for {new.token}"
            for name in filter(self.is_short, self.tables)
            for new in self.likened.values()
            if max(new.rows) >= self.found[name][0]
        ]
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ContentError(
                f"train.initialize_from {self.folder} does not fit the model: "
                f"{'; '.join(wrong[:8])}{more}"
            )

    def describe(self) -> None:
        """Log what is taken, what is drawn and what is made."""
        log.info("initial weights: %d tensors of %s", len(self.found), self.folder)
        if self.draws_adapters:
            log.info("%d tensors of adapters drawn", sum(map(is_adapter, self.shapes)))
        for name in filter(self.is_short, self.tables):
            first, last = self.found[name][0], self.shapes[name][0]
            likened = [
                f"{new.token} like {new.word!r}"
                for row, new in self.likened.items()
                if first <= row < last
            ]
            said = f"; {', '.join(likened)}" if likened else ""
            log.info("%s: rows %d to %d are means of rows%s", name, first, last - 1, said)
        least = min((self.found[name][0] for name in self.tables if name in self.found), default=0)
        kept = [new.token for row, new in self.likened.items() if row < least]
        if kept:
            log.warning(
                "train.new_rows: %s has rows for %s already; they are kept",
                self.folder,
                ", ".join(kept),
            )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The full tensor `name` of the new run, of full shape `shape`."""
        if name not in self.found:
            return self.drawn(name, shape)
        tensor = self.tensors.get(name)
        if not self.is_short(name):
            return tensor
        table = tensor.float()
        everything = table.mean(0)
        new = [
            table[list(self.likened[row].rows)].mean(0) if row in self.likened else everything
            for row in range(len(tensor), shape[0])
        ]
        return torch.cat([tensor, torch.stack(new).to(tensor.dtype)])
