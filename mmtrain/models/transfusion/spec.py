"""What Transfusion declares to the platform: plan, initial weights, costs, faults, sequences.

Source: arXiv:2408.11039; no code or weights of it were published.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path as File

import torch
from torch import Tensor, nn

from mmtrain.data import latent_statistics
from mmtrain.data.latent_statistics import MANIFEST
from mmtrain.data.tokens import SPECIAL_TOKENS, SequenceFormat
from mmtrain.errors import ContentError, Problem, RecipeError
from mmtrain.layout.plan import Cut, TensorPlan
from mmtrain.models.spec import BatchShape, ModelSpec, StoredLatents
from mmtrain.models.transfusion.config import (
    Edge,
    ImageAttention,
    ImageConfig,
    TransfusionConfig,
)
from mmtrain.models.transfusion.edges import beside_numbers, edge_in, edge_out
from mmtrain.models.transfusion.generate import TransfusionSampler
from mmtrain.models.transfusion.model import layers
from mmtrain.models.transfusion.noising import FIELDS, IMAGE, TEXT, Noising
from mmtrain.nn.diffusion import Answer, Path, Solver
from mmtrain.nn.init import InitialRules, constant, normal, torch_defaults
from mmtrain.nn.lora import LoraConfig
from mmtrain.nn.products import flops_of
from mmtrain.nn.trunk import (
    HEAD_PLAN,
    TRUNK_PLAN,
    block_flops,
    divides,
    positive,
    trunk_problems,
    trunk_rules,
    trunk_split_lengths,
)

# the edges are whole on every tensor rank but for the matrix that leaves the trunk, whose rows of
# a gradient would otherwise be summed over ranks that all computed them
PLAN = TensorPlan({**TRUNK_PLAN, **HEAD_PLAN, "head.edge.project": Cut.COLUMN_GATHERED})


@lru_cache(maxsize=8)
def initial(config: TransfusionConfig) -> InitialRules:
    """LLaMA's trunk; linear edges normal 0.02, U-Net edges as torch does; the first answer is 0."""
    image, width = config.image, config.language.width
    if image.edge is Edge.linear:
        edges: InitialRules = [
            ("head.edge.project.{weight,bias}", constant(0.0)),
            ("image.edge.{project,time.up,time.out}.weight", normal(0.02)),
            ("image.edge.{project,time.up,time.out}.bias", constant(0.0)),
        ]
    else:
        with torch.device("meta"):
            down, up = edge_in(image, width), edge_out(image, width)
        edges = [
            ("head.edge.leave.{weight,bias}", constant(0.0)),
            *torch_defaults(down, "image.edge"),
            *torch_defaults(up, "head.edge"),
        ]
    std = image.tables_std
    grid: InitialRules = [] if std is None else [("image.grid.{lines,columns}", normal(std))]
    return [*trunk_rules(), *edges, *grid]


def flops(config: TransfusionConfig, shape: BatchShape) -> list[float]:
    """Forward matrix-product operations (a multiply-add is 2) of each layer, in order."""
    language = config.language
    enter, leave = _edge_flops(config.image, language.width)
    return [
        shape.images * config.copies * enter,
        0.0,
        *[block_flops(language, LoraConfig(), shape.tokens)] * language.layers,
        2.0 * shape.tokens * language.width * language.vocabulary + shape.images * leave,
    ]


@lru_cache(maxsize=8)
def _edge_flops(config: ImageConfig, width: int) -> tuple[float, float]:
    """Of both halves of the edge, for one image."""

    def enter(edge: nn.Module) -> Tensor:
        latents = torch.empty(1, config.channels, config.size, config.size)
        rows: Tensor = edge(latents, torch.zeros(1, dtype=torch.int64))
        return rows

    def leave(edge: nn.Module) -> Tensor:
        rows = torch.empty(1, config.rows, width)
        answer: Tensor = edge(rows, torch.empty(1, beside_numbers(config)))
        return answer

    return (
        flops_of(lambda: edge_in(config, width), enter),
        flops_of(lambda: edge_out(config, width), leave),
    )


def problems(config: TransfusionConfig, tensor: int) -> Iterator[Problem]:
    """Faults of the `model:` section under `tensor` tensor ranks."""
    yield from trunk_problems(config.language, SPECIAL_TOKENS)
    yield from positive("model.image", config.image)
    if config.image.patch > 0:
        yield from _image_problems(config.image)
        least = config.group_rows + 5
        if config.language.context < least:
            yield Problem(
                "model.language.context",
                f"found {config.language.context}; one image of {config.group_rows} rows, its "
                f"marks, <s>, </s> and a word take {least} positions",
            )
    yield from _noise_problems(config)
    for where, value in [*trunk_split_lengths(config.language), _leaving(config.image)]:
        yield from divides(where, value, "parallel.tensor", tensor)


def _leaving(image: ImageConfig) -> tuple[str, int]:
    """Outputs of the matrix that leaves the trunk, which tensor ranks share."""
    if image.edge is Edge.linear:
        return "model.image.patch", image.values
    return "model.image.unet_channels", (0, *image.unet_channels)[-1]


def _image_problems(image: ImageConfig) -> Iterator[Problem]:
    yield from divides("model.image.size", image.size, "patch", image.patch)
    if (image.vae is None) != (image.factor == 1):
        yield Problem(
            "model.image.factor",
            f"found {image.factor} with model.image.vae = {image.vae}; pixels are their own "
            "latents (factor 1, vae null), a VAE's stand for more (factor 8 as a rule)",
        )
    if image.latents is not None and image.vae is None:
        yield Problem(
            "model.image.latents",
            f"found {image.latents} without model.image.vae; name the VAE that made them: its hash "
            "is compared, and pictures are drawn by it",
        )
    yield from _statistics_problems(image)
    if image.vae is None and image.channels != 3:
        yield Problem(
            "model.image.channels", f"found {image.channels}; without model.image.vae use 3"
        )
    if image.edge is not Edge.unet:
        return
    if image.patch & (image.patch - 1) or len(image.unet_channels) != image.levels:
        yield Problem(
            "model.image.unet_channels",
            f"{len(image.unet_channels)} levels for model.image.patch = {image.patch}; a patch of "
            "1, 2, 4, 8 takes 1, 2, 3, 4 levels, each of which halves the size",
        )
    if min(image.unet_channels, default=1) <= 0:
        yield Problem(
            "model.image.unet_channels",
            f"found {list(image.unet_channels)}; wanted: positive numbers",
        )
    for place, divisor in (
        ("norm_groups", image.norm_groups),
        ("unet_head_width", image.unet_head_width),
    ):
        odd = [width for width in image.unet_channels if divisor > 0 and width % divisor]
        if odd:
            yield Problem(
                f"model.image.{place}",
                f"{divisor} does not divide model.image.unet_channels {odd}; use a common divisor",
            )


def _statistics_problems(image: ImageConfig) -> Iterator[Problem]:
    mean, std = image.latent_mean, image.latent_std
    if not mean and not std:
        return
    if image.vae is None:
        yield Problem(
            "model.image.latent_mean",
            "given without model.image.vae; pixels are not normalised: leave it out",
        )
    for key, values in (("latent_mean", mean), ("latent_std", std)):
        if len(values) != image.channels:
            yield Problem(
                f"model.image.{key}",
                f"{len(values)} numbers for model.image.channels = {image.channels}; give one a "
                "channel, of latent_mean and of latent_std, or of neither",
            )
    if min(std, default=1.0) <= 0:
        yield Problem("model.image.latent_std", f"found {min(std)}; it must be positive")


def _noise_problems(config: TransfusionConfig) -> Iterator[Problem]:
    noise = config.noise
    if noise.path is Path.linear and noise.answer is Answer.epsilon:
        yield Problem(
            "model.noise.answer",
            "epsilon under model.noise.path = linear leaves nothing of the picture at the last "
            "time; use velocity or clean",
        )
    if noise.steps < 1:
        yield Problem("model.noise.steps", f"found {noise.steps}; it must be positive")
    for place, value in (("limit", noise.limit), ("solver_steps", noise.solver_steps)):
        if not 1 <= value <= noise.steps:
            yield Problem(
                f"model.noise.{place}",
                f"found {value}; allowed: 1 to model.noise.steps = {noise.steps}",
            )
    if noise.snr_limit and (noise.snr_limit < 1 or noise.answer is Answer.epsilon):
        yield Problem(
            "model.noise.snr_limit",
            f"found {noise.snr_limit} with model.noise.answer = {noise.answer.value}; allowed: 0, "
            "or 1 and more, as in 20, with clean or velocity",
        )
    if not 0 <= noise.drop < 1:
        yield Problem("model.noise.drop", f"found {noise.drop}; allowed: 0 or more, below 1")
    if not 0 < noise.all_noised <= 1:
        yield Problem(
            "model.noise.all_noised",
            f"found {noise.all_noised}; allowed: above 0, because images that text follows are "
            "learnt in no other document, up to 1",
        )
    if not noise.clean_limit > 0:
        yield Problem(
            "model.noise.clean_limit", f"found {noise.clean_limit}; allowed: above 0; 1 for pixels"
        )


def missing(config: TransfusionConfig) -> Iterator[Problem]:
    """The VAE and the stored latents, when their folders are not there."""
    folder, kept = config.image.vae, config.image.latents
    if kept is not None and not (File(kept) / MANIFEST).is_file():
        yield Problem(
            "model.image.latents",
            f"the folder {kept} holds no {MANIFEST}; make it with tools/encode_latents.py",
        )
    if folder is not None and not (File(folder) / "config.json").is_file():
        yield Problem(
            "model.image.vae",
            f"the folder {folder} holds no config.json; name the folder of a diffusers "
            "AutoencoderKL",
        )


def stored(config: TransfusionConfig, folder: File | None) -> StoredLatents | None:
    """Moments of every picture, where the recipe names a VAE and them, or a folder is given."""
    image = config.image
    kept = image.latents if folder is None else folder
    if kept is None or image.vae is None:
        return None
    form = (2 * image.channels, image.size, image.size)
    return StoredLatents(File(kept), File(image.vae), form)


def settled(config: TransfusionConfig) -> TransfusionConfig:
    """With the statistics that are recorded with the stored latents, unless the recipe has some.

    Raises:
        RecipeError: what is recorded is damaged.
    """
    image = config.image
    if image.latents is None or image.latent_mean or image.latent_std:
        return config
    try:
        found = latent_statistics.read(File(image.latents))
    except ContentError as error:
        text = f"{error}; make the folder anew with tools/encode_latents.py"
        raise RecipeError([Problem("model.image.latents", text)]) from error
    if found is None:
        return config
    return replace(config, image=replace(image, latent_mean=found.mean, latent_std=found.std))


def sequence(config: TransfusionConfig, ids: Mapping[str, int]) -> SequenceFormat:
    """How documents become token rows; pictures are cropped to squares in -1..1.

    The token that begins an image is learnt, so that the model chooses it; nothing is learnt from
    its own row, and the token that ends an image is never a target.
    """
    return SequenceFormat.of(
        ids,
        visual_tokens=config.group_rows,
        image_size=config.image.size * config.image.factor,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        crops_images=True,
        sees_whole_image=config.image.attention is ImageAttention.image,
        learns_image_begin=True,
    )


TRANSFUSION = ModelSpec(
    name="transfusion",
    config_type=TransfusionConfig,
    problems=problems,
    layers=layers,
    plan=PLAN,
    initial=initial,
    flops=flops,
    losses=(TEXT, IMAGE),
    fields=FIELDS,
    sequence=sequence,
    vocabulary_tables=("embed.tokens.weight", "head.unembed.weight"),
    context=lambda config: int(config.language.context),
    vocabulary=lambda config: int(config.language.vocabulary),
    prepare=Noising,
    stored=stored,
    sampler=TransfusionSampler,
    settled=settled,
    missing=missing,
    schedulers=tuple(solver.value for solver in Solver),
)
