"""The layout as numbers: rank order, and what the engines refuse."""

from itertools import product

import pytest

from mmtrain.layout.dims import ParallelDims, dims_for, divisors


@pytest.mark.parametrize("data, tensor, pipeline", list(product((1, 2, 3), (1, 2, 4), (1, 3))))
def test_ranks_and_places_map_one_to_one(data: int, tensor: int, pipeline: int) -> None:
    dims = ParallelDims(data=data, tensor=tensor, pipeline=pipeline)
    places = [dims.coord(rank) for rank in range(dims.world_size)]
    assert sorted(set(places)) == places  # all different, and in (pipeline, data, tensor) order
    assert [dims.rank(place) for place in places] == list(range(dims.world_size))


def test_tensor_ranks_are_neighbours_and_stages_are_farthest_apart() -> None:
    dims = ParallelDims(data=2, tensor=2, pipeline=2)
    assert dims.coord(1) == (0, 0, 1)
    assert dims.coord(2) == (0, 1, 0)
    assert dims.coord(4) == (1, 0, 0)


def test_what_tensor_and_pipeline_leave_over_becomes_data_ranks() -> None:
    dims = dims_for(24, tensor=2, pipeline=3, zero_stage=1, sequence=False)
    assert dims.data == 4
    assert list(dims.problems(24)) == []


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_stages_need_zero_1(zero_stage: int) -> None:
    (problem,) = ParallelDims(pipeline=2, zero_stage=zero_stage).problems()
    assert problem.place == "parallel.zero_stage"
    assert "parallel.zero_stage=1 or parallel.pipeline=1" in problem.text


def test_every_fault_of_a_layout_is_listed() -> None:
    dims = dims_for(8, tensor=1, pipeline=3, zero_stage=2, sequence=True)
    places = [problem.place for problem in dims.problems(8)]
    assert places == ["parallel.zero_stage", "parallel.sequence", "parallel"]


def test_a_misfit_says_what_fits() -> None:
    dims = dims_for(6, tensor=4, pipeline=1, zero_stage=1, sequence=False)
    (problem,) = dims.problems(6)
    assert "does not divide the 6 rank(s)" in problem.text
    assert str(divisors(6)) in problem.text


def test_zero_ranks_are_refused_without_arithmetic_on_them() -> None:
    dims = dims_for(2, tensor=0, pipeline=-1, zero_stage=7, sequence=False)
    places = {problem.place for problem in dims.problems(2)}
    assert places == {"parallel.tensor", "parallel.pipeline", "parallel.zero_stage"}
