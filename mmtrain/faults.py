"""What is wrong with a recipe across its keys: every fault, none of them raised.

Spelling and types are `mmtrain.schema`'s matter. Each fault names the keys it derives from in
full, so that `mmtrain.recipe` can drop those that follow from a key already reported.
"""

import math
from collections.abc import Generator, Iterator
from pathlib import Path

from mmtrain import data_faults, decoder_faults, evaluation_faults
from mmtrain.data.lengths import folder_name
from mmtrain.data.rules import Rule
from mmtrain.data.vocabulary import ASSISTANT, USER, load_vocabulary
from mmtrain.errors import MmtrainError, Problem
from mmtrain.layout.dims import dims_for
from mmtrain.layout.names import covers
from mmtrain.models.census import LayerCensus, take_census
from mmtrain.models.spec import ModelSpec
from mmtrain.ops.select import Preference, no_kernels
from mmtrain.schema import join, suggestion
from mmtrain.settings import Decay, Phase, Recipe, ScheduleConfig, SourceConfig

# (key, least allowed, most allowed) of numbers that have a range of their own
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("data.pack_tokens", 2, math.inf),
    ("data.pack_images", 1, math.inf),
    ("data.window_documents", 1, math.inf),
    ("data.plan_from_step", 0, math.inf),
    ("data.workers", 0, math.inf),
    ("data.prefetch", 1, math.inf),
    ("data.decode_failures", 0, 1),
    ("data.cache_bytes", 0, math.inf),
    ("optimizer.learning_rate", 0, math.inf),
    ("optimizer.weight_decay", 0, math.inf),
    ("optimizer.clip_norm", 0, math.inf),
    ("schedule.warmup_steps", 0, math.inf),
    ("schedule.final_ratio", 0, 1),
    ("train.steps", 1, math.inf),
    ("train.global_batch_packs", 1, math.inf),
    ("train.micro_batch_packs", 1, math.inf),
    ("log.every_steps", 1, math.inf),
    ("log.modules_every_steps", 0, math.inf),
    ("log.images_every_steps", 0, math.inf),
    ("log.peak_tflops", 0, math.inf),
    ("validate.every_steps", 0, math.inf),
    ("validate.packs", 1, math.inf),
    ("save.every_steps", 0, math.inf),
    ("save.keep", 1, math.inf),
    ("watch.stall_seconds", 0, math.inf),
    ("watch.setup_seconds", 0, math.inf),
    ("watch.save_seconds", 0, math.inf),
    ("watch.stop_before_limit_seconds", 0, math.inf),
    ("watch.nonfinite_steps", 1, math.inf),
    ("watch.rollbacks", 0, math.inf),
    ("watch.spike_window", 8, math.inf),
    ("watch.replicas_every_steps", 0, math.inf),
)


def problems(recipe: Recipe, spec: ModelSpec, world_size: int | None = None) -> list[Problem]:
    """Every fault of a well-typed recipe but missing files.

    Args:
        recipe: what to check.
        spec: its family.
        world_size: ranks that the launcher started; None when that is not known yet.
    """
    model = list(spec.problems(recipe.model, max(1, recipe.parallel.tensor)))
    found = [*_numbers(recipe), *_layout(recipe, world_size), *_batch(recipe, world_size), *model]
    if not model or not list(spec.problems(recipe.model, 1)):  # it can be built
        census = take_census(spec, recipe.model)
        found += [*_bounds(recipe, census), *_patterns(recipe, spec, census), *_packs(recipe, spec)]
    if recipe.train.new_rows and recipe.train.initialize_from is None:
        found.append(
            Problem(
                "train.new_rows",
                "given without train.initialize_from; there are no rows to make new ones of",
            )
        )
    if recipe.phase is Phase.decoder:
        found += decoder_faults.problems(recipe)
    return [*found, *_losses(recipe, spec), *_sources(recipe), *evaluation_faults.problems(recipe)]


def _numbers(recipe: Recipe) -> Iterator[Problem]:
    for key, least, most in _RANGES:
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if not least <= value <= most:
            allowed = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            yield Problem(key, f"found {value}; allowed: {allowed}")
    optimizer = recipe.optimizer
    for name in ("beta1", "beta2"):
        if not 0 <= (beta := getattr(optimizer, name)) < 1:
            yield Problem(f"optimizer.{name}", f"found {beta}; allowed: 0 or more, below 1")
    if not optimizer.eps > 0:
        yield Problem("optimizer.eps", f"found {optimizer.eps}; allowed: above 0, as in 1e-6")
    if not recipe.parallel.timeout_seconds > 0:
        yield Problem(
            "parallel.timeout_seconds",
            f"found {recipe.parallel.timeout_seconds}; allowed: above 0, as in 600",
        )
    for pattern, rate in optimizer.learning_rates.items():
        if not rate >= 0:
            yield Problem(
                join("optimizer.learning_rates", pattern), f"found {rate}; allowed: 0 or more"
            )
    watch = recipe.watch
    if not watch.spike_score > 0:
        yield Problem("watch.spike_score", f"found {watch.spike_score}; allowed: above 0, as in 10")
    if watch.slow_rank != 0 and not watch.slow_rank > 1:
        yield Problem(
            "watch.slow_rank", f"found {watch.slow_rank}; allowed: above 1, as in 1.3; 0 = never"
        )
    if not 0 <= recipe.train.ema < 1:
        yield Problem("train.ema", f"found {recipe.train.ema}; allowed: 0 or more, below 1")
    yield from _steps(recipe.schedule)
    if recipe.schedule.warmup_steps > recipe.train.steps:
        yield Problem(
            "schedule.warmup_steps",
            f"{recipe.schedule.warmup_steps} is beyond train.steps = {recipe.train.steps}; "
            "the peak learning rate would never be reached",
        )
    if not recipe.name or recipe.name != Path(recipe.name).name:
        yield Problem("name", f"found {recipe.name!r}; wanted: a folder name without slashes")


def _steps(schedule: ScheduleConfig) -> Iterator[Problem]:
    for step, factor in schedule.steps.items():
        if not step.isdecimal() or not factor >= 0:
            yield Problem(
                join("schedule.steps", step),
                f"found {factor}; wanted: a step number and a factor of the peak, as in "
                "{10000: 0.5}",
            )
    if bool(schedule.steps) != (schedule.decay is Decay.steps):
        yield Problem(
            "schedule.steps",
            f"found {len(schedule.steps)} steps with schedule.decay = {schedule.decay.name}; the "
            "decay steps needs them, the others do not read them",
        )


def _layout(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    parallel = recipe.parallel
    yield from dims_for(
        world_size or 1,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        zero_stage=parallel.zero_stage,
        sequence=parallel.sequence,
    ).problems(world_size)


def _batch(recipe: Recipe, world_size: int | None) -> Iterator[Problem]:
    parallel, data, train = recipe.parallel, recipe.data, recipe.train
    if min(parallel.tensor, parallel.pipeline, train.micro_batch_packs) < 1:
        return  # reported as ranges; nothing to divide by
    rows = data.pack_tokens * train.micro_batch_packs
    if parallel.sequence and rows % parallel.tensor:
        yield Problem(
            "parallel.sequence",
            f"data.pack_tokens = {data.pack_tokens} times train.micro_batch_packs = "
            f"{train.micro_batch_packs} is {rows} rows, which parallel.tensor = "
            f"{parallel.tensor} does not divide; use a multiple",
        )
    model = parallel.tensor * parallel.pipeline
    if world_size is None:
        unit, ranks = train.micro_batch_packs, ""
    elif world_size % model:
        return  # reported as a layout fault
    else:
        unit = train.micro_batch_packs * (world_size // model)
        ranks = f" times {world_size // model} data rank(s) (parallel.tensor, parallel.pipeline)"
    if train.global_batch_packs % unit:
        yield Problem(
            "train.global_batch_packs",
            f"{train.global_batch_packs} is no multiple of train.micro_batch_packs = "
            f"{train.micro_batch_packs}{ranks}; use a multiple of {unit}",
        )


def _bounds(recipe: Recipe, census: list[LayerCensus]) -> Iterator[Problem]:
    stages, bounds = recipe.parallel.pipeline, recipe.parallel.bounds
    if stages > len(census):
        yield Problem(
            "parallel.pipeline",
            f"{stages} stages for {len(census)} layers; use {len(census)} or fewer",
        )
    if not bounds:
        return
    if len(bounds) != stages - 1:
        yield Problem(
            "parallel.bounds",
            f"{len(bounds)} bound(s) for parallel.pipeline = {stages}; give {stages - 1} (the "
            "first layer of every stage but the first), or none to have them balanced",
        )
    if list(bounds) != sorted(set(bounds)) or not 0 < bounds[0] <= bounds[-1] < len(census):
        yield Problem(
            "parallel.bounds",
            f"found {list(bounds)}; wanted: ascending layer numbers from 1 to {len(census) - 1}",
        )


def _patterns(recipe: Recipe, spec: ModelSpec, census: list[LayerCensus]) -> Iterator[Problem]:
    names = [name for layer in census for name in layer.shapes]
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    optimizer = recipe.optimizer
    tables = (
        ("train.freeze", recipe.train.freeze),
        ("optimizer.learning_rates", tuple(optimizer.learning_rates)),
        ("optimizer.no_decay", optimizer.no_decay),
        *spec.patterns(recipe.model).items(),
    )
    prefixes = {".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)}
    for place, patterns in tables:
        for pattern in patterns:
            if not any(covers(pattern, name) for name in names):
                near = suggestion(pattern, sorted(prefixes))
                yield Problem(
                    place,
                    f"the pattern {pattern!r} covers no parameter{near}; parameters start with "
                    f"{', '.join(parts)}, as in {names[0]}",
                )
    if not any(spec.is_trained(recipe.model, recipe.train.freeze, name) for name in names):
        among = " that this phase trains" if spec.patterns(recipe.model) else ""
        yield Problem("train.freeze", f"covers every parameter{among}; nothing would be trained")


class _AnyIds(dict[str, int]):
    """Stands for a tokenizer; afterwards its keys are the tokens that were asked for."""

    def __missing__(self, token: str) -> int:
        self[token] = 0
        return 0


def _packs(recipe: Recipe, spec: ModelSpec) -> Iterator[Problem]:
    data = recipe.data
    group = spec.sequence(recipe.model, _AnyIds()).group_length
    if data.pack_images * group > data.pack_tokens:
        yield Problem(
            "data.pack_images",
            f"{data.pack_images} images of {group} positions do not fit data.pack_tokens = "
            f"{data.pack_tokens}; use {data.pack_tokens // group} or fewer",
        )
    context = spec.context(recipe.model)
    for place, source in _all_sources(recipe):
        if source.max_tokens > context:
            yield Problem(
                f"{place}.max_tokens",
                f"{source.max_tokens} positions are more than the model's context of {context}",
            )
        if source.rule is Rule.text:
            continue
        images = source.max_images if source.rule is Rule.video else min(source.max_images, 1)
        least = images * group + 3  # begin, end and one token of text
        if source.max_tokens < least:
            yield Problem(
                f"{place}.max_tokens",
                f"{source.max_tokens} positions hold no {source.rule.name}: {images} image(s) of "
                f"{group} positions, a text and two marks take {least} or more",
            )


def _losses(recipe: Recipe, spec: ModelSpec) -> Iterator[Problem]:
    weights = recipe.train.loss_weights
    for name in weights.keys() - set(spec.losses):
        yield Problem(
            f"train.loss_weights.{name}",
            f"the family {spec.name} has no such loss{suggestion(name, spec.losses)}; "
            f"its losses: {', '.join(spec.losses)}",
        )
    for name in spec.losses:
        if name not in weights:
            yield Problem(f"train.loss_weights.{name}", "missing; use 0 to switch the loss off")
        elif not weights[name] >= 0:
            yield Problem(
                f"train.loss_weights.{name}", f"found {weights[name]}; allowed: 0 or more"
            )
    if weights and not any(weights.values()):
        yield Problem("train.loss_weights", "every weight is 0; nothing would be learned")


def _all_sources(recipe: Recipe) -> Iterator[tuple[str, SourceConfig]]:
    for table in ("sources", "heldout"):
        for name, source in getattr(recipe.data, table).items():
            yield join(f"data.{table}", name), source


def _sources(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if not data.sources:
        yield Problem(
            "data.sources", "empty; name at least one, as in data.sources.pages.path=FOLDER"
        )
    yield from data_faults.mixture(data)
    for place, source in _all_sources(recipe):
        yield from data_faults.source_faults(place, source)
        if not 0 <= source.image_first <= 1:
            yield Problem(f"{place}.image_first", f"found {source.image_first}; allowed: 0 to 1")
        if source.max_tokens > data.pack_tokens:
            yield Problem(
                f"{place}.max_tokens",
                f"{source.max_tokens} is more than data.pack_tokens = {data.pack_tokens}; a "
                "document must fit one pack",
            )
        if not 0 <= source.max_images <= data.pack_images:
            yield Problem(
                f"{place}.max_images",
                f"found {source.max_images}; allowed: 0 to data.pack_images = {data.pack_images}",
            )


def _tokenizer(recipe: Recipe, spec: ModelSpec) -> Generator[Problem, None, str | None]:
    """Faults of the tokenizer; returns its fingerprint, or None when it cannot be read."""
    folder = Path(recipe.data.tokenizer)
    if not folder.is_dir():
        yield Problem("data.tokenizer", f"there is no folder {folder}")
        return None
    asked = _AnyIds()
    spec.sequence(recipe.model, asked)
    try:
        vocabulary = load_vocabulary(folder)
        chats = any(source.rule is Rule.chat for _, source in _all_sources(recipe))
        vocabulary.require([*asked, *((USER, ASSISTANT) if chats else ())])
    except MmtrainError as error:
        yield Problem("data.tokenizer", str(error))
        return None
    rows = spec.vocabulary(recipe.model)
    if vocabulary.size > rows:
        yield Problem(
            "data.tokenizer",
            f"{folder} has {vocabulary.size} tokens, but the model's vocabulary is {rows}; raise "
            "the model's, or use another tokenizer",
        )
    return vocabulary.fingerprint


def _new_rows(recipe: Recipe) -> Iterator[Problem]:
    vocabulary = load_vocabulary(Path(recipe.data.tokenizer))
    for token, word in recipe.train.new_rows.items():
        place = join("train.new_rows", token)
        if token not in vocabulary.ids:
            near = suggestion(token, list(vocabulary.ids))
            yield Problem(place, f"the tokenizer of data.tokenizer has no token {token!r}{near}")
        elif not vocabulary.encode(word):
            yield Problem(place, f"found {word!r}; wanted: a word, whose rows are averaged")


def _shards(place: str, folder: Path, recipe: Recipe, fingerprint: str | None) -> Iterator[Problem]:
    if not folder.is_dir():
        yield Problem(place, f"there is no folder {folder}, and no remote is set")
    elif not (folder / "index.json").is_file():
        yield Problem(
            place, f"the folder {folder} holds no index.json; it is no finished shard folder"
        )
    elif fingerprint is not None and not (folder / folder_name(fingerprint)).is_dir():
        yield Problem(
            place,
            f"{folder} has no lengths for this tokenizer; run mmtrain data index {folder} "
            f"--tokenizer {recipe.data.tokenizer}",
        )


def missing_files(recipe: Recipe, spec: ModelSpec) -> Iterator[Problem]:
    """Every file and folder that a recipe names and that is not there, or not what it must be.

    A GPU and a library of kernels that it insists on count as such.
    """
    if recipe.ops.attention is Preference.cuda and (reason := no_kernels()):
        yield Problem("ops.attention", f"cuda, but {reason}; or use auto, which takes torch then")
    fingerprint = yield from _tokenizer(recipe, spec)
    for place, source in _all_sources(recipe):
        if source.remote is None:  # else fetched when needed
            yield from _shards(f"{place}.path", Path(source.path), recipe, fingerprint)
    if recipe.train.new_rows and fingerprint is not None:
        yield from _new_rows(recipe)
    start = recipe.train.initialize_from
    if start is not None and not Path(start).exists():
        yield Problem("train.initialize_from", f"there is no folder {start}")
    yield from spec.missing(recipe.model)
    yield from evaluation_faults.missing_files(recipe)
