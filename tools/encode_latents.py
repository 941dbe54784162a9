#!/usr/bin/env python
"""Make the conditions and latents of a recipe once, so that no step waits for them.

    tools/encode_latents.py configs/emu/shapes_decoder.yaml latents
    mmtrain train configs/emu/shapes_decoder.yaml decoder.cached=latents

    tools/encode_latents.py configs/transfusion/7b.yaml latents
    mmtrain train configs/transfusion/7b.yaml model.image.latents=latents

The frozen model writes the rows of every caption of every source (held-out ones too), the frozen
VAE, if there is one, encodes every picture. Of a family that diffuses inside its trunk the VAE
encodes every picture, and no rows are written; mean and deviation of each channel of the latents
are recorded in OUT/manifest.json, by which a run normalises them.

What is there already is not made again. Several processes may share the work, each with its own
device: --share 0/4, --share 1/4, ...
"""

import argparse
import sys
from pathlib import Path

import torch

from mmtrain import log
from mmtrain.data.latents import KINDS
from mmtrain.decoder.caching import Share, encode
from mmtrain.decoder.conditions import Samples
from mmtrain.decoder.pictures import encode_pictures
from mmtrain.errors import ContentError, MmtrainError, RecipeError
from mmtrain.feed import open_sources, read_setting
from mmtrain.recipe import load
from mmtrain.settings import Phase


def main() -> int:
    """Encode and say what was done."""
    options = _parser().parse_args()
    log.start(0, 1)
    try:
        return _encode(options)
    except RecipeError as error:
        print(
            *("mmtrain: " + str(problem) for problem in error.problems), sep="\n", file=sys.stderr
        )
        return int(error.exit_code)
    except MmtrainError as error:
        print(f"mmtrain: {error}", file=sys.stderr)
        return int(error.exit_code)


def _encode(options: argparse.Namespace) -> int:
    recipe = load(options.recipe, [*options.overrides, "decoder.cached=null"])
    setting = read_setting(recipe)
    data = recipe.data
    sources = open_sources(setting, data.sources) + open_sources(setting, data.heldout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = {"part_documents": options.part_documents, "share": options.share}
    if recipe.phase is Phase.decoder:
        samples = Samples(recipe, setting.vocabulary, setting.layout, device)
        done = encode(samples, sources, options.out, kind=options.dtype, **shared)
    elif (wanted := setting.spec.stored(recipe.model, options.out)) is not None:
        done = encode_pictures(wanted, setting.layout, sources, device=device, **shared)
    else:
        raise ContentError(
            f"{options.recipe}: family {recipe.family}, phase {recipe.phase.value}; wanted: the "
            "phase decoder, or a model that diffuses the latents of model.image.vae"
        )
    print(
        f"{options.out}: {done.made:,} documents encoded, {done.left_out:,} left out (no pair, or "
        f"a damaged picture), {done.there:,} were there"
    )
    return 0


def _share(word: str) -> Share:
    number, slash, of = word.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"found {word!r}; wanted K/N with K below N, as in 0/4")
    return Share(int(number), int(of))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="of the phase decoder, or transfusion"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make or to go on with")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument(
        "--dtype", choices=tuple(KINDS), default="fp32", help="of conditions; default: %(default)s"
    )
    parser.add_argument(
        "--part-documents",
        type=int,
        default=65536,
        metavar="N",
        help="documents written at a time; default: %(default)s",
    )
    parser.add_argument(
        "--share", type=_share, default=Share(), metavar="K/N", help="make every N-th part alone"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
