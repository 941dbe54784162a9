"""What a rank is fed: recipe -> family, tokenizer, sequence format -> sources -> plan -> loader."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from mmtrain import supply
from mmtrain.data.assemble import Assembler
from mmtrain.data.batch import Batch
from mmtrain.data.loader import Loader, Workers, heldout_batches
from mmtrain.data.mixture import Draws, OnePass, Source
from mmtrain.data.pack import Plan
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.decoder.pictures import open_pictures
from mmtrain.facts import Facts, collect
from mmtrain.models.families import spec_of
from mmtrain.models.spec import ModelSpec, Use
from mmtrain.ops import select
from mmtrain.parallel.mesh import Mesh
from mmtrain.settings import Recipe, SourceConfig
from mmtrain.train import loop
from mmtrain.train.state import TrainState

Prepare = Callable[[Batch], Batch]


@dataclass(frozen=True)
class Setting:
    """What a recipe means, before any rank builds its part."""

    recipe: Recipe
    spec: ModelSpec
    vocabulary: Vocabulary
    layout: SequenceFormat
    facts: Facts
    shapes: dict[str, tuple[int, ...]]  # full shape of every parameter, by canonical name

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.output) / self.recipe.name

    @cached_property
    def sources(self) -> list[Source]:
        """Shards and length index of every training source; opened once."""
        return open_sources(self, self.recipe.data.sources)


def read_setting(recipe: Recipe) -> Setting:
    """Family, tokenizer and parameter shapes of a checked recipe; chooses what runs its ops."""
    select.use(recipe.ops.attention)
    spec = spec_of(recipe.family, recipe.phase)
    vocabulary = load_vocabulary(Path(recipe.data.tokenizer))
    layout = supply.layout_of(recipe, vocabulary)
    if recipe.data.learn_image_begin:
        layout = replace(layout, learns_image_begin=True)
    facts = collect(recipe)
    shapes = {name: shape for layer in facts.census for name, shape in layer.shapes.items()}
    return Setting(recipe, spec, vocabulary, layout, facts, shapes)


def open_sources(setting: Setting, configs: dict[str, SourceConfig]) -> list[Source]:
    """Shards and length index of every source, in the order of the recipe."""
    return supply.open_sources(setting.recipe.data, configs, setting.vocabulary)


def make_plan(setting: Setting, draws: Draws) -> Plan:
    """The packs of some draws."""
    return supply.plan_of(setting.recipe, draws, setting.layout.group_length)


def assembler_of(setting: Setting, mesh: Mesh, sources: list[Source]) -> Assembler:
    """What lays out the packs of some sources on this rank."""
    recipe = setting.recipe
    fixed = recipe.data.pack_images * recipe.train.micro_batch_packs
    return Assembler(
        sources=sources,
        vocabulary=setting.vocabulary,
        layout=setting.layout,
        pack_tokens=recipe.data.pack_tokens,
        # shapes must not change between micro-batches where they cross a stage boundary
        image_slots=fixed if mesh.dims.pipeline > 1 else None,
        with_pixels=mesh.is_first_stage,
        known=open_pictures(setting.spec.stored(recipe.model, None), sources),
    )


def training_loader(setting: Setting, mesh: Mesh, state: TrainState) -> Loader[Batch]:
    """Steps of this data rank, from where the state stands."""
    recipe = setting.recipe
    plan = make_plan(setting, supply.mixture_of(recipe, setting.sources))
    plan.seek(state.mark)
    return Loader(
        plan,
        assembler_of(setting, mesh, setting.sources),
        global_batch_packs=recipe.train.global_batch_packs,
        micro_batch_packs=recipe.train.micro_batch_packs,
        data_rank=mesh.data,
        data_ranks=mesh.dims.data,
        workers=Workers(
            count=recipe.data.workers,
            prefetch=recipe.data.prefetch,
            pinned=mesh.device.type == "cuda",
        ),
        start_step=state.data_step,
        decode_failures=recipe.data.failure_limits,
    )


def heldout_of(setting: Setting, mesh: Mesh) -> Iterator[loop.Heldout]:
    """The held-out micro-batches of every held-out source, read anew each time."""
    recipe = setting.recipe
    micro, ranks = recipe.train.micro_batch_packs, mesh.dims.data
    for source in open_sources(setting, recipe.data.heldout):
        plan = make_plan(setting, OnePass(source))
        packs = min(recipe.validate.packs, plan.packs())
        batches = partial(
            _read_heldout,
            plan,
            assembler_of(setting, mesh, [source]),
            mesh,
            packs,
            micro,
            preparation(setting, mesh, Use.heldout),
        )
        reads = mesh.is_first_stage or mesh.is_last_stage
        count = math.ceil(packs / (micro * ranks))
        yield loop.Heldout(source.name, count, batches if reads else None)


def _read_heldout(
    plan: Plan,
    assembler: Assembler,
    mesh: Mesh,
    packs: int,
    micro_batch_packs: int,
    prepare: Prepare,
) -> list[Batch]:
    batches = heldout_batches(
        plan,
        assembler,
        packs=packs,
        micro_batch_packs=micro_batch_packs,
        data_rank=mesh.data,
        data_ranks=mesh.dims.data,
    )
    return list(map(prepare, batches))


def preparation(setting: Setting, mesh: Mesh, use: Use) -> Prepare:
    """What this rank makes of every micro-batch; what is frozen is on its device."""
    return setting.spec.prepare(setting.recipe.model, setting.layout, mesh.device, use)


def prepared(
    steps: Iterator[list[Batch]], prepare: Prepare, first_step: int
) -> Iterator[list[Batch]]:
    """Steps of the loader, from `first_step` on, as the engine gets them."""
    for number, step in enumerate(steps, first_step):
        told = (replace(batch, info=replace(batch.info, step=number)) for batch in step)
        yield list(map(prepare, told))
