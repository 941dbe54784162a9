"""Faults of the decoder phase of a recipe, across its keys and against the frozen model."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mmtrain.data.latent_statistics import MANIFEST
from mmtrain.data.rules import Rule
from mmtrain.data.vocabulary import fingerprint_of
from mmtrain.encoders.vae import read_facts
from mmtrain.errors import MmtrainError, Problem
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.decoder import UNetConfig
from mmtrain.schema import join
from mmtrain.settings import Condition, DecoderConfig, Null, Phase, Recipe, Recompute

Read = Callable[[Path], tuple[Recipe | None, int]]  # a recipe and how many faults it has


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Faults of a recipe of the decoder phase in itself."""
    yield from _layout(recipe)
    yield from _data(recipe)
    yield from _numbers(recipe.decoder)
    config = recipe.decoder
    if config.language is None and config.cached is None:
        yield Problem(
            "decoder.language",
            "missing; name the run, checkpoint or export of the frozen model, or with "
            "decoder.cached the folder of conditions that it made",
        )
    if config.condition is Condition.encoder and config.unconditional is Null.prompt:
        yield Problem(
            "decoder.unconditional",
            "prompt is written after a text, but decoder.condition = encoder reads pictures; use "
            "zeros",
        )
    if config.vae is None and recipe.model.sample_channels != 3:
        yield Problem(
            "model.sample_channels",
            f"found {recipe.model.sample_channels}, but decoder.vae is null, so pixels are "
            "diffused; use 3, or name a VAE",
        )


def _layout(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    split = ("tensor", parallel.tensor), ("pipeline", parallel.pipeline)
    for key, count in split:
        if count > 1:
            yield Problem(
                f"parallel.{key}",
                f"found {count}; the UNet is one layer that is not split: use 1, and "
                "parallel.zero_stage = 3 where it must be spread over the data ranks",
            )
    if parallel.recompute is not Recompute.none:
        yield Problem(
            "parallel.recompute",
            f"found {parallel.recompute.name}; the UNet is one layer, nothing of it is computed "
            "again: use none, and smaller micro-batches",
        )


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.pack_images != 1:
        yield Problem(
            "data.pack_images",
            f"found {data.pack_images}; in the decoder phase a pack is one picture with its text: "
            "use 1",
        )
    for table in ("sources", "heldout"):
        for name, source in getattr(data, table).items():
            if source.rule is not Rule.pair:
                yield Problem(
                    join(f"data.{table}", name) + ".rule",
                    f"found {source.rule.name}; the decoder learns from single pictures with "
                    "their texts: use pair, or take the source out with null",
                )


def _numbers(config: DecoderConfig) -> Iterator[Problem]:
    if not 0 <= config.drop < 1:
        yield Problem("decoder.drop", f"found {config.drop}; allowed: 0 or more, below 1")
    for key in ("condition_scale", "beta_start", "beta_end", "noise_steps"):
        if not getattr(config, key) > 0:
            yield Problem(f"decoder.{key}", f"found {getattr(config, key)}; allowed: above 0")
    if config.snr_limit and not config.snr_limit >= 1:
        yield Problem(
            "decoder.snr_limit", f"found {config.snr_limit}; allowed: 0, or 1 and more, as in 20"
        )
    if config.longest_text < 0:
        yield Problem("decoder.longest_text", f"found {config.longest_text}; allowed: 0 or more")
    if config.draw.pictures < 0:
        yield Problem("decoder.draw.pictures", f"found {config.draw.pictures}; allowed: 0 or more")
    if not 1 <= config.draw.steps <= max(1, config.noise_steps):
        yield Problem(
            "decoder.draw.steps",
            f"found {config.draw.steps}; allowed: 1 to decoder.noise_steps = {config.noise_steps}",
        )


def recipe_of_language(config: DecoderConfig) -> Path:
    """The recipe of the frozen model: as named, else that of the run it belongs to."""
    if config.recipe is not None:
        return Path(config.recipe)
    folder = Path(config.language or "")
    if (folder / "manifest.json").is_file():  # RUN/checkpoints/step-00000100
        folder = folder.parent.parent
    return folder / "recipe.yaml"


def missing(recipe: Recipe, read: Read) -> Iterator[Problem]:
    """What the decoder phase needs and is not there, or does not fit the recipe.

    Args:
        recipe: of the decoder.
        read: reads another recipe, and counts its faults.
    """
    config = recipe.decoder
    if config.vae is not None:
        yield from _vae(recipe.model, Path(config.vae))
    if config.cached is not None and not (Path(config.cached) / MANIFEST).is_file():
        yield Problem(
            "decoder.cached",
            f"there is no {Path(config.cached) / MANIFEST}; make it with "
            f"tools/encode_latents.py RECIPE {config.cached}",
        )
    if config.language is not None:
        yield from _language(recipe, read)


def _vae(model: UNetConfig, folder: Path) -> Iterator[Problem]:
    try:
        facts = read_facts(folder)
    except MmtrainError as error:
        yield Problem("decoder.vae", str(error))
        return
    if facts.channels != model.sample_channels:
        yield Problem(
            "model.sample_channels",
            f"found {model.sample_channels}, but latents of decoder.vae have {facts.channels} "
            "channels",
        )


def _language(recipe: Recipe, read: Read) -> Iterator[Problem]:
    config, model = recipe.decoder, recipe.model
    assert config.language is not None
    if not Path(config.language).is_dir():
        yield Problem("decoder.language", f"there is no folder {config.language}")
        return
    path = recipe_of_language(config)
    if not path.is_file():
        yield Problem(
            "decoder.recipe",
            f"there is no {path}; name the recipe that decoder.language was trained by",
        )
        return
    found, faults = read(path)
    if found is None or faults:
        yield Problem("decoder.recipe", f"{path} has faults; see mmtrain check {path}")
        return
    if found.phase is Phase.decoder or not isinstance(found.model, EmuConfig):
        yield Problem("decoder.language", f"{path} is the recipe of no model that writes images")
        return
    sizes: EmuConfig = found.model
    if model.conditions != sizes.causal.queries:
        yield Problem(
            "model.conditions",
            f"found {model.conditions}, but decoder.language writes {sizes.causal.queries} rows "
            "for an image",
        )
    if model.condition_width != sizes.language.width:
        yield Problem(
            "model.condition_width",
            f"found {model.condition_width}, but the rows of decoder.language are "
            f"{sizes.language.width} wide",
        )
    for table in ("sources", "heldout"):
        for name, source in getattr(recipe.data, table).items():
            if source.max_tokens > sizes.language.context:
                yield Problem(
                    join(f"data.{table}", name) + ".max_tokens",
                    f"{source.max_tokens} positions are more than the context of "
                    f"decoder.language, {sizes.language.context}",
                )
    own, other = Path(recipe.data.tokenizer), Path(found.data.tokenizer)
    if own.is_dir() and other.is_dir() and fingerprint_of(own) != fingerprint_of(other):
        yield Problem(
            "data.tokenizer",
            f"{own} differs from {other}, the tokenizer of decoder.language; use that one",
        )
