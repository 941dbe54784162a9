"""The tensor plan: a table from module or parameter names to how tensor ranks share them.

The same table swaps layers for Megatron-core's (`parallel.shard`), cuts initial weights and
splits and merges checkpoints. A pattern is a dotted name; `*` stands for one component and
`{a,b}` for either spelling: `language.blocks.*.attention.{q,k,v}`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache


class Cut(Enum):
    """How the ranks of one tensor group share a module or a parameter."""

    COLUMN = "column"  # Linear: output features (and bias) are split
    COLUMN_GATHERED = "column_gathered"  # the same, the output is gathered to full width
    ROW = "row"  # Linear: input features are split, outputs summed; the bias is whole
    ROW_SCATTERED = "row_scattered"  # ROW; under sequence parallelism the sum is split by rows
    VOCAB = "vocab"  # Embedding: rows are split, padded to a multiple of the ranks
    VOCAB_COLUMN = "vocab_column"  # Linear to the vocabulary: output rows split, padded
    VOCAB_LOSS = "vocab_loss"  # token cross-entropy over split logits
    ENTER = "enter"  # Identity before column layers: gradients are summed over the ranks
    ENTER_ROWS = "enter_rows"  # ENTER; under sequence parallelism rows are gathered
    SCATTER_ROWS = "scatter_rows"  # Identity; under sequence parallelism rows are split
    HEADS_0 = "heads_0"  # parameter whose dim 0 is the head axis
    HEADS_1 = "heads_1"  # parameter whose dim 1 is the head axis
    CHANNELS = "channels"  # module that numbers its input channels: told which ones it gets
    SHARED = "shared"  # whole, but each rank sees a part of its gradient: they are summed
    ROWWISE = "rowwise"  # whole parameter on split rows: summed under sequence parallelism


# which dim of which parameter a cut splits: {cut: {parameter leaf or "": dim}}
_DIMS: dict[Cut, dict[str, int]] = {
    Cut.COLUMN: {"weight": 0, "bias": 0},
    Cut.COLUMN_GATHERED: {"weight": 0, "bias": 0},
    Cut.ROW: {"weight": 1},
    Cut.ROW_SCATTERED: {"weight": 1},
    Cut.VOCAB: {"weight": 0},
    Cut.VOCAB_COLUMN: {"weight": 0},
    Cut.HEADS_0: {"": 0},
    Cut.HEADS_1: {"": 1},
}
_PADDED = frozenset({Cut.VOCAB, Cut.VOCAB_COLUMN})


@dataclass(frozen=True)
class Slice:
    """Rank r of n keeps the r-th of n equal parts of `dim`; `padded` allows an uneven length."""

    dim: int
    padded: bool = False

    def local_length(self, length: int, ranks: int) -> int:
        """Length of one rank's part of `length` (rounded up when padded)."""
        return -(-length // ranks)


@lru_cache(maxsize=4096)  # every parameter is tried against every rule
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Turn `a.*.{b,c}` into a regular expression over dotted names."""
    pieces = re.split(r"(\*|\{[^}]*\})", pattern)
    out = []
    for piece in pieces:
        if piece == "*":
            out.append(r"[^.]+")
        elif piece.startswith("{"):
            out.append("(?:" + "|".join(map(re.escape, piece[1:-1].split(","))) + ")")
        else:
            out.append(re.escape(piece))
    return re.compile("".join(out))


@dataclass(frozen=True)
class TensorPlan:
    """Rules in order; the first pattern that matches a whole name decides."""

    rules: Mapping[str, Cut]

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], Cut]]:
        return [(compile_pattern(pattern), cut) for pattern, cut in self.rules.items()]

    def cut(self, name: str) -> Cut | None:
        """The cut of a module or parameter, or None when every rank holds it whole."""
        return next((cut for pattern, cut in self._compiled if pattern.fullmatch(name)), None)

    def slice_of(self, parameter: str) -> Slice | None:
        """How the full tensor `parameter` is split, or None when every rank holds it whole."""
        own = self.cut(parameter)
        if own is not None:
            dim = _DIMS.get(own, {}).get("")
            return None if dim is None else Slice(dim)
        module, _, leaf = parameter.rpartition(".")
        cut = self.cut(module)
        if cut is None or (dim := _DIMS.get(cut, {}).get(leaf)) is None:
            return None
        return Slice(dim, cut in _PADDED)
