"""How long the documents of a recipe last, as `mmtrain check` says it."""

from pathlib import Path

import pytest

from mmtrain import cli
from mmtrain.data.pack import Plan
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.errors import RecipeError
from mmtrain.models.families import spec_of
from mmtrain.recipe import load
from mmtrain.settings import Recipe
from mmtrain.supply import check, expected, mixture_of, open_sources, plan_of

TINY = Path(__file__).resolve().parent.parent / "configs/emu/tiny.yaml"
ONCE = [
    f"data.sources.{name}.epochs=1" for name in ("captions", "pages", "clips", "boards", "text")
]


@pytest.fixture
def here(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "demo_data").symlink_to(shapes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*overrides: str) -> tuple[Recipe, Plan]:
    recipe = load(TINY, overrides)
    vocabulary = load_vocabulary(Path(recipe.data.tokenizer))
    layout = spec_of(recipe.family, recipe.phase).sequence(recipe.model, vocabulary.ids)
    sources = open_sources(recipe.data, recipe.data.sources, vocabulary)
    return recipe, plan_of(recipe, mixture_of(recipe, sources), layout.group_length)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.weights_by=tokens",),
        ("data.sources.clips.epochs=3", "data.sources.text.epochs=0.5"),
        ("data.sources.captions.weight_steps={20: 0, 40: 8}", "data.weights_by=tokens"),
        ("data.packing=pad",),
    ],
)
def test_expected_epochs_are_those_of_the_plan(here: Path, overrides: tuple[str, ...]) -> None:
    recipe, plan = planned("train.steps=60", "data.window_documents=32", *overrides)
    counts = dict.fromkeys(recipe.data.sources, 0)
    for number in range(60 * recipe.train.global_batch_packs):
        for document in plan.pack(number).documents:
            counts[plan.source_names[document.source]] += 1
    for supply in expected(recipe, plan):
        assert supply.drawn == pytest.approx(counts[supply.name], rel=0.08, abs=6)
        limit = recipe.data.sources[supply.name].epochs
        if limit is not None:
            assert supply.epochs == pytest.approx(limit, rel=0.1) and supply.dry_step is not None


def test_a_run_that_its_data_cannot_feed_is_refused_with_the_steps_they_suffice_for(
    here: Path,
) -> None:
    recipe, plan = planned("train.steps=60", *ONCE)
    with pytest.raises(RecipeError, match="have used up their epochs after") as refused:
        check(recipe, plan, 0, 0)
    (problem,) = refused.value.problems
    found = int(problem.text.partition("train.steps=")[2].partition(" ")[0])
    for steps, suffices in ((found, True), (found + 1, False)):
        recipe, plan = planned(f"train.steps={steps}", "schedule.warmup_steps=0", *ONCE)
        if suffices:
            check(recipe, plan, 0, 0)
            assert plan.pack(8 * steps - 1).documents
        else:
            with pytest.raises(RecipeError, match=rf"use train\.steps={found} or fewer"):
                check(recipe, plan, 0, 0)


def test_check_prints_epochs_and_says_what_runs_dry(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(TINY), "data.sources.clips.epochs=1", "train.steps=40"]) == 0
    out = capsys.readouterr().out
    assert "expected at step 40:" in out and "of documents" in out
    (clips,) = [line for line in out.splitlines() if line.strip().startswith("clips")]
    assert "1.00" in clips and "dry at step" in clips


def test_check_and_train_refuse_data_that_end_too_soon(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(TINY), *ONCE, "train.steps=60"]) == 2
    assert "train.steps: 60 steps of 8 packs, but all sources (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.sources.text.epochs=0", "data.sources.text.epochs: found 0.0; allowed: above 0"),
        ("data.sources.text.weight=0", "data.sources.text.weight: found 0.0; allowed: above 0"),
        ("data.sources.text.weight_steps={x: 1}", "data.sources.text.weight_steps.x: found 1.0"),
        ("data.sources.text.weight_steps={5: -1}", "data.sources.text.weight_steps.5: found -1.0"),
        ("data.packing=best_fit", "one of first_fit, next_fit, pad, two_sided"),
        ("data.weights_by=images", "one of documents, tokens"),
        ("data.sources.text.overlong=split", "one of cut, drop"),
        ("data.plan_from_step=-1", "data.plan_from_step: found -1; allowed: 0 or more"),
    ],
)
def test_faults_of_a_mixture_name_their_key(here: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as found:
        load(TINY, [override])
    assert words in str(found.value)


def test_weights_that_are_all_0_at_a_step_are_a_fault(here: Path) -> None:
    off = [f"{line.rpartition('.')[0]}.weight_steps={{30: 0}}" for line in ONCE]
    with pytest.raises(RecipeError, match=r"data\.sources: every weight is 0 from step 30 on"):
        load(TINY, off)
