"""What a run of the decoder phase needs besides its engine: frozen models, samples, drawings.

A sample is a picture and its text. The frozen Emu makes the condition: the rows it writes after the
text (Emu), or those its encoder makes of the picture (Emu2's autoencoder). A frozen VAE makes the
latents; without one, pixels are diffused. Both run here, on each rank for its own share, or both
were run before and lie in shards (`data.latents`, `tools/encode_latents.py`).

N samples   Q condition rows a sample   D their width   C channels, h x w size of what is diffused
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mmtrain import recipe as recipes
from mmtrain.checkpoint import portable
from mmtrain.data import latents
from mmtrain.data.batch import Batch, Targets
from mmtrain.data.latents import Cache, Form, Known, KnownSource, Origin
from mmtrain.data.mixture import Draws, Mixture, Source
from mmtrain.data.pairs import PairAssembler, PairPlan, Pairs, cropped, squashed
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.decoder_faults import recipe_of_language
from mmtrain.encoders import vae as vaes
from mmtrain.encoders.vae import Vae
from mmtrain.errors import ContentError
from mmtrain.lineage import plan_seed
from mmtrain.models.emu.decoder import LOSS, UNetConfig
from mmtrain.models.emu.diffusion import Diffusion
from mmtrain.models.emu.generate import EmuSampler
from mmtrain.models.families import spec_of
from mmtrain.models.writing import Prompt
from mmtrain.nn.flow import Flow
from mmtrain.schema import to_plain
from mmtrain.settings import Condition, DecoderConfig, Fit, Latent, Null, Recipe
from mmtrain.supply import layout_of
from mmtrain.trained import load_layers

log = logging.getLogger(__name__)

_SQUARES = {Fit.crop: cropped, Fit.squash: squashed}


# --- frozen models -------------------------------------------------------------------------


@dataclass(frozen=True)
class Language:
    """The frozen model: its recipe and where its weights are; nothing is read before it is asked.

    Attributes:
        folder: run, checkpoint or export.
        recipe: what it was trained by.
        layout: special ids of the run's tokenizer, and how its tower sees pictures.
    """

    folder: Path
    recipe: Recipe
    layout: SequenceFormat

    @classmethod
    def find(cls, config: DecoderConfig, vocabulary: Vocabulary) -> "Language":
        """Read its recipe.

        Raises:
            RecipeError: the recipe has faults.
        """
        assert config.language is not None
        recipe = recipes.read(recipe_of_language(config))
        return cls(Path(config.language), recipe, layout_of(recipe, vocabulary))

    def identity(self) -> str:
        """Hash by which its weights are told from others."""
        return portable.identity(self.folder)

    def sizes(self) -> str:
        """Its `model:` section as JSON."""
        return json.dumps(to_plain(self.recipe.model), sort_keys=True)

    def sampler(self, device: torch.device) -> EmuSampler:
        """Load the weights."""
        tensors = portable.open_tensors(self.folder)
        spec = spec_of(self.recipe.family, self.recipe.phase)
        log.info("conditions: frozen model %s", self.folder)
        return EmuSampler(load_layers(spec, self.recipe.model, tensors, device), self.layout)


@dataclass(frozen=True)
class Frozen:
    """The frozen models of one rank.

    Attributes:
        config: how conditions and latents are made.
        sampler: writes or encodes conditions.
        vae: None when pixels are diffused.
    """

    config: DecoderConfig
    sampler: EmuSampler
    vae: Vae | None

    @cached_property
    def null_QD(self) -> Tensor:
        """The rows that stand for no condition, float32."""
        rows_QD = self._rollout([(self.sampler.form.bos,)])[0]
        return torch.zeros_like(rows_QD) if self.config.unconditional is Null.zeros else rows_QD

    def know(self, pairs: Pairs) -> Known:
        """Conditions `[N, Q, D]` and latents (or moments) of a micro-batch, float32."""
        assert pairs.pixels is not None
        return Known(self._conditions(pairs), self._latents(pairs.pixels))

    def _conditions(self, pairs: Pairs) -> Tensor:
        if pairs.seen is None:
            return self._rollout(pairs.prompts)
        with torch.inference_mode():
            rows_NQD = self.sampler.encode(pairs.seen)
        return rows_NQD.float().clone()  # what inference mode made cannot enter a backward pass

    def _rollout(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        return self.sampler.rollout([Prompt(prompt) for prompt in prompts]).float().clone()

    def _latents(self, pixels: Tensor) -> Tensor:
        if self.vae is None:
            return pixels.to(self.sampler.device)
        moments = self.vae.encode(pixels)
        return moments if self.config.latent is Latent.sample else vaes.mode(moments)


# --- samples -------------------------------------------------------------------------------


class Samples:
    """The data of a decoder run on one rank: plans, workers, and what the frozen models add."""

    def __init__(
        self,
        recipe: Recipe,
        vocabulary: Vocabulary,
        layout: SequenceFormat,
        device: torch.device,
    ) -> None:
        """Take a checked recipe; nothing is loaded yet.

        Args:
            recipe: of the decoder.
            vocabulary: its tokenizer, which is that of the frozen model.
            layout: `spec.sequence` of the decoder.
            device: of the frozen models.
        """
        self.recipe, self.config = recipe, recipe.decoder
        self.sizes: UNetConfig = recipe.model
        self.vocabulary, self.layout = vocabulary, layout
        self.language = None
        if self.config.language is not None:
            self.language = Language.find(self.config, vocabulary)
        self.device = device
        self._diffusion = Diffusion(self.config)

    @cached_property
    def frozen(self) -> Frozen:
        """The frozen models, loaded when they are first asked."""
        assert self.language is not None
        sampler = self.language.sampler(self.device)
        return Frozen(self.config, sampler, self.vae)

    @cached_property
    def vae(self) -> Vae | None:
        """The frozen VAE, if there is one."""
        return None if self.config.vae is None else Vae(Path(self.config.vae), self.device)

    @cached_property
    def cache(self) -> Cache | None:
        """What was made before, if the recipe names it."""
        return None if self.config.cached is None else Cache(Path(self.config.cached))

    @cached_property
    def null_QD(self) -> Tensor:
        """The rows that stand for no condition."""
        null_QD = self.frozen.null_QD if self.cache is None else self.cache.null_QD
        return null_QD.to(self.device)

    @property
    def side(self) -> int:
        """Pixels a side of a picture."""
        if self.config.vae is None:
            return self.sizes.sample_size
        return self.sizes.sample_size * vaes.read_facts(Path(self.config.vae)).factor

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, h, w of what is diffused."""
        return self.sizes.sample_channels, self.sizes.sample_size, self.sizes.sample_size

    def plan(self, draws: Draws) -> PairPlan:
        """The samples of some draws, in order."""
        data, training = self.recipe.data, isinstance(draws, Mixture)
        return PairPlan(
            draws,
            group_length=self.layout.group_length,
            pack_tokens=data.pack_tokens,
            longest_text=self.config.longest_text,
            window_documents=data.window_documents,
            seed=plan_seed(self.recipe) if training else self.recipe.seed,
            step_packs=self.recipe.train.global_batch_packs,
            first_step=data.plan_from_step if training else 0,
        )

    def assembler(self, sources: Sequence[Source], drop: float) -> PairAssembler:
        """What workers do.

        Args:
            sources: of a plan.
            drop: share of samples without their condition; 0 for held-out ones.
        """
        return self._assembler(sources, drop, self._known(sources))

    def fresh_assembler(self, sources: Sequence[Source]) -> PairAssembler:
        """What reads samples of which nothing is known yet."""
        return self._assembler(sources, 0.0, {})

    def _assembler(
        self, sources: Sequence[Source], drop: float, known: Mapping[str, KnownSource]
    ) -> PairAssembler:
        looks = self.config.condition is Condition.encoder and not known
        return PairAssembler(
            sources=sources,
            vocabulary=self.vocabulary,
            layout=self.layout,
            shape=self.shape,
            side=self.side,
            square=_SQUARES[self.config.fit],
            steps=self.config.noise_steps,
            drop=drop,
            vision=self.language.layout if looks and self.language is not None else None,
            known=known,
        )

    def _known(self, sources: Sequence[Source]) -> dict[str, KnownSource]:
        if self.cache is None:
            return {}
        if self.language is not None:
            differs = self.cache.stale(self.origin())
            if differs:
                raise ContentError(
                    f"decoder.cached {self.cache.folder} is stale: {'; '.join(differs)}; make "
                    "it again with tools/encode_latents.py, or set decoder.cached=null"
                )
        return latents.known_sources(self.cache, sources)

    def batch(self, pairs: Pairs) -> Batch:
        """A micro-batch for the engine: mixed with noise, conditions scaled or dropped."""
        known = pairs.known if pairs.known is not None else self.frozen.know(pairs)
        noise, latent_noise = pairs.noise.to(self.device).unbind(1)
        clean = known.latents.to(self.device)
        if self.config.vae is not None and self.config.latent is Latent.sample:
            clean = vaes.draw(clean, latent_noise)
        dropped = pairs.dropped_N.to(self.device).view(-1, 1, 1)
        conditions = torch.where(dropped, self.null_QD, known.conditions.to(self.device))
        timesteps_N = pairs.timesteps_N.to(self.device)
        weights_N = pairs.weights_N * self._diffusion.weights(pairs.timesteps_N)
        return Batch(
            inputs=Flow(
                self._diffusion.mix(clean, noise, timesteps_N),
                {"timesteps": timesteps_N},
                (conditions * self.config.condition_scale).flatten(0, 1),
            ),
            targets=Targets({LOSS: weights_N}, {LOSS: pairs.origins_N}),
            info=pairs.info,
        )

    def batches(self, steps: Iterator[list[Pairs]]) -> Iterator[list[Batch]]:
        """Steps of a loader, made ready for the engine."""
        for step in steps:
            yield [self.batch(pairs) for pairs in step]

    def origin(self) -> Origin:
        """By what conditions and latents are made."""
        assert self.language is not None
        config = self.config
        kept = "mode" if config.latent is Latent.mode else "moments"
        return Origin(
            language=self.language.identity(),
            model=self.language.sizes(),
            tokenizer=self.vocabulary.fingerprint,
            condition=config.condition.value,
            unconditional=config.unconditional.value,
            vae="" if config.vae is None else f"{kept} {vaes.identity(Path(config.vae))}",
            fit=config.fit.value,
        )

    def form(self, kind: str) -> Form:
        """How a cache of this recipe lies on disk."""
        channels, height, width = self.shape
        if self.config.vae is not None and self.config.latent is Latent.sample:
            channels *= 2
        rows = (self.sizes.conditions, self.sizes.condition_width)
        return Form(kind=kind, conditions=rows, latents=(channels, height, width))
