"""No false alarm on clean noise, one at a real spike."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.train.spikes import SpikeJudge


def curve(steps: int, noise: float, seed: int) -> list[float]:
    """A loss that falls as a power of the step, with noise of every batch."""
    draw = random.Random(seed)
    return [(2 + 8 / (1 + step / 50)) * math.exp(draw.gauss(0, noise)) for step in range(steps)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    noise=st.floats(0, 0.3),
    at=st.integers(100, 1900),
)
def test_one_alarm_at_a_hundredfold_loss_and_none_besides(seed: int, noise: float, at: int) -> None:
    judge = SpikeJudge(128, 10.0, 3)
    losses = curve(2000, noise, seed)
    losses[at] *= 100
    assert [step for step, loss in enumerate(losses) if judge.is_spike(loss)] == [at]


def test_no_alarm_in_ten_thousand_clean_steps() -> None:
    judge = SpikeJudge(128, 10.0, 3)
    assert not [loss for loss in curve(10_000, 0.2, 0) if judge.is_spike(loss)]


def test_a_fall_and_a_flat_curve_are_no_spikes() -> None:
    judge = SpikeJudge(16, 10.0, 3)
    flat = [2.0] * 40 + [2.0001] + [2.0] * 10 + [0.001]
    assert not [loss for loss in flat if judge.is_spike(loss)]


def test_the_score_is_the_distance_from_the_median_in_spreads() -> None:
    judge = SpikeJudge(8, 10.0, 3)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0):
        judge.is_spike(loss)
    assert judge.score(4.5) == 0
    assert judge.score(4.5 + 1.4826 * 2) == pytest.approx(1.0)


def test_a_new_level_is_accepted_after_a_row_of_spikes() -> None:
    judge = SpikeJudge(16, 10.0, 3)
    assert not any(judge.is_spike(2.0 + step % 3 / 100) for step in range(20))
    assert [judge.is_spike(50.0) for _ in range(30)] == [True] * 3 + [False] * 27


def test_a_loss_that_is_not_finite_leaves_no_trace() -> None:
    judge = SpikeJudge(8, 10.0, 3)
    for loss in (1.0, 1.1, math.nan, math.inf, 0.9, 1.0, 1.05):
        assert not judge.is_spike(loss)
    assert math.isfinite(judge.score(1.0))
