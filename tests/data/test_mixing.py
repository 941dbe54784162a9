"""Shares by documents and by tokens, weights that change at steps, sources that run dry."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import lengths_source

from mmtrain.data.choices import WeightsBy
from mmtrain.data.mixture import Cursor, Mixture, Source
from mmtrain.data.pack import Mark, PackPlan, Plan
from mmtrain.data.rules import Draw
from mmtrain.errors import ContentError

BATCH = 4  # packs of a step


def plan_of(sources: list[Source], by: WeightsBy = WeightsBy.documents, window: int = 48) -> Plan:
    return Plan(
        Mixture(sources, seed=3, by=by),
        group_length=10,
        pack_tokens=100,
        pack_images=6,
        window_documents=window,
        seed=5,
        step_packs=BATCH,
    )


def packs_of(plan: Plan, start: int, stop: int) -> list[PackPlan]:
    return [plan.pack(number) for number in range(start, stop)]


def counted(packs: list[PackPlan], tokens: bool = False) -> Counter[int]:
    found: Counter[int] = Counter()
    for pack in packs:
        for document in pack.documents:
            found[document.source] += document.selection.positions if tokens else 1
    return found


def uneven(name: str, mean: int, count: int, **options: object) -> Source:
    draw = Draw("uneven", name)
    sizes = [(1 + draw.below(2 * mean), 0) for _ in range(count)]
    return lengths_source(name, sizes, **options)  # type: ignore[arg-type]


def test_token_shares_are_met_whatever_the_lengths() -> None:
    sources = [uneven("a", 6, 300, weight=1.0), uneven("b", 40, 300, weight=3.0)]
    packs = packs_of(plan_of(sources, WeightsBy.tokens), 0, 400)
    found = counted(packs, tokens=True)
    assert found[1] / found.total() == pytest.approx(0.75, abs=0.005)
    documents = counted(packs)
    assert documents[0] > 1.5 * documents[1]  # short ones come more often
    by_documents = counted(packs_of(plan_of(sources), 0, 400))
    assert by_documents[1] / by_documents.total() == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize("by", WeightsBy)
def test_weights_change_exactly_at_their_step(by: WeightsBy) -> None:
    sources = [
        uneven("a", 10, 300, weight=1.0, weight_steps={7: 0.0, 20: 3.0}),
        uneven("b", 10, 300, weight=0.0, weight_steps={7: 1.0}),
    ]
    plan = plan_of(sources, by)
    parts = [(0, 7), (7, 20), (20, 60)]
    found = [counted(packs_of(plan, start * BATCH, stop * BATCH), True) for start, stop in parts]
    assert set(found[0]) == {0} and set(found[1]) == {1}
    assert found[2][0] / found[2].total() == pytest.approx(0.75, abs=0.03)


def test_a_source_that_was_off_does_not_catch_up() -> None:
    sources = [
        uneven("a", 10, 300, weight=1.0),
        uneven("b", 10, 300, weight=0.0, weight_steps={100: 1.0}),
    ]
    packs = packs_of(plan_of(sources, WeightsBy.tokens), 100 * BATCH, 110 * BATCH)
    found = counted(packs, tokens=True)
    assert found[1] / found.total() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("by", WeightsBy)
def test_a_source_that_runs_dry_says_so_and_leaves_its_share(
    by: WeightsBy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mmtrain")
    sources = [
        uneven("few", 10, 40, epochs=1.5),
        uneven("some", 10, 400),
        uneven("more", 10, 400, weight=2.0),
    ]
    plan = plan_of(sources, by)
    packs = packs_of(plan, 0, 400)
    few = [d for pack in packs for d in pack.documents if d.source == 0]
    assert len(few) == 60 and Counter(d.epoch for d in few) == {0: 40, 1: 20}
    late = counted(packs[100:], tokens=True)
    assert set(late) == {1, 2} and late[2] / late.total() == pytest.approx(2 / 3, abs=0.02)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("source few ran dry in the window of step ")
    assert line.endswith("after 1.5 epochs (60 documents); its share goes to the other sources")
    assert [plan.pack(n) for n in (5, 390)] == [packs[5], packs[390]] and len(caplog.records) == 1


def test_a_mixture_ends_when_all_sources_are_dry() -> None:
    sources = [uneven("a", 10, 50, epochs=2), uneven("b", 10, 30, epochs=1, weight=4.0)]
    plan = plan_of(sources)
    packs = packs_of(plan, 0, plan.packs())
    found = Counter((d.source, d.epoch, d.number) for pack in packs for d in pack.documents)
    assert set(found.values()) == {1} and len(found) == 130
    assert Mixture(sources, seed=0).documents == 130
    assert not plan.pack(plan.packs()).documents


def test_documents_that_nobody_wants_are_a_fault() -> None:
    sources = [uneven("a", 10, 50, epochs=1), uneven("b", 10, 30, weight=0.0, weight_steps={90: 1})]
    with pytest.raises(ContentError, match="sources b have documents left, but their weight is 0"):
        packs_of(plan_of(sources), 0, 80)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(list(WeightsBy)), st.integers(0, 120), st.data())
def test_a_mark_goes_on_exactly_where_it_was_made(
    by: WeightsBy, number: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=1, max_size=4))
    epochs = [data.draw(st.none() | st.floats(0.5, 3)) for _ in weights[1:]]
    sources = [
        uneven(
            f"s{at}",
            4 + 9 * at,
            40 + 5 * at,
            weight=weight,
            weight_steps={10: 2 * weight, 30: 1.0} if at % 2 else {},
            epochs=([None, *epochs])[at],
        )
        for at, weight in enumerate(weights)
    ]
    straight = plan_of(sources, by)
    wanted = packs_of(straight, number, number + 30)
    mark = plan_of(sources, by).mark(number)
    later = plan_of(sources, by)
    later.seek(mark)
    assert packs_of(later, number, number + 30) == wanted
    assert mark.first_pack <= number


def test_a_mark_of_an_older_checkpoint_still_counts() -> None:
    """It knew its window, and windows had a fixed number of documents."""
    sources = [uneven("a", 10, 70, weight=2.0), uneven("b", 20, 50)]
    plan = plan_of(sources)
    plan.seek(Mark(5, 77))
    drawn = [(d.source, d.epoch, d.number) for d in islice_documents(plan, 77, 200)]
    mixture = Mixture(sources, seed=3)
    wanted = [(d.source, d.epoch, d.number) for d in mixture.window(5 * 48, 5 * 48 + 48)]
    assert set(wanted[:40]) <= set(drawn) and len(set(drawn)) == len(drawn)
    assert not set(drawn) & {(d.source, d.epoch, d.number) for d in mixture.window(0, 5 * 48)}


def islice_documents(plan: Plan, start: int, stop: int) -> list[object]:
    return [document for pack in packs_of(plan, start, stop) for document in pack.documents]


def test_the_order_by_documents_is_a_function_of_the_number_of_a_draw() -> None:
    """What a run of an earlier version drew is drawn by this one."""
    mixture = Mixture([uneven("a", 10, 70, weight=2.0), uneven("b", 20, 50)], seed=3)
    drawn = list(islice(mixture.draw(Cursor(), 0, lambda document: 1), 300))
    for start in (1, 77, 250):
        again = list(islice(mixture.draw(Cursor(start), 0, lambda document: 1), 20))
        assert again == drawn[start : start + 20]
