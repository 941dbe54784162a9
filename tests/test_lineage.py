"""A resumed run has the plan of its checkpoint, or is told what differs and what to do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmtrain import lineage
from mmtrain.data.mixture import Cursor
from mmtrain.data.pack import Mark
from mmtrain.data.sources import open_source
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.errors import RecipeError
from mmtrain.recipe import load
from mmtrain.settings import Recipe
from mmtrain.supply import open_sources
from mmtrain.train.state import TrainState

TINY = Path(__file__).resolve().parent.parent / "configs/emu/tiny.yaml"
FOLDER = Path("runs/tiny/checkpoints/step-00000100")


@pytest.fixture
def here(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "demo_data").symlink_to(shapes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def origin(*overrides: str) -> tuple[Recipe, dict[str, Any]]:
    recipe = load(TINY, ["train.steps=400", *overrides])
    sources = open_sources(
        recipe.data, recipe.data.sources, load_vocabulary(Path(recipe.data.tokenizer))
    )
    return recipe, lineage.origin(recipe, sources, 6)


def saved(step: int = 100, *overrides: str) -> TrainState:
    return TrainState(step=step, plan_first_pack=790, plan_origin=origin(*overrides)[1])


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed=5", "seed: the checkpoint has 1, the recipe has 5"),
        ("train.global_batch_packs=16", "global_batch_packs: the checkpoint has 8, the recipe has"),
        ("data.pack_tokens=320", "data.pack_tokens: the checkpoint has 160, the recipe has 320"),
        ("data.pack_images=12", "data.pack_images: the checkpoint has 16, the recipe has 12"),
        ("data.window_documents=65", "window_documents: the checkpoint has 64, the recipe has 65"),
        ("data.packing=next_fit", "the checkpoint has first_fit, the recipe has next_fit"),
        ("data.shuffle=false", "data.shuffle: the checkpoint has True, the recipe has False"),
        ("data.weights_by=tokens", "the checkpoint has documents, the recipe has tokens"),
        ("data.sources.text=null", "data.sources: the checkpoint has ['captions', "),
        (
            "data.sources.text.weight=2",
            "text.weight: the checkpoint has {0: 1.0}, the recipe has {",
        ),
        ("data.sources.text.epochs=9", "text.epochs: the checkpoint has None, the recipe has 9.0"),
        ("data.sources.text.max_tokens=32", "text.max_tokens: the checkpoint has 64, the recipe"),
        ("data.sources.text.path=demo_data/pages", "text.path (hash of its index.json): the check"),
    ],
)
def test_what_changes_the_plan_is_refused_by_name(here: Path, override: str, words: str) -> None:
    recipe, now = origin(override)
    with pytest.raises(RecipeError) as refused:
        lineage.check(recipe, now, saved(), FOLDER)
    assert len(refused.value.problems) == 1
    assert words in str(refused.value) and "set data.plan_from_step=100" in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=200",
        "train.micro_batch_packs=2",
        "data.workers=2",
        "optimizer.learning_rate=1e-4",
        "data.sources.text.weight_steps={101: 5}",  # that step is still to come
        "data.sources.text.weight_steps={50: 1}",  # what it was
    ],
)
def test_what_leaves_the_batches_alone_is_not_refused(here: Path, override: str) -> None:
    recipe, now = origin(override)
    lineage.check(recipe, now, saved(), FOLDER)
    state = saved()
    lineage.adopt(state, recipe, now)
    assert state.mark == saved().mark and state.plan_origin == now


def test_a_new_plan_begins_at_the_step_that_asks_for_it(here: Path) -> None:
    begin = ("data.plan_from_step=100", "seed=5", "train.global_batch_packs=4")
    recipe, now = origin(*begin)
    state = saved()
    lineage.check(recipe, now, state, FOLDER)
    lineage.adopt(state, recipe, now)
    assert state.mark == Mark(0, 400, Cursor())
    assert lineage.plan_seed(recipe) not in (
        recipe.seed,
        lineage.plan_seed(replace(recipe, seed=6)),
    )
    later = TrainState(step=150, plan_origin=now)
    lineage.check(recipe, now, later, FOLDER)  # and stays
    with pytest.raises(RecipeError, match=r"data\.plan_from_step: found 0, but .* at step 150"):
        lineage.check(*origin(*begin[1:]), later, FOLDER)
    with pytest.raises(RecipeError, match=r"data\.plan_from_step: found 100, but .* at step 60"):
        lineage.check(recipe, now, saved(60), FOLDER)


def test_a_checkpoint_that_does_not_say_is_believed_with_a_warning(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, now = origin()
    lineage.check(recipe, now, TrainState(step=9), FOLDER)
    assert "does not say what its packs were planned from" in caplog.text
    with pytest.raises(RecipeError, match="plan_from_step: found 3, but"):
        lineage.check(*origin("data.plan_from_step=3"), TrainState(), FOLDER)


def test_a_state_survives_a_manifest() -> None:
    state = TrainState(step=3)
    state.mark = Mark(7, 55, Cursor(99, (60, 39), (1.25, -1.0)))
    assert TrainState(**vars(state)).mark == state.mark
    assert TrainState(step=3, plan_window=7, plan_first_pack=55).mark == Mark(7, 55, Cursor())


def test_the_dataset_is_known_by_the_hash_of_its_index(here: Path) -> None:
    _, now = origin()
    vocabulary = load_vocabulary(Path("demo_data/tokenizer"))
    data = load(TINY).data
    options = open_sources(data, data.sources, vocabulary)[0].options
    pages = open_source("captions", Path("demo_data/pages"), vocabulary, options)
    key = "data.sources.captions.path (hash of its index.json)"
    assert now[key] != pages.lengths.dataset
