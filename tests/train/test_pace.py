"""A rank is slow by its peers, not by ranks with other work."""

import pytest

from mmtrain.train.pace import slowness


def test_ranks_are_compared_within_their_stage() -> None:
    seconds, stages = [1.0, 1.0, 1.5, 3.0, 3.0, 3.0], [0, 0, 0, 1, 1, 1]
    assert slowness(seconds, stages) == pytest.approx([0.8, 0.8, 1.5, 1.0, 1.0, 1.0])


def test_of_two_ranks_the_slow_one_is_measured_by_the_other() -> None:
    assert slowness([1.0, 1.4], [0, 0]) == pytest.approx([1 / 1.4, 1.4])


def test_a_rank_without_peers_is_never_slow() -> None:
    assert slowness([1.0, 9.0], [0, 1]) == [1.0, 1.0]
