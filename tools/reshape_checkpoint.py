#!/usr/bin/env python
"""Cut a run's checkpoint for another layout, so that every rank reads one file of its own.

    tools/reshape_checkpoint.py runs/14b runs/14b_tp4 --ranks 64 parallel.tensor=4
    mmtrain train runs/14b_tp4/recipe.yaml

Weights, running means, masters and moments come along, number by number; memory holds one piece of
one parameter. (Without it, `mmtrain train` reads checkpoints of any layout as they are.)
"""

import argparse
import sys
from pathlib import Path

from mmtrain import log
from mmtrain import recipe as recipes
from mmtrain.checkpoint.portable import trained_checkpoint
from mmtrain.checkpoint.reshape import reshape
from mmtrain.errors import MmtrainError
from mmtrain.facts import collect
from mmtrain.layout.dims import dims_for


def main() -> int:
    """Reshape and say what was done."""
    options = _parser().parse_intermixed_args()
    log.start(0, 1)
    try:
        return _reshape(options)
    except MmtrainError as error:
        print(f"mmtrain: {error}", file=sys.stderr)
        return int(error.exit_code)


def _reshape(options: argparse.Namespace) -> int:
    recipe = recipes.read(
        options.run / "recipe.yaml",
        [*options.overrides, f"name={options.out.name}", f"output={options.out.parent}"],
        options.ranks,
    )
    checkpoint = trained_checkpoint(options.run, options.checkpoint)
    layout = recipe.parallel
    dims = dims_for(
        options.ranks,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        zero_stage=layout.zero_stage,
        sequence=layout.sequence,
    )
    made = reshape(checkpoint, options.out / "checkpoints", dims, collect(recipe).stages())
    (options.out / "recipe.yaml").write_text(recipes.to_yaml(recipe))
    print(f"{checkpoint} -> {made}: {dims}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as in runs/demo")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the run to make")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="the layout, as in parallel.tensor=2"
    )
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks it is cut for")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="as in step-00000100; the newest if left out"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
