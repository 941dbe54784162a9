"""From a recipe to a running job, in one visible order.

dims -> mesh -> layers -> stage bounds -> this rank's modules -> optimizer -> engine -> data
-> restore -> loop.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from mmtrain import lineage, supply
from mmtrain import log as logs
from mmtrain import recipe as recipes
from mmtrain.checkpoint import store
from mmtrain.data.batch import Batch
from mmtrain.data.loader import Loader
from mmtrain.data.picture import draw_pack
from mmtrain.decoder.conditions import Samples
from mmtrain.decoder.job import DecoderJob
from mmtrain.errors import MmtrainError, StorageError
from mmtrain.evaluate import session
from mmtrain.facts import positions_of_a_pack
from mmtrain.feed import (
    Setting,
    heldout_of,
    make_plan,
    open_sources,
    preparation,
    prepared,
    read_setting,
    training_loader,
)
from mmtrain.generation.sketches import PairSketcher
from mmtrain.initial import initial_weights
from mmtrain.layout.dims import ParallelDims, dims_for
from mmtrain.layout.ranks import launched
from mmtrain.models.spec import BatchShape, Use
from mmtrain.ops import select
from mmtrain.parallel.build import Builder, Construction, Fold, Stage, canonical_parameters
from mmtrain.parallel.mesh import Mesh, open_mesh
from mmtrain.process import StartUp
from mmtrain.settings import Phase, Precision, Recipe
from mmtrain.train import loop
from mmtrain.train.ema import Ema, held_weights
from mmtrain.train.engine import Engine, EngineSettings, FoldEngine, StageEngine
from mmtrain.train.guard import Guard
from mmtrain.train.metrics import Reporter, Work
from mmtrain.train.optim import Filled, build_optimizer, choose, parameter_groups, used_groups
from mmtrain.train.peak import peak_tflops
from mmtrain.train.restore import newest_sound, restore, state_of
from mmtrain.train.save import Saver, Target
from mmtrain.train.signals import Listener
from mmtrain.train.state import TrainState
from mmtrain.train.watch import Watch

log = logging.getLogger(__name__)


def train(recipe: Recipe, watch: Watch) -> int:
    """Train a checked recipe on the ranks that the launcher started; returns an exit code."""
    start = StartUp()
    setting = read_setting(recipe)
    layout = recipe.parallel
    start.passed("recipe")
    with open_mesh(_dims(recipe), layout.timeout_seconds) as mesh, watch.reporting():
        logs.quiet_engines()
        opened = mesh.gather(_open_folder(setting, watch) if mesh.rank == 0 else None)[0]
        if isinstance(opened, MmtrainError):
            raise opened
        watch.admit(opened)
        start.passed("groups")
        found = newest_sound(setting.folder / "checkpoints", mesh)
        origin = mesh.gather(_examine_data(setting, found) if mesh.rank == 0 else None)[0]
        if isinstance(origin, MmtrainError):
            raise origin
        engine = build_engine(setting, mesh)
        start.passed("model")
        ema = Ema(engine, recipe.train.ema) if recipe.train.ema else None
        state = restore(engine, ema, found) if found else TrainState()
        lineage.adopt(state, recipe, origin)
        if found:
            log.info("goes on from %s", found)
        start.passed("checkpoint")
        _write_recipe(setting, mesh, state)
        parts = _parts(setting, mesh, engine, ema, state)
        start.passed("data")
        log.info("step %d begins %s", state.step + 1, start)
        try:
            with logging_redirect_tqdm([logging.getLogger(logs.ROOT)]):
                state = loop.run(parts, _loop_plan(recipe), state, watch)
        finally:
            if parts.reporter is not None:
                parts.reporter.close()
        if state.step < recipe.train.steps:
            return watch.stopped(mesh)
        log.info("done: %d steps, %d tokens; %s", state.step, state.tokens_seen, setting.folder)
        return watch.done()


def _dims(recipe: Recipe) -> ParallelDims:
    layout = recipe.parallel
    return dims_for(
        launched(os.environ).world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        zero_stage=layout.zero_stage,
        sequence=layout.sequence,
    )


def _loop_plan(recipe: Recipe) -> loop.Plan:
    return loop.Plan(
        steps=recipe.train.steps,
        schedule=recipe.schedule,
        log=recipe.log,
        validate=recipe.validate,
        saving=recipe.save,
        evaluate_every_steps=recipe.evaluate.every_steps,
    )


def _open_folder(setting: Setting, watch: Watch) -> int | MmtrainError:
    """Make the run's folder and tidy it; returns the number of the attempt, or what forbids it."""
    folder = setting.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        watch.occupy()
        logs.add_file(folder / logs.FILE)
        root = folder / "checkpoints"
        root.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root):
            pass  # told now, not at the first save
    except OSError as error:
        return StorageError(
            f"{folder}: cannot be written: {error}; mend it, or choose another with output="
        )
    except MmtrainError as error:
        return error
    store.sweep(root)
    saved = store.committed(root)
    try:
        return watch.begin(_hash(setting.recipe), store.step_of(saved[-1]) if saved else 0)
    except MmtrainError as error:
        return error


def _examine_data(setting: Setting, found: Path | None) -> dict[str, Any] | MmtrainError:
    """What the plan of packs is made from, or why the run cannot be trained by it."""
    recipe = setting.recipe
    try:
        sources = setting.sources
        now = lineage.origin(recipe, sources, setting.layout.group_length)
        state = TrainState() if found is None else state_of(found)
        lineage.check(recipe, now, state, found or setting.folder)
        if recipe.phase is not Phase.decoder:
            lineage.adopt(state, recipe, now)
            plan = make_plan(setting, supply.mixture_of(recipe, sources))
            plan.seek(state.mark)
            supply.check(recipe, plan, state.step, state.data_step)
    except MmtrainError as error:
        return error
    return now


def _hash(recipe: Recipe) -> str:
    return hashlib.sha256(recipes.to_yaml(recipe).encode()).hexdigest()


def _write_recipe(setting: Setting, mesh: Mesh, state: TrainState) -> None:
    """Keep the resolved recipe; an earlier one that differs is kept beside it."""
    if mesh.rank != 0:
        return
    path, text = setting.folder / "recipe.yaml", recipes.to_yaml(setting.recipe)
    if path.exists() and path.read_text() != text:
        kept = path.with_name(f"recipe.until-step-{state.step}.yaml")
        path.rename(kept)
        log.warning("the recipe differs from the one this run began with, kept as %s", kept)
    path.write_text(text)


# --- model ---------------------------------------------------------------------------------


def build_engine(setting: Setting, mesh: Mesh) -> Engine:
    """This rank's modules, optimizer and DeepSpeed engine."""
    recipe, spec = setting.recipe, setting.spec
    layers: list[Builder] = [(layer.name, layer.build) for layer in spec.layers(recipe.model)]
    construction = _construction(setting)
    implementation = choose(recipe.optimizer.implementation, mesh.device)
    log.info("optimizer: AdamW by %s", implementation.value)
    for row in select.table(mesh.device, construction.dtype):
        log.info("op %s", row)
    settings = _engine_settings(setting, mesh.dims)
    facts = setting.facts
    log.info("%d of %d numbers are trained", facts.trained_numbers, facts.numbers)
    if mesh.dims.pipeline == 1:
        model = Fold(layers, construction, mesh)
        named = canonical_parameters(model.named_layers())
        groups = parameter_groups(named, recipe.optimizer)
        optimizer = build_optimizer(groups, recipe.optimizer, implementation)
        return FoldEngine(model, optimizer, mesh, settings)
    bounds = (0, *facts.bounds(), len(layers))
    stage = Stage(layers, construction, mesh, bounds)
    named = canonical_parameters(stage.named_layers())
    filled = Filled(stage, used_groups(facts.trained_shapes, recipe.optimizer))
    groups = parameter_groups(named, recipe.optimizer, filled)
    optimizer = build_optimizer(groups, recipe.optimizer, implementation)
    log.info("stages begin at layers %s", [layers[bound][0] for bound in bounds[:-1]])
    return StageEngine(stage, optimizer, mesh, settings)


def _construction(setting: Setting) -> Construction:
    recipe, spec = setting.recipe, setting.spec
    return Construction(
        plan=spec.plan,
        initial=initial_weights(recipe, spec, setting.shapes, setting.vocabulary),
        fields=spec.fields,
        is_trained=setting.facts.is_trained,
        recomputed=setting.facts.is_recomputed,
        sequence=recipe.parallel.sequence,
        partition=recipe.parallel.zero_stage == 3,
        dtype=torch.bfloat16 if recipe.train.precision is Precision.bf16 else torch.float32,
    )


def _engine_settings(setting: Setting, dims: ParallelDims) -> EngineSettings:
    recipe = setting.recipe
    return EngineSettings(
        zero_stage=recipe.parallel.zero_stage,
        accumulation=_accumulation(recipe, dims),
        clip_norm=recipe.optimizer.clip_norm,
        bf16=recipe.train.precision is Precision.bf16,
        losses=setting.spec.losses,
        loss_weights=recipe.train.loss_weights,
        sources=len(recipe.data.sources),
    )


def _accumulation(recipe: Recipe, dims: ParallelDims) -> int:
    return recipe.train.global_batch_packs // (recipe.train.micro_batch_packs * dims.data)


# --- loop ----------------------------------------------------------------------------------


def _parts(
    setting: Setting, mesh: Mesh, engine: Engine, ema: Ema | None, state: TrainState
) -> loop.Parts:
    recipe = setting.recipe
    if recipe.phase is Phase.decoder:
        return _decoder_parts(setting, mesh, engine, ema, state)
    reads = mesh.is_first_stage or mesh.is_last_stage
    loader = training_loader(setting, mesh, state) if reads else None
    prepare = preparation(setting, mesh, Use.training)
    draws = partial(draw_pack, vocabulary=setting.vocabulary, layout=setting.layout, width=520)
    reporter = _reporter(setting, mesh, state) if mesh.rank == 0 else None
    saver = _saver(setting, engine, ema, reporter)
    return loop.Parts(
        engine=engine,
        batches=prepared(loader.steps(), prepare, loader.next_step) if loader else None,
        heldout=tuple(heldout_of(setting, mesh)) if recipe.validate.every_steps else (),
        reporter=reporter,
        draw=(lambda batches: draws(batches[0])) if mesh.rank == 0 else None,
        save=partial(_save, saver, loader, state.plan_origin),
        saver=saver,
        guard=Guard(recipe.watch, saver, reporter, partial(restore, engine, ema)),
        samples=partial(_samples, mesh, reporter) if recipe.log.samples else None,
        ema=ema,
        sketch=_sketcher(setting, mesh, engine, ema),
        evaluate=_evaluation(setting, mesh, reporter),
    )


def _decoder_parts(
    setting: Setting, mesh: Mesh, engine: Engine, ema: Ema | None, state: TrainState
) -> loop.Parts:
    """The same for the decoder phase, whose samples go through frozen models first."""
    recipe = setting.recipe
    job = DecoderJob(
        recipe,
        Samples(recipe, setting.vocabulary, setting.layout, mesh.device),
        setting.sources,
        open_sources(setting, recipe.data.heldout),
        mesh,
    )
    loader = job.loader(state)
    reporter = _reporter(setting, mesh, state) if mesh.rank == 0 else None
    saver = _saver(setting, engine, ema, reporter)
    return loop.Parts(
        engine=engine,
        batches=job.samples.batches(loader.steps()),
        heldout=tuple(job.heldout()) if recipe.validate.every_steps else (),
        reporter=reporter,
        draw=None,
        save=partial(_save, saver, loader, state.plan_origin),
        saver=saver,
        guard=Guard(recipe.watch, saver, reporter, partial(restore, engine, ema)),
        samples=partial(_samples, mesh, reporter) if recipe.log.samples else None,
        ema=ema,
        sketch=job.sketcher(engine, ema, setting.shapes, setting.folder / "samples"),
        evaluate=_evaluation(setting, mesh, reporter),
    )


def _sketcher(setting: Setting, mesh: Mesh, engine: Engine, ema: Ema | None) -> PairSketcher | None:
    """Pictures drawn while training, by families that draw them; None for the others."""
    if not (setting.spec.schedulers and setting.recipe.log.images_every_steps):
        return None
    data = setting.recipe.data
    return PairSketcher(
        recipe=setting.recipe,
        vocabulary=setting.vocabulary,
        layout=setting.layout,
        sources=open_sources(setting, data.heldout or data.sources),
        mesh=mesh,
        shapes=setting.shapes,
        held=partial(held_weights, engine, ema),
        folder=setting.folder,
    )


def _samples(
    mesh: Mesh, reporter: Reporter | None, step: int, batches: Sequence[Batch] | None
) -> None:
    """Keep the sample ids of a step in the order of its packs; a collective."""
    own = [] if mesh.pipeline or mesh.tensor or batches is None else batches
    seen = mesh.gather([(batch.info.pack_numbers, batch.info.sample_ids) for batch in own])
    if reporter is not None:
        reporter.samples(step, sorted(entry for rank in seen for entry in rank))


def _evaluation(
    setting: Setting, mesh: Mesh, reporter: Reporter | None
) -> Callable[[Path, Listener], None] | None:
    """Rank 0 asks a checkpoint the tasks of the recipe; the others wait."""
    config = setting.recipe.evaluate
    if not config.every_steps:
        return None
    wait = mesh.patient_barrier(config.timeout_seconds)
    assignment = session.assignment_of(setting.folder, setting.recipe)

    def evaluate(checkpoint: Path, listener: Listener) -> None:
        if reporter is not None:
            session.record(assignment, checkpoint.name, reporter.board, listener.interrupting)
        wait()

    return evaluate


def _saver(setting: Setting, engine: Engine, ema: Ema | None, reporter: Reporter | None) -> Saver:
    recipe = setting.recipe
    target = Target(
        root=setting.folder / "checkpoints",
        keep=recipe.save.keep,
        keep_every_steps=recipe.save.keep_every_steps,
        plan=setting.spec.plan,
        shapes=setting.shapes,
        recipe_hash=_hash(recipe),
    )
    report = reporter.saved if reporter is not None else lambda saved: None
    return Saver(engine, ema, target, recipe.save.background, report)


def _save(
    saver: Saver, loader: Loader[Any] | None, origin: dict[str, Any], state: TrainState
) -> None:
    if loader is not None:
        state.plan_origin = origin
        state.mark = loader.mark(state.data_step)
    saver.save(state)


def _reporter(setting: Setting, mesh: Mesh, state: TrainState) -> Reporter:
    recipe = setting.recipe
    peak, source = peak_tflops(mesh.device, recipe.train.precision, recipe.log.peak_tflops)
    work = Work(
        flops=lambda tokens, images: setting.spec.flops(recipe.model, BatchShape(tokens, images)),
        passes=tuple(
            (layer.name.partition(".")[0], passes)
            for layer, passes in zip(setting.facts.census, setting.facts.passes, strict=True)
        ),
        pack_tokens=positions_of_a_pack(recipe),
        peak_tflops=peak * mesh.dims.world_size,
        peak_source=source,
    )
    names = list(recipe.data.sources)
    return Reporter(setting.folder, recipe.train.steps, state, names, work)
