"""Convert weights of other people to full tensors of mmtrain, and back.

    python tools/convert_checkpoint.py import KIND SOURCE OUT
    python tools/convert_checkpoint.py export KIND FOLDER OUT
    python tools/convert_checkpoint.py start --llama DIR --eva FILE --recipe YAML OUT

Strict: every tensor of the source is used, left out by a rule that says why, or an error; every
tensor of the target is made. One tensor is in memory at a time. Nothing is overwritten, and nothing
stands under its name before it is whole. --dry-run prints the plan and writes nothing.

Full tensors are a folder of safetensors with an index, by canonical names; a recipe starts from it
by train.initialize_from. See docs/conversion.md.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmtrain.convert.assemble import NewToken, rows_of, start
from mmtrain.convert.canonical import open_canonical
from mmtrain.convert.kinds import (
    EXPORTS,
    IMPORTS,
    Export,
    Form,
    Import,
    Options,
    convert,
    open_for,
)
from mmtrain.convert.plan import Plan
from mmtrain.convert.release import Adapters
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.errors import ExitCode, MmtrainError, RecipeError
from mmtrain.export import described
from mmtrain.recipe import read

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GIGABYTE = 1 << 30

_EPILOG = """\
examples:
  %(prog)s import emu Emu-pretrain.pt emu_full --dry-run
  %(prog)s import emu-instruct Emu-instruct.pt instruct_merged --merge-lora
  %(prog)s export emu runs/emu_14b pytorch_model.bin
  %(prog)s import unet stable-diffusion-v1-5/unet unet_5120 --width 5120
  %(prog)s start --llama llama-13b --eva EVA01_CLIP_g_14_psz14_s11B.pt \\
      --recipe configs/emu/14b_pretrain.yaml emu_start

exit codes: 0 done; 2 the command is wrong; 65 weights are invalid or do not fit; 66 something is
missing; 74 cannot be written. Nothing is written unless the code is 0.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.handle(arguments))
    except RecipeError as error:
        print("\n".join(f"convert_checkpoint: {p}" for p in error.problems), file=sys.stderr)
        return int(error.exit_code)
    except MmtrainError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return int(error.exit_code)


def _import(arguments: argparse.Namespace) -> int:
    kind: Import = IMPORTS[arguments.kind]
    plan = kind.plan(arguments.source, _options(arguments))
    return _finish(arguments, plan, kind.form, "")


def _export(arguments: argparse.Namespace) -> int:
    kind: Export = EXPORTS[arguments.kind]
    folder = open_for(arguments.kind, arguments.source, described(arguments.source))
    plan = kind.plan(folder, _options(arguments))
    return _finish(arguments, plan, kind.form, kind.name)


def _start(arguments: argparse.Namespace) -> int:
    recipe = read(arguments.recipe)
    words = [NewToken.parse(text) for text in arguments.new_token]
    tokenizer = arguments.tokenizer or Path(recipe.data.tokenizer)
    by_name = any(not part.startswith("#") for new in words for part in (new.token, new.word))
    vocabulary = load_vocabulary(tokenizer) if by_name else None
    seed = recipe.seed if arguments.seed is None else arguments.seed
    plan = start(arguments.llama, arguments.eva, recipe.model, seed, rows_of(words, vocabulary))
    return _finish(arguments, plan, Form.shards, "")


def _finish(arguments: argparse.Namespace, plan: Plan, form: Form, name: str) -> int:
    dtype = DTYPES.get(arguments.dtype or "")
    for remark in plan.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if arguments.dry_run:
        print(plan.to(dtype).table())
        print("dry run: nothing was written")
        return ExitCode.DONE
    limit = int(arguments.shard_gb * GIGABYTE)
    convert(plan, form, name, arguments.out, dtype, limit)
    left = f", {len(plan.left_out)} left out" if plan.left_out else ""
    kept = f" ({len(plan.kept)} of them kept aside)" if plan.kept else ""
    print(f"{arguments.out}: {len(plan.made)} tensors{left}{kept}")
    return ExitCode.DONE


def _options(arguments: argparse.Namespace) -> Options:
    given = vars(arguments)
    base, recipe = given.get("base"), given.get("recipe")
    return Options(
        config=read(recipe).model if recipe else None,
        adapters=Adapters.merge if given.get("merge_lora") else Adapters.keep,
        alpha=given.get("alpha"),
        base=open_canonical(base, described(base)) if base else None,
        width=given.get("width"),
        heads=given.get("heads"),
        seed=given.get("seed") or 0,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ways = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    incoming = ways.add_parser("import", help="other people's weights to full tensors")
    kinds = incoming.add_subparsers(title="kinds", metavar="KIND", required=True, dest="kind")
    for name, kind in IMPORTS.items():
        made = _kind(kinds, name, kind.summary, "file or folder to read")
        _takes(made, kind.options)
        _takes_output(made, _import)
    outgoing = ways.add_parser("export", help="full tensors, or a run, to other people's weights")
    kinds = outgoing.add_subparsers(title="kinds", metavar="KIND", required=True, dest="kind")
    for name, kind_out in EXPORTS.items():
        made = _kind(kinds, name, kind_out.summary, "full tensors, a run or a checkpoint of one")
        _takes(made, kind_out.options)
        _takes_output(made, _export)
    _takes_start(ways.add_parser("start", help="what Emu's pretraining starts from"))
    return parser


def _kind(kinds: Any, name: str, summary: str, source: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = kinds.add_parser(name, help=summary, description=summary)
    made.add_argument("source", type=Path, metavar="SOURCE", help=source)
    made.add_argument("out", type=Path, metavar="OUT", help="folder or file to make")
    return made


def _takes(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in names:
        parser.add_argument(f"--{name}", **_OPTIONS[name])


def _takes_output(
    parser: argparse.ArgumentParser, handle: Callable[[argparse.Namespace], int]
) -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights; kept if left out")
    parser.add_argument(
        "--shard-gb", type=_positive, default=4.0, metavar="G", help="of a shard; default: 4"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.set_defaults(handle=handle)


def _takes_start(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A whole Emu from a LLaMA and an EVA-CLIP file: the C-Former and the regression head are "
        "drawn by name, rows of new tokens begin as the mean of the rows there are."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--llama", type=Path, required=True, metavar="DIR", help="of Hugging Face or of Meta"
    )
    parser.add_argument("--eva", type=Path, required=True, metavar="FILE", help="EVA-CLIP")
    parser.add_argument(
        "--recipe", type=Path, required=True, metavar="YAML", help="whose model is made"
    )
    parser.add_argument("--seed", **_OPTIONS["seed"] | {"help": "the recipe's if left out"})
    parser.add_argument(
        "--new-token",
        action="append",
        default=[],
        metavar="TOKEN=WORD",
        help='the row of a new token begins as a word\'s rows: "[USER]=user"; either may be an id, '
        '"#32004=#1404"; may be repeated',
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="for --new-token; the recipe's if left out"
    )
    _takes_output(parser, _start)


def _positive(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a number above 0")
    return value


def _whole(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted: a whole number from 1")
    return int(word)


_OPTIONS: dict[str, dict[str, Any]] = {
    "recipe": {"type": Path, "metavar": "YAML", "help": "whose sizes the source must have"},
    "merge-lora": {"action": "store_true", "help": "fold adapters into the weights"},
    "alpha": {"type": _positive, "metavar": "A", "help": "of the adapters, where nothing tells it"},
    "base": {"type": Path, "metavar": "FOLDER", "help": "full tensors that adapters stand beside"},
    "width": {"type": _whole, "metavar": "W", "help": "of what cross-attention shall read"},
    "heads": {"type": _whole, "metavar": "N", "help": "attention heads, where nothing tells them"},
    "seed": {"type": int, "metavar": "S", "help": "of what is drawn; default: 0"},
}


if __name__ == "__main__":
    sys.exit(main())
