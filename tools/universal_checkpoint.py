#!/usr/bin/env python
"""Checkpoints in DeepSpeed's universal format: a run's out, and back in.

    tools/universal_checkpoint.py out runs/14b 14b_universal                  canonical names
    tools/universal_checkpoint.py out runs/14b 14b_universal --names engine   mmtrain's engine's
    tools/universal_checkpoint.py in 14b_universal runs/14b_back    with runs/14b_back/recipe.yaml

Weights, masters, moments, running means and steps come along, one tensor at a time; nothing is
overwritten, and no code of a pickle is run. What `in` has written, `mmtrain train` goes on from
under any layout.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch

from mmtrain import log
from mmtrain import recipe as recipes
from mmtrain.checkpoint.portable import trained_checkpoint
from mmtrain.convert import universal, universal_reader
from mmtrain.errors import MissingError, MmtrainError
from mmtrain.facts import Facts, collect
from mmtrain.settings import Precision
from mmtrain.train.optim import all_groups


def main() -> int:
    """Convert and say what was done."""
    options = _parser().parse_intermixed_args()
    log.start(0, 1)
    try:
        return _out(options) if options.way == "out" else _in(options)
    except MmtrainError as error:
        print(f"mmtrain: {error}", file=sys.stderr)
        return int(error.exit_code)


def _out(options: argparse.Namespace) -> int:
    checkpoint = trained_checkpoint(options.source, options.checkpoint)
    facts = _facts(options.source, options.overrides)
    layout = facts.recipe.parallel
    names, fillers = {name: name for layer in facts.census for name in layer.shapes}, 0
    if options.names == "engine":
        partitioned = layout.zero_stage == 3
        staged = layout.pipeline > 1
        names = universal.engine_names(
            facts.census, lambda layer: facts.is_recomputed(layer) + partitioned, staged
        )
        fillers = len(all_groups(facts.recipe.optimizer)) if staged else 0
    made = universal.write(checkpoint, options.target, names, facts.spec.plan, fillers)
    print(f"{checkpoint} -> {made}: {len(names)} parameters")
    return 0


def _in(options: argparse.Namespace) -> int:
    facts = _facts(options.target, options.overrides)
    recipe = facts.recipe
    model = universal.Model(
        census=facts.census,
        plan=facts.spec.plan,
        is_trained=facts.is_trained,
        dtype=torch.bfloat16 if recipe.train.precision is Precision.bf16 else torch.float32,
    )
    digest = hashlib.sha256(recipes.to_yaml(recipe).encode()).hexdigest()
    root = options.target / "checkpoints"
    made = universal_reader.read(options.source, root, model, digest, options.step)
    print(f"{options.source} -> {made}: {len(model.shapes)} parameters")
    return 0


def _facts(run: Path, overrides: list[str]) -> Facts:
    path = run / "recipe.yaml"
    if not path.is_file():
        raise MissingError(f"{path}: not found; it says what the model is: copy the recipe there")
    return collect(recipes.read(path, overrides))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=("out", "in"))
    parser.add_argument("source", type=Path, metavar="FROM", help="a run; a universal checkpoint")
    parser.add_argument("target", type=Path, metavar="TO", help="a new folder; a run's folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="the recipe, as in parallel.zero_stage=3"
    )
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="out: as in step-00000100; the newest if left out"
    )
    parser.add_argument(
        "--names",
        choices=("canonical", "engine"),
        default="canonical",
        help="out: of parameters; engine = in mmtrain's DeepSpeed engine of the recipe's layout",
    )
    parser.add_argument("--step", type=int, metavar="N", help="in: of the run, if not as it says")
    return parser


if __name__ == "__main__":
    sys.exit(main())
