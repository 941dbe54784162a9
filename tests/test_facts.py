"""What `check` and `plan` say about a recipe."""

from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.facts import Facts, accumulation, bubble, collect, describe, plan
from mmtrain.layout.balance import stage_ranges
from mmtrain.layout.dims import ParallelDims
from mmtrain.nn.lora import LoraConfig
from mmtrain.recipe import examine
from mmtrain.settings import Recipe, Recompute

TINY = Path(__file__).resolve().parent.parent / "configs/emu/tiny.yaml"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    found = examine(TINY).recipe
    assert found is not None
    return found


def total(facts: Facts, dims: ParallelDims, part: str) -> float:
    stages = range(len(stage_ranges(len(facts.census), facts.bounds())))
    return sum(float(getattr(facts.memory(stage, dims), part)) for stage in stages)


def test_one_rank_holds_every_number_once(recipe: Recipe) -> None:
    memory = collect(recipe).memory(0, ParallelDims())
    numbers = collect(recipe).numbers
    assert memory.weights == memory.gradients == 4 * numbers  # fp32
    assert memory.optimizer == 12 * numbers


def test_zero_divides_what_its_stage_says(recipe: Recipe) -> None:
    facts = collect(recipe)
    one = facts.memory(0, ParallelDims(zero_stage=0))
    for stage, parts in {
        0: (1, 1, 1),
        1: (1, 1, 4),
        2: (1, 4, 4),
        3: (4, 4, 4),
    }.items():
        memory = facts.memory(0, ParallelDims(data=4, zero_stage=stage))
        assert memory.weights * parts[0] == one.weights
        assert memory.gradients * parts[1] == one.gradients
        assert memory.optimizer * parts[2] == one.optimizer


def test_stages_hold_the_model_between_them(recipe: Recipe) -> None:
    split = replace(recipe, parallel=replace(recipe.parallel, pipeline=3))
    facts = collect(split)
    assert total(facts, ParallelDims(pipeline=3), "weights") == 4 * facts.numbers


def test_tensor_ranks_share_matrices_and_repeat_norms(recipe: Recipe) -> None:
    facts = collect(recipe)
    whole = facts.memory(0, ParallelDims()).weights
    half = facts.memory(0, ParallelDims(tensor=2)).weights
    assert whole / 2 < half < 0.6 * whole


def test_frozen_parameters_have_no_gradients(recipe: Recipe) -> None:
    frozen = replace(recipe, train=replace(recipe.train, freeze=("vision",)))
    facts = collect(frozen)
    vision = sum(la.count for la in facts.census if la.name.startswith("vision."))
    memory = facts.memory(0, ParallelDims())
    assert memory.weights - memory.gradients == 4 * vision
    assert "frozen" in describe(frozen)


def test_below_the_first_trained_layer_nothing_is_kept_and_one_pass_is_made(
    recipe: Recipe,
) -> None:
    model = replace(recipe.model, lora=LoraConfig(rank=4))
    tuned = collect(replace(recipe, model=model))
    whole = collect(recipe)
    layers = {layer.name: i for i, layer in enumerate(tuned.census)}
    assert set(whole.passes) == {3.0}
    assert {tuned.passes[i] for name, i in layers.items() if "blocks" not in name} <= {1.0, 2.0}
    block = tuned.census[layers["blocks.1"]]
    share = sum(32 * 4 * 2 for _ in "qkvo") / block.count
    assert tuned.passes[layers["blocks.1"]] == pytest.approx(2 + share)
    assert tuned.trained_numbers == 3 * 4 * 2 * 32 * 4
    split = ParallelDims(pipeline=2)
    assert tuned.memory(0, ParallelDims()).activations < whole.memory(0, split).activations
    text = describe(tuned.recipe)
    assert "3,072" in text and "frozen, 0.001" in text


def test_recomputation_keeps_less(recipe: Recipe) -> None:
    again = replace(recipe, parallel=replace(recipe.parallel, recompute=Recompute.full))
    kept = [collect(r).memory(0, ParallelDims()).activations for r in (recipe, again)]
    assert kept[1] < kept[0] / 2
    assert "4 passes" in plan(again, 1) and "3 passes" in plan(recipe, 1)


def test_batch_arithmetic(recipe: Recipe) -> None:
    assert accumulation(recipe, 1) == 8 and accumulation(recipe, 4) == 2
    assert bubble(1, 8) == 0 and bubble(4, 9) == 0.25
    text = plan(recipe, 2)
    assert "2 data ranks x 4 micro-batches x 1 packs of 160 positions = 1,280 positions" in text
