"""Looking at the packs of a recipe before training on them."""

from pathlib import Path

import torch

from mmtrain import feed, supply
from mmtrain.data.assemble import Assembler
from mmtrain.data.look import make_folder, open_board, show
from mmtrain.data.picture import draw_pack
from mmtrain.decoder.conditions import Samples
from mmtrain.decoder.job import look_at_pairs
from mmtrain.errors import ExitCode
from mmtrain.settings import Phase, Recipe


def look(recipe: Recipe, packs: int, out: Path, board: Path | None = None) -> int:
    """Draw the first packs of a recipe as PNG pictures into `out`, and for TensorBoard."""
    setting = feed.read_setting(recipe)
    sources = setting.sources
    mixture = supply.mixture_of(recipe, sources)
    make_folder(out)
    if recipe.phase is Phase.decoder:
        samples = Samples(recipe, setting.vocabulary, setting.layout, torch.device("cpu"))
        return look_at_pairs(samples, mixture, packs, out)
    plan = feed.make_plan(setting, mixture)
    assembler = Assembler(
        sources=sources,
        vocabulary=setting.vocabulary,
        layout=setting.layout,
        pack_tokens=recipe.data.pack_tokens,
    )
    with open_board(board) as writer:
        first = recipe.data.plan_from_step * recipe.train.global_batch_packs
        for number in range(first, first + packs):
            batch, failures, _ = assembler.batch([plan.pack(number)])
            path = out / f"pack-{number:05d}.png"
            page = draw_pack(batch, setting.vocabulary, setting.layout)
            page.save(path)
            show(writer, "data/packs", page, number)
            fill = batch.info.tokens / recipe.data.pack_tokens
            print(
                f"{path}: {len(batch.info.sample_ids)} documents, {batch.info.images} images, "
                f"{batch.info.tokens} tokens (fill {fill:.2f}), {len(failures)} left out"
            )
    return ExitCode.DONE
