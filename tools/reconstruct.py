#!/usr/bin/env python
"""What a VAE makes of held-out pictures: errors, latent statistics, and a picture to look at.

    tools/reconstruct.py configs/transfusion/shapes_vae.yaml vae reconstructed.png

The sheet holds pictures and, below each, what the VAE makes of the mode of its posterior.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from mmtrain import log
from mmtrain.data import images
from mmtrain.encoders import vae as vaes
from mmtrain.encoders.vae import Vae
from mmtrain.errors import ContentError, MmtrainError, RecipeError
from mmtrain.feed import Setting, open_sources, read_setting
from mmtrain.recipe import load

_COLUMNS, _CELL = 16, 96  # of the sheet; pixels a side of a picture on it


def main() -> int:
    """Reconstruct and say how well."""
    options = _parser().parse_args()
    log.start(0, 1)
    try:
        return _reconstruct(options)
    except RecipeError as error:
        print(*(f"mmtrain: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return int(error.exit_code)
    except MmtrainError as error:
        print(f"mmtrain: {error}", file=sys.stderr)
        return int(error.exit_code)


def _reconstruct(options: argparse.Namespace) -> int:
    setting = read_setting(load(options.recipe, options.overrides))
    vae = Vae(options.vae, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pixels = _pictures(setting, options.pictures)
    latents = vaes.mode(vae.encode(pixels))
    found = vae.decode(latents).cpu().clamp(-1, 1)
    error = found - pixels
    decibels = 10 * (4 / error.square().mean((1, 2, 3)).clamp_min(1e-10)).log10()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    print(f"{len(pixels)} held-out pictures: mean absolute error {error.abs().mean():.4f} of -1..1")
    print(f"PSNR {decibels.mean():.2f} dB, worst {decibels.min():.2f} dB")
    print("latents, mean:", *(f"{value:.3f}" for value in mean.tolist()))
    print("latents, std: ", *(f"{value:.3f}" for value in std.tolist()))
    _sheet(setting, pixels, found).save(options.out)
    print(options.out)
    return 0


def _pictures(setting: Setting, count: int) -> torch.Tensor:
    """The first pictures of the held-out sources, or of the sources where none is held out."""
    data = setting.recipe.data
    sources = open_sources(setting, data.heldout or data.sources)
    blobs = (
        blob
        for source in sources
        for number in range(len(source.lengths))
        for part in source.documents.document(number).parts
        for blob in part.media
    )
    found = [images.decode(blob, setting.layout) for blob in islice(blobs, count)]
    if not found:
        raise ContentError("data.heldout: holds no picture; name sources with pictures")
    return torch.stack(found)


def _sheet(setting: Setting, pixels: torch.Tensor, found: torch.Tensor) -> Image.Image:
    count = min(len(pixels), 4 * _COLUMNS)
    rows = -(-count // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, 2 * rows * _CELL), "white")
    for number in range(count):
        row, column = divmod(number, _COLUMNS)
        for below, picture in enumerate((pixels[number], found[number])):
            shown = images.to_picture(picture, setting.layout).resize((_CELL - 4, _CELL - 4))
            sheet.paste(shown, (column * _CELL, (2 * row + below) * _CELL))
    return sheet


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="whose held-out pictures")
    parser.add_argument("vae", type=Path, metavar="VAE", help="folder of a diffusers VAE")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="picture to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument(
        "--pictures", type=int, default=256, metavar="N", help="how many; default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
