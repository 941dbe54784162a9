"""Stage cuts: the heaviest stage is as light as brute force can make it."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.layout.balance import balance, bounds_table, stage_costs, stage_ranges

COSTS = st.lists(st.integers(0, 50).map(float), min_size=1, max_size=9)


@settings(deadline=None, max_examples=150)
@given(COSTS, st.data())
def test_no_cut_has_a_lighter_heaviest_stage(costs: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    every = [stage_costs(costs, cut) for cut in combinations(range(1, len(costs)), stages - 1)]
    found = stage_costs(costs, balance(costs, stages))
    heaviest = min(max(totals) for totals in every)
    assert max(found) == heaviest
    evenest = min(sum(t * t for t in totals) for totals in every if max(totals) == heaviest)
    assert sum(t * t for t in found) == evenest


@settings(deadline=None)
@given(COSTS, st.data())
def test_every_layer_is_in_exactly_one_stage(costs: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    ranges = stage_ranges(len(costs), balance(costs, stages))
    assert len(ranges) == stages and all(len(part) > 0 for part in ranges)
    assert [i for part in ranges for i in part] == list(range(len(costs)))


def test_free_layers_still_fill_stages() -> None:
    assert balance([0.0, 0.0, 0.0], 3) == (1, 2)


def test_fractions_that_do_not_add_exactly_are_cut_well() -> None:
    assert balance([0.1] * 12, 4) == (3, 6, 9)


def test_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="2 layers cannot fill 3 stages"):
        balance([1.0, 1.0], 3)


def test_the_table_names_the_ends_of_each_stage() -> None:
    lines = bounds_table(["stem", "a", "b", "head"], [1, 2, 2, 1], (2,)).splitlines()
    assert lines[1].split() == ["0", "2", "stem", "a", "3", "100%"]
    assert lines[2].split() == ["1", "2", "b", "head", "3", "100%"]
