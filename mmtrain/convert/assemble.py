"""What Emu's pretraining starts from: a LLaMA, an EVA-CLIP tower, and the rest drawn.

As published: the C-Former is drawn (nothing pretrained goes into it), and so is the regression
head; rows of new tokens, in both tables, are the mean of the rows there are. [USER] and [ASSISTANT]
of instruction tuning may start from the rows of the words they stand for.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.checkpoint.portable import DESCRIPTION
from mmtrain.checkpoint.tensorfile import TensorInfo
from mmtrain.convert.canonical import EVERYTHING, describe
from mmtrain.convert.llama import read_llama
from mmtrain.convert.meta_llama import read_meta
from mmtrain.convert.plan import Made, Plan
from mmtrain.convert.release import read_tower
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError, Problem, RecipeError
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.sizes import Sizes, expected_shapes
from mmtrain.models.emu.spec import EMU
from mmtrain.nn.init import draw_by_name

_DRAWN = ("vision_norm", "causal", "head.regress")
_TABLES = EMU.vocabulary_tables
_CHUNK_ROWS = 4096
_SETTINGS = ("heads", "kv_heads", "norm_eps", "rope_theta")

Rows = Mapping[int, tuple[int, ...]]  # row of a new token -> rows whose mean it begins with


@dataclass(frozen=True)
class NewToken:
    """`[USER]=user`: a token's row begins as the mean of a word's rows."""

    token: str
    word: str

    @classmethod
    def parse(cls, text: str) -> "NewToken":
        """Read `TOKEN=WORD`; either may be `#ID`.

        Raises:
            RecipeError: there is no `=`.
        """
        token, equals, word = text.partition("=")
        if not equals or not token or not word:
            wanted = 'TOKEN=WORD, as in "[USER]=user"; either may be an id, as in "#32004=#1404"'
            raise RecipeError([Problem("--new-token", f"found {text!r}; wanted: {wanted}")])
        return cls(token, word)


def rows_of(
    tokens: Iterable[NewToken], vocabulary: Vocabulary | None
) -> dict[int, tuple[int, ...]]:
    """Rows of the tokens and of their words.

    Raises:
        RecipeError: a token is not in the tokenizer, or there is none to ask.
    """
    out: dict[int, tuple[int, ...]] = {}
    for new in tokens:
        row, word = _id(new.token), _id(new.word)
        if vocabulary is None and (row is None or word is None):
            text = (
                f"{new.token}={new.word} needs the tokenizer; name it (--tokenizer DIR) or use #ID"
            )
            raise RecipeError([Problem("--new-token", text)])
        if vocabulary is not None and row is None:
            row = vocabulary.ids.get(new.token)
        if row is None:
            assert vocabulary is not None
            text = f"{new.token} is no token of {vocabulary.folder}; add it there first"
            raise RecipeError([Problem("--new-token", text)])
        pieces = [word] if word is not None or vocabulary is None else vocabulary.encode(new.word)
        out[row] = tuple(piece for piece in pieces if piece is not None)
    return out


def _id(text: str) -> int | None:
    return int(text[1:]) if text.startswith("#") and text[1:].isdecimal() else None


def start(llama: Path, eva: Path, config: EmuConfig, seed: int, rows: Rows) -> Plan:
    """Full tensors of a whole Emu.

    Args:
        llama: a Hugging Face folder, or Meta's.
        eva: an EVA-CLIP file.
        config: sizes of the model; they must be those of both.
        seed: of what is drawn.
        rows: new tokens that begin as words.

    Raises:
        ContentError: everything that does not fit, at once.
    """
    trunk = read_llama(llama) if (llama / "config.json").is_file() else read_meta(llama)
    tower = read_tower(eva, None)
    found = {made.target: made for made in (*trunk.made, *tower.made)}
    faults = list(_other_settings(trunk, config))
    made = []
    for name, shape in expected_shapes(config, EVERYTHING).items():
        have = found.pop(name, None)
        if have is None and not name.startswith(_DRAWN) and "_lora." not in name:
            faults.append(f"{name}: the recipe's model has it, neither file gives it")
        elif have is None:
            made.append(_drawn(name, shape, config, seed))
        elif have.info.shape == shape:
            made.append(have)
        elif name in _TABLES and have.info.shape[1:] == shape[1:] and have.info.shape[0] < shape[0]:
            faults += _bad_rows(name, have.info.shape[0], shape[0], rows)
            made.append(grown(have, shape[0], rows))
        else:
            sources = ", ".join(have.sources)
            faults.append(
                f"{name}: {sources} gives {have.info.shape}, the recipe's model has {shape}"
            )
    faults += [
        f"{', '.join(m.sources)}: the recipe's model has no {name}" for name, m in found.items()
    ]
    if faults:
        shown = [*faults[:12], *([f"... and {len(faults) - 12} more"] if len(faults) > 12 else [])]
        raise ContentError(
            f"{llama} and {eva}: do not fit the recipe's model, {len(faults)} faults; nothing was "
            "written\n  " + "\n  ".join(shown)
        )
    sections = ("vision", "causal", "language")
    return Plan(
        title=f"{llama} and {eva} -> a start for pretraining",
        made=tuple(sorted(made, key=lambda part: part.target)),
        left_out=(*trunk.left_out, *tower.left_out),
        kept=tower.kept,
        texts=describe("emu", Sizes(config, sections), config),
    )


def grown(table: Made, rows: int, words: Rows) -> Made:
    """A table of tokens with more rows.

    Args:
        table: the rows there are.
        rows: rows there shall be.
        words: new row -> rows whose mean it begins with; the others begin with the mean of all.
    """
    old = table.info.shape[0]

    def make() -> Tensor:
        have = table.make()
        new = have.new_empty(rows - old, have.shape[1])
        new[:] = _mean_row(have)
        for row, pieces in words.items():
            new[row - old] = have[list(pieces)].float().mean(0)
        return torch.cat([have, new])

    named = sorted(words)
    like = f", {', '.join(f'{row} as {list(words[row])}' for row in named)}" if named else ""
    how = f"rows {old}-{rows - 1} added: mean of the {old}{like}"
    return Made(
        table.target,
        TensorInfo((rows, *table.info.shape[1:]), table.info.dtype),
        make,
        table.sources,
        how,
    )


def _mean_row(table: Tensor) -> Tensor:
    """Mean over the rows in float64, without a wide copy of the table."""
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for part in torch.split(table, _CHUNK_ROWS):
        total += part.double().sum(0)
    return (total / len(table)).to(table.dtype)


def _bad_rows(name: str, old: int, rows: int, words: Rows) -> list[str]:
    return [
        f"--new-token: row {row} of {name} is not new, or not there: new are {old} to {rows - 1}"
        for row in words
        if not old <= row < rows
    ] + [
        f"--new-token: word rows {list(pieces)} of {name}: there are {old}"
        for pieces in words.values()
        if not pieces or max(pieces) >= old
    ]


def _drawn(name: str, shape: tuple[int, ...], config: EmuConfig, seed: int) -> Made:
    rules = EMU.initial(config)
    info = TensorInfo(shape, torch.float32)
    how = f"drawn by name, seed {seed}"
    return Made(name, info, lambda: draw_by_name(name, shape, rules, seed), (), how)


def _other_settings(trunk: Plan, config: EmuConfig) -> Iterable[str]:
    """What shapes do not show and the recipe must share with the LLaMA."""
    language = json.loads(trunk.texts[DESCRIPTION])["model"]["language"]
    for key in _SETTINGS:
        ours, theirs = getattr(config.language, key), language[key]
        if ours != theirs:
            yield f"model.language.{key}: the recipe has {ours}, the LLaMA {theirs}"
