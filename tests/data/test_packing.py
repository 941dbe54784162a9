"""Strategies of packing: nothing lost, budgets held, even packs, Unified-IO 2's traces exactly."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import lengths_source

from mmtrain.data.choices import Overlong, Packing
from mmtrain.data.constraints import constrained
from mmtrain.data.mixture import Mixture, OnePass
from mmtrain.data.pack import Cuts, Plan
from mmtrain.data.packing import STRATEGIES, Size, first_fit, next_fit, pair, two_sided
from mmtrain.data.rules import Draw, Rule

Sizes = list[Size]
SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=60)
NO_LIMIT = 1 << 40


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Packing)), SIZES, st.integers(40, 120), st.integers(3, 9))
def test_every_strategy_holds_the_budgets_and_loses_nothing(
    packing: Packing, sizes: Sizes, tokens: int, images: int
) -> None:
    packs = STRATEGIES[packing].pack(sizes, (tokens, images))
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    for pack in packs:
        assert pack == sorted(pack)
        assert sum(sizes[index][0] for index in pack) <= tokens
        assert sum(sizes[index][1] for index in pack) <= images


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Packing)), SIZES, st.integers(1, 9))
def test_a_window_never_ends_with_more_packs_than_it_may(
    packing: Packing, sizes: Sizes, most: int
) -> None:
    strategy, budgets = STRATEGIES[packing], (60, 6)
    count = strategy.whole(sizes, budgets, most)
    assert 1 <= count <= len(sizes)
    assert len(strategy.pack(sizes[:count], budgets)) <= most


@pytest.fixture(scope="module")
def traces(repository: Path) -> dict[str, Any]:
    path = repository / "tests/golden/uio2_packing/packing.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize("name", ["tiny", "mixed", "mixed1", "ties", "oversize", "crowded"])
def test_pairs_are_those_of_the_release_event_by_event(traces: dict[str, Any], name: str) -> None:
    (stream,) = (stream for stream in traces["pairing"] if stream["name"] == name)
    sizes = [(encoder, decoder) for encoder, decoder in stream["lengths"]]
    budgets = (stream["max_encoder"], stream["max_decoder"])
    events = list(pair(sizes, budgets, stream["pool_size"]))
    rows = [None if row is None else list(row) for row, _ in events]
    assert rows == [event["row"] for event in stream["events"]]
    assert [slots for _, slots in events] == stream["pool_after"]
    left = [row for row in rows if row and any(sizes[at][1] for at in row if at >= 0)]
    assert left == stream["rows"]  # the release leaves out rows without a target
    assert [row for row in rows if row and row not in left] == stream["dropped_rows"]


def test_two_sided_keeps_what_waits_at_the_end() -> None:
    sizes = [(3, 2), (5, 5), (2, 4), (2, 3)]
    assert [row for row, _ in pair(sizes, (5, 5), 2) if row] == [(1, -1), (3, 0)]
    assert two_sided(sizes, (5, 5)) == [[0, 3], [1], [2]]


def test_next_fit_closes_a_pack_at_the_first_document_without_room() -> None:
    sizes = [(6, 0), (5, 0), (4, 0), (1, 0), (9, 0)]
    assert next_fit(sizes, (10, 0)) == [[0], [1, 2, 3], [4]]
    assert STRATEGIES[Packing.next_fit].whole(sizes, (10, 0), NO_LIMIT) == 4


def pages(count: int) -> Sizes:
    """Long pages with few images and short ones with many: hard to fill evenly."""
    draw = Draw("pages")
    return [(20 + draw.below(120), 1 + draw.below(5)) for _ in range(count)]


@pytest.mark.parametrize("packing", [Packing.first_fit, Packing.next_fit, Packing.pad])
def test_first_fit_at_look_ahead_256_fills_96_percent_evenly(packing: Packing) -> None:
    plan = Plan(
        Mixture([lengths_source("pages", pages(2000))], seed=0),
        group_length=10,
        pack_tokens=512,
        pack_images=30,
        window_documents=256,
        seed=0,
        packing=packing,
    )
    packs = [plan.pack(number) for number in range(200)]
    fill = sum(pack.tokens for pack in packs) / (512 * len(packs))
    uneven = max(pack.images for pack in packs) * len(packs) / sum(pack.images for pack in packs)
    if packing is Packing.first_fit:
        assert fill >= 0.96 and uneven <= 1.25, (fill, uneven)
    else:
        assert fill < 0.96 and uneven > 1.25, (fill, uneven)


def test_windows_end_where_packs_are_full_and_lose_nothing() -> None:
    plan = Plan(
        OnePass(lengths_source("pages", pages(300))),
        group_length=10,
        pack_tokens=512,
        pack_images=30,
        window_documents=64,
        seed=0,
    )
    packs = [plan.pack(number) for number in range(plan.packs())]
    numbers = [document.number for pack in packs for document in pack.documents]
    assert sorted(numbers) == list(range(300))
    begins = [mark.cursor.draws for mark in plan._marks]
    windows = [after - before for before, after in pairwise(begins)]
    assert max(windows) <= 64 and max(windows[:-1]) < 64


@pytest.mark.parametrize("rule", [Rule.document, Rule.subsequence, Rule.text, Rule.video])
def test_documents_longer_than_their_limit_are_cut_or_dropped_and_counted(
    rule: Rule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mmtrain")
    sizes = [(5, 0), (90, 0), (20, 0), (38, 0), (39, 0)]

    def plan_of(overlong: Overlong) -> Plan:
        source = lengths_source("pages", sizes, rule=rule, overlong=overlong, positions=40)
        return Plan(
            OnePass(source),
            group_length=10,
            pack_tokens=100,
            pack_images=6,
            window_documents=8,
            seed=0,
        )

    def lengths(plan: Plan) -> dict[int, int]:
        packs = (plan.pack(number) for number in range(plan.packs()))
        return {d.number: d.selection.positions for pack in packs for d in pack.documents}

    assert lengths(plan_of(Overlong.cut)) == {0: 7, 1: 40, 2: 22, 3: 40, 4: 40}
    assert not caplog.records
    dropping = plan_of(Overlong.drop)
    assert lengths(dropping) == {0: 7, 2: 22, 3: 40}
    assert dropping.cuts == {"pages": Cuts(dropped=2)}
    assert "source pages: 2 documents longer than max_tokens were dropped" in caplog.text


def test_a_page_is_cut_before_an_image_that_would_not_fit_whole() -> None:
    source = lengths_source("pages", [(10, 3)], positions=35)
    plan = Plan(
        OnePass(source),
        group_length=10,
        pack_tokens=100,
        pack_images=6,
        window_documents=8,
        seed=0,
    )
    (planned,) = plan.pack(0).documents
    assert (planned.selection.images, planned.selection.positions) == (2, 32)


def test_exchanges_even_out_images_where_first_fit_has_no_room() -> None:
    sizes = [(50, 1)] * 36 + [(25, 4)] * 36 + [(24, 4)] * 36  # two halves, or four quarters
    packs = first_fit(sizes, (100, 40))
    images = [sum(sizes[index][1] for index in pack) for pack in packs]
    assert len(packs) <= 37 and max(images) <= 1.25 * sum(images) / len(images), images


@pytest.mark.parametrize("name", ["one", "two", "tight", "loose"])
def test_bounded_batches_are_those_of_the_release_event_by_event(
    traces: dict[str, Any], name: str
) -> None:
    (stream,) = (stream for stream in traces["constraint_batching"] if stream["name"] == name)
    numbers = (stream["bounds"], stream["batch_size"], stream["pool_size"])
    found = [
        {
            "arrival": arrival,
            "batch": left,
            "partial_after": list(waiting.batch),
            "overflow_after": list(waiting.overflow),
        }
        for arrival, (left, waiting) in enumerate(constrained(stream["counts"], *numbers))
    ]
    assert found == stream["events"]
    assert [event["batch"] for event in found if event["batch"]] == stream["batches"]
