"""Sample ids of every global batch: stopped and gone on with on other ranks, as on one rank."""

import json
from typing import Any

import pytest
from world import TINY, World

DATA = (
    "train.global_batch_packs=12",
    "data.pack_tokens=96",
    "data.window_documents=48",
    "data.weights_by=tokens",
    "data.sources.captions.weight_steps={3: 1.0}",
    "data.sources.text.epochs=1",
    "schedule.warmup_steps=1",
    "schedule.decay=constant",
    "log.samples=true",
)


def samples(world: World, name: str) -> list[dict[str, Any]]:
    path = world.folder / "runs" / name / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "ranks", [(2, 1, 4, 3), pytest.param((3, 4, 1, 2, 1), marks=pytest.mark.slow)]
)
def test_global_batches_do_not_depend_on_ranks_or_stops(
    world: World, ranks: tuple[int, ...]
) -> None:
    name, steps = "-".join(map(str, ranks)), 2 * len(ranks)
    world.train(f"whole-{name}", 1, *DATA, f"train.steps={steps}")
    for turn, count in enumerate(ranks, start=1):
        workers = f"data.workers={turn % 2}"
        world.train(f"cut-{name}", count, *DATA, f"train.steps={2 * turn}", workers)
    whole, cut = samples(world, f"whole-{name}"), samples(world, f"cut-{name}")
    assert [line["step"] for line in whole] == list(range(1, steps + 1))
    assert cut == whole
    packs = [number for line in whole for number in line["packs"]]
    assert packs == list(range(12 * steps))
    texts = [sample for line in whole for sample in line["samples"] if sample.startswith("text")]
    assert len(texts) == len(set(texts)) > 20  # one epoch of it, then no more
    losses = [[line["loss"] for line in world.metrics(f"{k}-{name}")] for k in ("whole", "cut")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_changed_plan_is_refused_by_name_and_taken_when_it_is_asked_for(world: World) -> None:
    world.train("plan", 1, *DATA, "train.steps=2")
    checkpoint = world.folder / "runs/plan/checkpoints/step-00000002/manifest.json"
    before = (checkpoint.read_bytes(), (world.folder / "runs/plan/recipe.yaml").read_bytes())
    changed = (
        *("train", str(TINY), "name=plan", *DATA, "train.steps=4"),
        *("seed=7", "train.global_batch_packs=8", "data.pack_tokens=160"),
        "data.sources.clips=null",
    )
    assert world.run(2, *changed) == [2, 2]
    for words in (
        "seed: the checkpoint has 1, the recipe has 7",
        "train.global_batch_packs: the checkpoint has 12, the recipe has 8",
        "data.pack_tokens: the checkpoint has 96, the recipe has 160",
        "'clips', 'boards', 'text'], the recipe has ['captions', 'pages', 'boards', 'text']",
        "set data.plan_from_step=2",
    ):
        assert words in world.last_log
    assert before == (
        checkpoint.read_bytes(),
        (world.folder / "runs/plan/recipe.yaml").read_bytes(),
    )
    assert world.run(2, *changed, "data.plan_from_step=2") == [0, 0], world.last_log
    lines = samples(world, "plan")
    assert [number for line in lines[2:] for number in line["packs"]] == list(range(16, 32))
    assert not [name for line in lines[2:] for name in line["samples"] if "clips" in name]
    again = ("train", str(TINY), "name=plan", *DATA, "train.steps=6", *changed[-4:])
    assert world.run(1, *again) == [2]
    assert "data.plan_from_step: found 0, but" in world.last_log
