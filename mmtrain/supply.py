"""Where a run's documents come from, and how long they last.

Expected epochs are measured on a sample of every source and the first window of the plan: right to
some per cent. Where all sources have an end, the plan itself is asked whether it reaches the last
step, so that a run does not find out on its way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmtrain.data.cache import ShardCache
from mmtrain.data.choices import Packing, WeightsBy
from mmtrain.data.mixture import DrawnDocument, Draws, Mixture, Source
from mmtrain.data.pack import Plan
from mmtrain.data.rules import RuleOptions
from mmtrain.data.sources import open_source
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import Problem, RecipeError
from mmtrain.layout.balance import table
from mmtrain.lineage import plan_seed
from mmtrain.models.families import spec_of
from mmtrain.settings import DataConfig, Phase, Recipe, SourceConfig

_SAMPLE = 512  # documents of each source
_PLANNED = 1 << 20  # documents that are planned to see whether they suffice: about a minute


def layout_of(recipe: Recipe, vocabulary: Vocabulary) -> SequenceFormat:
    """How the recipe's family lays out documents, with the pictures that the recipe asks for."""
    layout = spec_of(recipe.family, recipe.phase).sequence(recipe.model, vocabulary.ids)
    return replace(layout, resize=recipe.data.resize)


def open_sources(
    data: DataConfig, configs: Mapping[str, SourceConfig], vocabulary: Vocabulary
) -> list[Source]:
    """Shards and length index of every source, in the order of the recipe.

    Args:
        data: of the recipe; all its remote sources share one bounded cache.
        configs: `data.sources` or `data.heldout`.
        vocabulary: the tokenizer whose lengths are planned with.

    Raises:
        MissingError, ContentError, StorageError: see `data.sources.open_source`.
    """
    remotes = [s for table in (data.sources, data.heldout) for s in table.values() if s.remote]
    folders = tuple(sorted({Path(source.path) for source in remotes}))
    cache = ShardCache(folders, data.cache_bytes) if data.cache_bytes else None
    return [
        open_source(
            name,
            Path(config.path),
            vocabulary,
            RuleOptions(
                rule=config.rule,
                max_images=config.max_images,
                max_positions=config.max_tokens,
                image_first=config.image_first,
                overlong=config.overlong,
            ),
            weight=config.weight,
            weight_steps={int(step): weight for step, weight in config.weight_steps.items()},
            epochs=config.epochs,
            remote=config.remote,
            cache=cache if config.remote else None,
        )
        for name, config in configs.items()
    ]


def mixture_of(recipe: Recipe, sources: Sequence[Source]) -> Mixture:
    """The order of a run's documents."""
    data = recipe.data
    seed = plan_seed(recipe)
    return Mixture(sources, seed=seed, shuffle=data.shuffle, by=data.weights_by)


def plan_of(recipe: Recipe, draws: Draws, group_length: int) -> Plan:
    """The packs of some draws; `plan_from_step` is of training data alone.

    Args:
        recipe: of the run.
        draws: a mixture, or held-out documents.
        group_length: positions of one image.
    """
    data, training = recipe.data, isinstance(draws, Mixture)
    return Plan(
        draws,
        group_length=group_length,
        pack_tokens=data.pack_tokens,
        pack_images=data.pack_images,
        window_documents=data.window_documents,
        seed=plan_seed(recipe) if training else recipe.seed,
        packing=data.packing,
        step_packs=recipe.train.global_batch_packs,
        first_step=data.plan_from_step if training else 0,
    )


@dataclass(frozen=True)
class Supply:
    """What a run is expected to take of one source.

    Attributes:
        name: of the source.
        stored: documents it has.
        drawn: documents until the last step; more than `stored` is up-sampling.
        tokens: positions they take.
        dry_step: when its epochs are used up; None when they are not.
    """

    name: str
    stored: int
    drawn: float
    tokens: float
    dry_step: int | None

    @property
    def epochs(self) -> float:
        """How often its documents come."""
        return self.drawn / self.stored


def expected(recipe: Recipe, plan: Plan) -> list[Supply]:
    """What a run takes of every source until `train.steps`."""
    plan.silence()
    sources = plan.draws.sources
    taken = [_sampled(plan, index) for index in range(len(sources))]
    means = [max(mean, 1.0) for mean, _ in taken]
    single = recipe.data.packing is Packing.pad or recipe.phase is Phase.decoder
    costs = [max(kept, 1e-9) for _, kept in taken] if single else means
    room = recipe.train.global_batch_packs * (1.0 if single else _tokens_of_a_pack(plan))
    counts, dry = [0.0] * len(sources), dict[int, int]()
    limits = [source.limit for source in sources]
    changes = sorted({begin for source in sources for begin in source.weight_steps})
    begin = recipe.data.plan_from_step
    now, last = float(begin), recipe.train.steps
    while now < last:
        weights = [0.0 if at in dry else s.weight_at(int(now)) for at, s in enumerate(sources)]
        by_tokens = recipe.data.weights_by is WeightsBy.tokens
        ratios = [w / m if by_tokens else w for w, m in zip(weights, means, strict=True)]
        total = sum(r * c for r, c in zip(ratios, costs, strict=True))
        if total == 0:
            break
        rates = [room * ratio / total for ratio in ratios]
        until: float = min([last, *(change for change in changes if change > now)])
        ends = {
            at: now + (limit - counts[at]) / rates[at]
            for at, limit in enumerate(limits)
            if limit is not None and rates[at] > 0
        }
        until = min([until, *ends.values()])
        counts = [c + r * (until - now) for c, r in zip(counts, rates, strict=True)]
        dry |= {at: int(end) for at, end in ends.items() if end <= until + 1e-9}
        now = until
    return [
        Supply(source.name, len(source.lengths), count, count * mean, dry.get(at))
        for at, (source, count, mean) in enumerate(zip(sources, counts, means, strict=True))
    ]


def _sampled(plan: Plan, source: int) -> tuple[float, float]:
    """Mean positions of the documents of a source, and the share that its rule leaves in."""
    stored = len(plan.draws.sources[source].lengths)
    step = max(1, stored // _SAMPLE)
    costs = [plan.cost(DrawnDocument(source, 0, number)) for number in range(0, stored, step)]
    return sum(costs) / len(costs), sum(cost > 0 for cost in costs) / len(costs)


def _tokens_of_a_pack(plan: Plan) -> float:
    """Mean positions in use, of the first packs."""
    first = plan.first_pack
    packs = [plan.pack(number) for number in range(first, first + 32)]
    tokens = [pack.tokens for pack in packs if pack.documents]
    return sum(tokens) / len(tokens)


def check(recipe: Recipe, plan: Plan, step: int, data_step: int) -> None:
    """Refuse a run whose sources all run dry before its last step.

    Args:
        recipe: of the run.
        plan: of its training data.
        step: optimizer steps done.
        data_step: batches used up by them.

    Raises:
        RecipeError: with the number of steps that the data suffice for.
    """
    assert isinstance(plan.draws, Mixture)
    documents = plan.draws.documents
    if documents is None:
        return
    batch, steps = recipe.train.global_batch_packs, recipe.train.steps
    plan.silence()
    if documents <= _PLANNED:
        last = data_step + steps - step  # batches until the end
        if last == data_step or plan.pack(last * batch - 1).documents:
            return
        found = plan.packs() // batch - (data_step - step)
    else:
        dry = [supply.dry_step for supply in expected(recipe, plan)]
        if None in dry:
            return
        found = max(end for end in dry if end is not None)
        if found > 0.9 * steps:  # an estimate; the loader says when it is so
            return
    names = ", ".join(plan.source_names)
    raise RecipeError(
        [
            Problem(
                "train.steps",
                f"{steps} steps of {batch} packs, but all sources ({names}) have used up their "
                f"epochs after {found}; use train.steps={found} or fewer, or allow more epochs "
                "(data.sources.NAME.epochs)",
            )
        ]
    )


def describe(recipe: Recipe) -> str:
    """What `mmtrain check` says of the sources of a recipe whose files are there.

    Raises:
        RecipeError: all sources run dry before the last step.
        MissingError, ContentError, StorageError: a source cannot be read.
    """
    data = recipe.data
    remote = [name for name, config in data.sources.items() if config.remote is not None]
    if remote:
        return f"  epochs: not estimated, {', '.join(remote)} are fetched when training begins"
    vocabulary = load_vocabulary(Path(data.tokenizer))
    layout = layout_of(recipe, vocabulary)
    sources = open_sources(data, data.sources, vocabulary)
    plan = plan_of(recipe, mixture_of(recipe, sources), layout.group_length)
    if recipe.phase is not Phase.decoder:
        check(recipe, plan, data.plan_from_step, data.plan_from_step)
    found = expected(recipe, plan)
    total = sum(supply.tokens for supply in found)
    rows = [("source", "documents", "drawn", "epochs", "tokens", "")]
    rows += [
        (
            supply.name,
            f"{supply.stored:,}",
            f"{supply.drawn:,.0f}",
            f"{supply.epochs:.2f}",
            f"{supply.tokens / total:.1%}",
            "" if supply.dry_step is None else f"dry at step {supply.dry_step:,}",
        )
        for supply in found
    ]
    indented = "\n".join("  " + line for line in table(rows).splitlines())
    return f"  expected at step {recipe.train.steps:,}:\n{indented}"
