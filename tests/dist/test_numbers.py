"""Bad numbers: steps not made, rollbacks, spikes, replicas, slow ranks; on every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
from world import TINY, World

from mmtrain.checkpoint import store

SHORT = ("schedule.warmup_steps=2", "train.ema=0.9", "train.global_batch_packs=4")
# ranks, the rank whose loss is spoilt, overrides
LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one-rank": (1, 0, ()),
    "dp2-zero0": (2, 1, ("parallel.zero_stage=0",)),
    "dp2-zero1": (2, 1, ("parallel.zero_stage=1",)),
    "dp2-zero2": (2, 1, ("parallel.zero_stage=2",)),
    "dp2-zero3": (2, 1, ("parallel.zero_stage=3",)),
    "tp2": (2, 0, ("parallel.tensor=2",)),
    "pp2": (2, 1, ("parallel.pipeline=2",)),
    "tp2-zero3": (2, 0, ("parallel.tensor=2", "parallel.zero_stage=3")),
    "tp2-pp2": (4, 2, ("parallel.tensor=2", "parallel.pipeline=2")),
}
BF16 = ("one-rank", "dp2-zero0", "dp2-zero2", "dp2-zero3", "pp2")
QUICK = {("one-rank", "fp32"), ("one-rank", "bf16"), ("dp2-zero0", "bf16"), ("dp2-zero1", "fp32"),
         ("dp2-zero3", "fp32"), ("pp2", "fp32")}  # fmt: skip
RUNS = [
    pytest.param(*run, marks=() if run in QUICK else pytest.mark.slow)
    for run in [*((layout, "fp32") for layout in LAYOUTS), *((layout, "bf16") for layout in BF16)]
]


def strict(line: str) -> Any:
    """JSON as the standard has it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def lines(world: World, name: str, file: str) -> list[dict[str, Any]]:
    path = world.folder / "runs" / name / file
    return [strict(line) for line in path.read_text().splitlines()]


def text(world: World, name: str) -> str:
    return (world.folder / "runs" / name / "log.txt").read_text()


def tensors(folder: Path) -> dict[str, bytes]:
    """Everything a checkpoint holds: weights, masters, moments, running means."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def spoilt(world: World, name: str, ranks: int, patch: str, *overrides: str) -> list[int]:
    words = ("train", str(TINY), f"name={name}", *SHORT, *overrides)
    return world.run(ranks, *words, patch=f"spoiling:{patch}")


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, list[dict[str, Any]]]:
    """Lines of one rank by precision, filled by the first tests."""
    return {}


@pytest.mark.parametrize(("layout", "precision"), RUNS)
def test_a_bad_step_changes_nothing_and_the_next_one_learns(
    world: World, expected: dict[str, list[dict[str, Any]]], layout: str, precision: str
) -> None:
    """Step 3 has an infinite loss on one rank, step 5, the last, a NaN gradient on another."""
    ranks, rank, overrides = LAYOUTS[layout]
    name = f"bad-{layout}-{precision}"
    codes = spoilt(
        world,
        name,
        ranks,
        f"loss_then_gradient:{rank} 3 5",
        "train.steps=5",
        "save.every_steps=1",
        "save.keep=9",
        f"train.precision={precision}",
        *overrides,
    )
    assert codes == [0] * ranks, world.last_log
    steps = lines(world, name, "metrics.jsonl")
    assert [line.get("skipped") for line in steps] == [None, None, 1, None, 1]
    assert steps[2]["loss"] is None and steps[4]["loss"] > 0
    assert steps[4]["grad_norm"] is None and steps[3]["grad_norm"] > 0

    root = world.folder / "runs" / name / "checkpoints"
    saved = store.committed(root)
    assert [store.step_of(folder) for folder in saved] == [1, 2, 4, 5]  # none amid bad steps
    assert tensors(saved[3]) == tensors(saved[2]) != tensors(saved[1])

    events = lines(world, name, "events.jsonl")
    assert [(e["step"], e["event"], e["batch"]) for e in events] == [
        (3, "skipped", 2),
        (5, "skipped", 4),
    ]
    assert len(events[0]["layers"]) > 1 and events[1]["layers"] == events[0]["layers"][:1]
    assert 0 < len(events[0]["samples"]) <= len(events[1]["samples"])
    assert events[0]["samples"][0] in text(world, name)

    wanted = expected.setdefault(precision, steps)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    assert steps[3]["loss"] == pytest.approx(wanted[3]["loss"], rel=tolerance)
    assert steps[4]["loss"] == pytest.approx(wanted[4]["loss"], rel=tolerance)


BACK = (
    "train.steps=12",
    "save.every_steps=4",
    "watch.nonfinite_steps=2",
    "schedule.decay=constant",
)


@pytest.mark.parametrize("layout", ["dp2-zero3", pytest.param("pp2", marks=pytest.mark.slow)])
def test_bad_steps_in_a_row_go_back_and_leave_their_batches_out(world: World, layout: str) -> None:
    """Batches 6 and 7 are bad: from the checkpoint of step 4 on, step 5 reads batch 8."""
    ranks, rank, overrides = LAYOUTS[layout]
    name = f"back-{layout}"
    patch = f"infinite_loss:{rank} 7,8"
    assert spoilt(world, name, ranks, patch, *BACK, *overrides) == [0] * ranks, world.last_log
    steps = lines(world, name, "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert not [line for line in steps if "skipped" in line]
    events = lines(world, name, "events.jsonl")
    assert [event["event"] for event in events] == ["skipped", "skipped", "rollback"]
    assert (events[2]["to"], events[2]["batches_left_out"]) == (4, 4)

    # the same as a run that was started again from step 4 behind those batches
    again = f"again-{layout}"
    world.train(again, ranks, *SHORT, *BACK, "train.steps=4", *overrides)
    manifest = world.folder / "runs" / again / "checkpoints/step-00000004/manifest.json"
    content = json.loads(manifest.read_text())
    content["state"]["batches_skipped"] = 4
    manifest.write_text(json.dumps(content))
    world.train(again, ranks, *SHORT, *BACK, *overrides)
    assert [line["loss"] for line in lines(world, again, "metrics.jsonl")[4:]] == [
        line["loss"] for line in steps[4:]
    ]
    last = [
        json.loads((world.folder / f"runs/{n}/checkpoints/step-00000012/manifest.json").read_text())
        for n in (name, again)
    ]
    assert last[0]["state"] == last[1]["state"]
    assert last[0]["state"]["batches_skipped"] == 4
    assert last[0]["files"] == last[1]["files"]


def test_a_rollback_that_does_not_help_ends_the_run_with_87(world: World) -> None:
    patch = "infinite_loss:1 7,8,9,10"
    assert spoilt(world, "lost", 2, patch, *BACK) == [87, 87]
    assert "runs/lost/checkpoints/step-00000004" in world.last_log
    assert "optimizer.learning_rate" in world.last_log
    root = world.folder / "runs/lost/checkpoints"
    (kept,) = store.committed(root)
    assert store.step_of(kept) == 4 and list(store.faults(kept)) == []
    events = [event["event"] for event in lines(world, "lost", "events.jsonl")]
    assert events == ["skipped", "skipped", "rollback", "skipped", "skipped"]


def test_a_rollback_after_new_checkpoints_counts_anew(world: World) -> None:
    patch = "infinite_loss:0 7,8,14,15"
    assert spoilt(world, "twice", 1, patch, *BACK) == [0], world.last_log
    events = [e for e in lines(world, "twice", "events.jsonl") if e["event"] == "rollback"]
    assert [event["to"] for event in events] == [4, 8]


def test_without_a_checkpoint_bad_steps_in_a_row_end_the_run_with_87(world: World) -> None:
    patch = "infinite_loss:0 2,3"
    assert spoilt(world, "none", 1, patch, *BACK) == [87]
    assert "no checkpoint yet" in world.last_log


SPIKES = ("train.steps=14", "watch.spike_window=8", "save.every_steps=6")


def test_a_spike_is_rewound_and_its_batches_left_out(world: World) -> None:
    patch = "hundredfold_loss:9"
    assert spoilt(world, "rewound", 2, patch, *SPIKES, "watch.spike=rewind") == [0, 0]
    (event,) = lines(world, "rewound", "events.jsonl")
    assert (event["event"], event["step"], event["to"]) == ("rollback", 9, 6)
    assert event["batches_left_out"] == 3
    steps = lines(world, "rewound", "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 15))
    assert max(line["loss"] for line in steps) == steps[0]["loss"]


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("one-rank", "fp32"),
        pytest.param("dp2-zero0", "bf16", marks=pytest.mark.slow),
        pytest.param("dp2-zero1", "fp32", marks=pytest.mark.slow),
        ("dp2-zero3", "fp32"),
        pytest.param("pp2", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_spike_is_skipped_before_it_is_learnt(world: World, layout: str, precision: str) -> None:
    ranks, _, overrides = LAYOUTS[layout]
    name = f"spike-{layout}"
    last = ("train.steps=9", "save.every_steps=8", "watch.spike=skip", "watch.spike_window=8")
    kind = f"train.precision={precision}"
    codes = spoilt(world, name, ranks, "hundredfold_loss:9", *last, kind, *overrides)
    assert codes == [0] * ranks, world.last_log
    (event,) = lines(world, name, "events.jsonl")
    assert (event["step"], event["reason"]) == (9, "spike")
    before, after = store.committed(world.folder / "runs" / name / "checkpoints")
    assert tensors(before) == tensors(after)


def test_off_means_that_spikes_are_learnt(world: World) -> None:
    codes = spoilt(world, "learnt", 1, "hundredfold_loss:9", *SPIKES, "watch.spike=off")
    assert codes == [0], world.last_log
    assert not (world.folder / "runs/learnt/events.jsonl").exists()
    assert len(lines(world, "learnt", "metrics.jsonl")) == 14


@pytest.mark.parametrize(
    ("layout", "rank", "name", "axis"),
    [
        pytest.param("dp2-zero0", 1, "blocks.1.mlp.down.weight", "data", marks=pytest.mark.slow),
        ("dp2-zero1", 0, "blocks.1.mlp.down.weight", "data"),
        ("tp2", 1, "blocks.1.norm2.weight", "tensor"),
        pytest.param("tp2-zero3", 1, "blocks.1.norm2.weight", "tensor", marks=pytest.mark.slow),
        pytest.param("tp2-pp2", 3, "head.norm.weight", "tensor", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_found_before_it_is_saved(
    world: World, layout: str, rank: int, name: str, axis: str
) -> None:
    ranks, _, overrides = LAYOUTS[layout]
    run, patch = f"flip-{layout}", f"flipped_weight:{rank} 2 {name}"
    short = ("train.steps=3", "save.every_steps=2", *overrides)
    assert spoilt(world, run, ranks, patch, *short) == [88] * ranks, world.last_log
    assert f"{name} between {axis} ranks" in world.last_log
    assert f"rank {rank}: " in world.last_log
    assert store.committed(world.folder / "runs" / run / "checkpoints") == []


@pytest.mark.slow
def test_replicas_are_the_same_to_the_last_bit_under_sequence_parallelism(world: World) -> None:
    """The other layouts are compared at every save of the first test."""
    every = ("train.steps=4", "watch.replicas_every_steps=1", "parallel.sequence=true")
    world.train("same", 4, *SHORT, *every, "parallel.tensor=2")


def test_a_slow_rank_is_named_once(world: World) -> None:
    short = ("train.steps=102", "train.global_batch_packs=2")
    assert spoilt(world, "slow", 2, "slow_forward:1 50", *short, "train.ema=0") == [0, 0]
    told = [line for line in text(world, "slow").splitlines() if " is slow: " in line]
    assert len(told) == 1 and "rank 1 on " in told[0]
