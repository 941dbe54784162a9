"""A global batch is a function of recipe, seed and step alone: any ranks, workers and resumes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import lengths_source

from mmtrain.data.assemble import Made
from mmtrain.data.choices import Overlong, Packing, WeightsBy
from mmtrain.data.loader import Loader, Workers
from mmtrain.data.mixture import DrawnDocument, Mixture, Source
from mmtrain.data.pack import PackPlan, Plan
from mmtrain.data.rules import Draw
from mmtrain.train.state import TrainState

STEPS = 6


Packs = tuple[tuple[int, tuple[tuple[int, int, str], ...]], ...]  # number, (source, epoch, id)s


class Names:
    """Stands for the assembler: what a micro-batch is made of."""

    def batch(self, plans: Sequence[PackPlan]) -> Made[Packs]:
        found = tuple(
            (plan.number, tuple((d.source, d.epoch, d.sample_id) for d in plan.documents))
            for plan in plans
        )
        return Made(found, (), {})


@dataclass(frozen=True)
class Recipe:
    """What a plan is made from."""

    sources: tuple[Source, ...]
    by: WeightsBy
    packing: Packing
    tokens: int
    images: int
    window: int
    seed: int

    def plan(self) -> Plan:
        return Plan(
            Mixture(self.sources, seed=self.seed, by=self.by),
            group_length=10,
            pack_tokens=self.tokens,
            pack_images=self.images,
            window_documents=self.window,
            seed=self.seed,
            packing=self.packing,
            step_packs=12,
        )

    def batches(
        self, ranks: int, steps: range, state: TrainState, workers: int = 0
    ) -> list[list[Any]]:
        """The global batch of each step, put together from all ranks."""
        out: list[list[Any]] = [[] for _ in steps]
        for rank in range(ranks):
            plan = self.plan()
            plan.seek(state.mark)
            loader = Loader(
                plan,
                Names(),
                global_batch_packs=12,
                micro_batch_packs=1 if ranks == 4 else 2,
                data_rank=rank,
                data_ranks=ranks,
                workers=Workers(count=workers),
                start_step=steps.start,
            )
            for found, _ in zip(out, steps, strict=True):
                found += [pack for packs in next(loader.steps()) for pack in packs]
            loader.close()
        return out


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Sources of random lengths, weights, epochs and limits; random budgets and windows."""
    sources = []
    for at in range(draw(st.integers(1, 4))):
        sizes, count = Draw("recipe", draw(st.integers(0, 999)), at), draw(st.integers(3, 100))
        longest = draw(st.integers(2, 90))
        steps = draw(st.dictionaries(st.integers(1, STEPS), st.floats(0.1, 5), max_size=2))
        sources.append(
            lengths_source(
                f"s{at}",
                [(1 + sizes.below(longest), sizes.below(5)) for _ in range(count)],
                weight=draw(st.floats(0.1, 5)),
                weight_steps=steps,
                epochs=None if at == 0 else draw(st.none() | st.floats(0.3, 3)),
                overlong=draw(st.sampled_from(Overlong)),
                positions=draw(st.sampled_from([60, 100])),
            )
        )
    return Recipe(
        tuple(sources),
        draw(st.sampled_from(WeightsBy)),
        draw(st.sampled_from(Packing)),
        draw(st.sampled_from([100, 160, 400])),
        draw(st.integers(4, 12)),
        draw(st.integers(1, 200)),
        draw(st.integers(0, 2**31)),
    )


def once_an_epoch(batches: list[list[Any]]) -> bool:
    """No document comes twice in an epoch of its source."""
    found = Counter(document for batch in batches for _, pack in batch for document in pack)
    return set(found.values()) <= {1}


def check_a_resume(recipe: Recipe, stop: int, order: list[int]) -> None:
    """Ranks `order[0]` until a step, the others after it, against one rank without a stop."""
    whole = recipe.batches(1, range(STEPS), TrainState())
    assert [number for batch in whole for number, _ in batch] == list(range(12 * STEPS))
    assert once_an_epoch(whole)
    first = recipe.batches(order[0], range(stop), TrainState())
    assert first == whole[:stop]
    saved = TrainState(step=stop)
    plan = recipe.plan()
    for number in range(12 * stop):
        plan.pack(number)
    saved.mark = plan.mark(12 * stop)
    for ranks in order[1:]:
        assert recipe.batches(ranks, range(stop, STEPS), saved) == whole[stop:]


RESUMES = (recipes(), st.integers(1, STEPS - 1), st.permutations([1, 2, 3, 4]))
LOOSE: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=10, **LOOSE)
@given(*RESUMES)
def test_any_ranks_before_and_after_a_resume_see_the_batches_of_one(
    recipe: Recipe, stop: int, order: list[int]
) -> None:
    check_a_resume(recipe, stop, order)


@pytest.mark.slow
@settings(max_examples=300, **LOOSE)
@given(*RESUMES)
def test_300_random_recipes_resume_alike(recipe: Recipe, stop: int, order: list[int]) -> None:
    check_a_resume(recipe, stop, order)


@settings(max_examples=4, **LOOSE)
@given(recipes(), st.integers(1, 2), st.integers(1, 4))
def test_workers_change_nothing(recipe: Recipe, workers: int, ranks: int) -> None:
    whole = recipe.batches(1, range(3), TrainState())
    assert recipe.batches(ranks, range(3), TrainState(), workers) == whole


@settings(max_examples=10, **LOOSE)
@given(recipes())
def test_no_document_of_an_epoch_is_skipped(recipe: Recipe) -> None:
    """Every epoch before the last one that was begun is whole, but for what rules leave out."""
    plan = recipe.plan()
    packs = [plan.pack(number) for number in range(12 * STEPS)]
    end = plan.mark(12 * STEPS).cursor  # documents before it lie in packs before its first
    ahead = plan.mark(12 * STEPS).first_pack
    found = Counter((d.source, d.epoch) for pack in packs[:ahead] for d in pack.documents)
    for at, source in enumerate(recipe.sources):
        kept = sum(
            plan._choose(item)[0] is not None
            for item in (DrawnDocument(at, 0, number) for number in range(len(source.lengths)))
        )
        whole = (end.counts[at] if end.counts else 0) // len(source.lengths)
        assert all(found[at, epoch] == kept for epoch in range(whole))
