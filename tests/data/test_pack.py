"""A plan is a pure function: budgets hold, nothing is lost or repeated, any order of asking."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import lengths_source

from mmtrain.data.mixture import Cost, Cursor, DrawnDocument, Mixture, OnePass, Source
from mmtrain.data.pack import PackPlan, Plan
from mmtrain.data.packing import first_fit
from mmtrain.data.rules import Draw, Rule
from mmtrain.errors import ContentError

GROUP = 10
Sizes = list[tuple[int, int]]
SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=60)


def plan_of(draws: Mixture | OnePass, window: int = 32, seed: int = 5) -> Plan:
    return Plan(
        draws,
        group_length=GROUP,
        pack_tokens=100,
        pack_images=6,
        window_documents=window,
        seed=seed,
    )


def until_end(plan: Plan) -> list[PackPlan]:
    return list(
        takewhile(lambda pack: pack.documents, (plan.pack(n) for n in range(plan.packs() + 1)))
    )


def demo_sources() -> list[Source]:
    draw = Draw("demo-like lengths")
    captions = [(3 + draw.below(8), 1) for _ in range(700)]
    pages = [(8 + draw.below(12), 2 + draw.below(3)) for _ in range(150)]
    texts = [(6 + draw.below(30), 0) for _ in range(150)]
    return [
        lengths_source("captions", captions, weight=3.0),
        lengths_source("pages", pages, weight=1.0),
        lengths_source("text", texts, weight=0.5, rule=Rule.text),
    ]


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(50, 120), st.integers(3, 9))
def test_packing_loses_nothing_and_exceeds_no_budget(
    sizes: Sizes, tokens: int, images: int
) -> None:
    packs = first_fit(sizes, (tokens, images))
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    for pack in packs:
        assert pack == sorted(pack)
        assert sum(sizes[index][0] for index in pack) <= tokens
        assert sum(sizes[index][1] for index in pack) <= images


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(1, 80))
def test_one_pass_holds_every_document_exactly_once(sizes: Sizes, window: int) -> None:
    source = lengths_source("pages", sizes)
    packs = until_end(plan_of(OnePass(source), window))
    numbers = [document.number for pack in packs for document in pack.documents]
    assert sorted(numbers) == list(range(len(sizes)))
    for pack in packs:
        assert pack.tokens <= 100 and pack.images <= 6


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 50), st.integers(0, 9))
def test_every_document_comes_once_per_epoch(sizes: Sizes, window: int, seed: int) -> None:
    mixture = Mixture([lengths_source("pages", sizes)], seed=seed)
    drawn = mixture.window(0, 3 * len(sizes))
    for epoch in range(3):
        of_epoch = [item.number for item in drawn if item.epoch == epoch]
        assert sorted(of_epoch) == list(range(len(sizes)))
    assert mixture.window(window, 2 * window) == mixture.window(0, 2 * window)[window:]


def test_epochs_and_seeds_differ_in_order() -> None:
    source = lengths_source("pages", [(3, 0)] * 200)
    mixture = Mixture([source], seed=1)
    orders = [[d.number for d in mixture.window(e * 200, e * 200 + 200)] for e in range(3)]
    orders.append([d.number for d in Mixture([source], seed=2).window(0, 200)])
    assert len({tuple(order) for order in orders}) == 4
    stored = Mixture([source], seed=1, shuffle=False).window(0, 200)
    assert [d.number for d in stored] == list(range(200))


@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5), st.integers(0, 3000))
@settings(max_examples=50, deadline=None)
def test_any_stretch_of_draws_has_the_shares_of_its_weights(
    weights: list[float], start: int
) -> None:
    sources = [
        lengths_source(f"s{index}", [(1, 0)] * 50, weight=weight)
        for index, weight in enumerate(weights)
    ]
    drawn = Counter(d.source for d in Mixture(sources, seed=0).window(start, start + 1000))
    for index, weight in enumerate(weights):
        assert abs(drawn[index] - 1000 * weight / sum(weights)) < 8


def test_a_plan_gives_the_same_packs_in_any_order_of_asking() -> None:
    sources = demo_sources()
    forward = plan_of(Mixture(sources, seed=3))
    packs = [forward.pack(number) for number in range(120)]
    assert [pack.number for pack in packs] == list(range(120))
    backward = plan_of(Mixture(demo_sources(), seed=3))
    assert [backward.pack(number) for number in reversed(range(120))] == packs[::-1]
    draw, other = Draw("jumps"), plan_of(Mixture(sources, seed=3))
    for number in (draw.below(120) for _ in range(60)):
        assert other.pack(number) == packs[number]
    assert plan_of(Mixture(sources, seed=4)).pack(7) != packs[7]


def test_a_mark_spares_a_later_process_what_lies_before() -> None:
    first = plan_of(Mixture(demo_sources(), seed=3))
    wanted = [first.pack(number) for number in range(200, 230)]
    mark = first.mark(200)
    later = plan_of(Mixture(demo_sources(), seed=3))
    later.seek(mark)
    planned: list[int] = []
    draw = later.draws.draw

    def counting(cursor: Cursor, step: int, cost: Cost) -> Iterator[tuple[DrawnDocument, Cursor]]:
        planned.append(cursor.draws)
        return draw(cursor, step, cost)

    later.draws.draw = counting  # type: ignore[method-assign]
    assert [later.pack(number) for number in range(200, 230)] == wanted
    assert min(planned) == mark.cursor.draws > 500
    assert later.pack(3) == first.pack(3)  # what lies before can still be had


def test_documents_are_isolated_choices_of_seed_epoch_and_sample() -> None:
    sources = demo_sources()
    alone = plan_of(Mixture(sources[:1], seed=3))
    mixed = plan_of(Mixture(sources, seed=3), window=64)

    def selections(plan: Plan) -> dict[tuple[str, int], object]:
        packs = (plan.pack(number) for number in range(60))
        return {(d.sample_id, d.epoch): d.selection for p in packs for d in p.documents}

    one, other = selections(alone), selections(mixed)
    both = one.keys() & other.keys()
    assert len(both) > 50 and all(one[key] == other[key] for key in both)


def test_demo_like_packs_are_nine_tenths_full() -> None:
    plan = Plan(
        Mixture(demo_sources(), seed=0),
        group_length=GROUP,
        pack_tokens=256,
        pack_images=16,
        window_documents=512,
        seed=0,
    )
    packs = [plan.pack(number) for number in range(300)]
    assert sum(pack.tokens for pack in packs) / (256 * len(packs)) > 0.9


def test_every_pack_of_a_window_holds_the_same_mixture() -> None:
    """First-fit-decreasing alone makes a pack of clips, then one of text: steps would differ."""
    sizes = [(60, 4)] * 20 + [(20, 1)] * 60 + [(15, 0)] * 40
    packs = first_fit(sizes, (210, 12))
    for start, stop in ((0, 20), (20, 80), (80, 120)):
        counts = [sum(start <= index < stop for index in pack) for pack in packs]
        assert min(counts) >= 1 and max(counts) <= 3 * sum(counts) / len(counts), counts
    lengths = [sum(sizes[index][0] for index in pack) for pack in packs]
    assert max(lengths) - min(lengths) <= 40


def test_even_packs_are_never_more_than_first_fit_needs() -> None:
    """Sizes that only fit together in one way: 7 + 3 and 6 + 4, never 6 + 3."""
    assert sorted(first_fit([(7, 0), (6, 0), (4, 0), (3, 0)], (10, 0))) == [[0, 3], [1, 2]]
    assert len(first_fit([(6, 0), (4, 0), (4, 0), (3, 0), (3, 0)], (10, 0))) == 2


def test_documents_without_content_are_left_out() -> None:
    source = lengths_source("p", [(0, 0), (5, 0), (0, 0), (4, 1)])
    packs = until_end(plan_of(OnePass(source)))
    assert sorted(d.number for p in packs for d in p.documents) == [1, 3]


def test_rules_that_leave_nothing_end_with_an_error() -> None:
    plan = plan_of(Mixture([lengths_source("p", [(0, 2)] * 9, rule=Rule.text)], seed=0), window=4)
    with pytest.raises(ContentError, match="sources p leave no text and no image"):
        plan.pack(0)


def test_memory_stays_bounded_while_going_forward() -> None:
    plan = plan_of(Mixture(demo_sources(), seed=3))
    for pack in islice((plan.pack(number) for number in range(1000)), 1000):
        assert pack.documents
    assert len(plan._windows) <= 4


def test_a_mixture_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ContentError, match="at least one source"):
        Mixture([], seed=0)
    with pytest.raises(ContentError, match=r"source p: weight 0\.0 must be above 0"):
        Mixture([lengths_source("p", [(1, 0)], weight=0.0)], seed=0)
    with pytest.raises(ContentError, match="source p holds no documents"):
        Mixture([lengths_source("p", [])], seed=0)


def test_a_draw_of_a_document_has_a_number_of_its_own_wherever_it_is_packed() -> None:
    def numbers(window: int, seed: int) -> dict[tuple[int, int, str], int]:
        plan = plan_of(Mixture(demo_sources(), seed=0), window, seed)
        packs = (plan.pack(n) for n in range(300))
        return {(d.source, d.epoch, d.sample_id): d.noise for p in packs for d in p.documents}

    small, large, other = numbers(32, 5), numbers(128, 5), numbers(32, 6)
    both = small.keys() & large.keys()
    assert len(both) > 500 and any(epoch for _, epoch, _ in both)
    assert all(small[key] == large[key] for key in both)
    assert len(set(small.values())) == len(small)
    assert not set(small.values()) & set(other.values())
