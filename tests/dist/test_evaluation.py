"""Evaluation from the front door: by command, beside a run, and inside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from world import TINY, World

from mmtrain.data.shards import open_shards

HELDOUT = (
    "data.heldout.captions={path: demo_data/heldout/captions, rule: pair, max_images: 1,"
    " max_tokens: 32}",
    "data.heldout.chat={path: demo_data/heldout/chat, rule: chat, max_images: 1, max_tokens: 64}",
)
TASKS = (
    "evaluate.tasks.truth={kind: shapes_captions, documents: 12}",
    "evaluate.tasks.ranks={kind: rank, candidates: 4}",
    "evaluate.tasks.answers={kind: chat, documents: 6, new_tokens: 4}",
)
STEPS = ("train.steps=4", "schedule.warmup_steps=1")


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """Two tensor ranks, evaluated twice while they train; one task has nothing to draw with."""
    paint = "evaluate.tasks.paint={kind: draw, documents: 4}"
    options = (*HELDOUT, *TASKS, paint, *STEPS, "evaluate.every_steps=2", "parallel.tensor=2")
    world.train("asked", 2, *options)
    return world.folder / "runs" / "asked"


def command(world: World, run: Path, *argv: str) -> int:
    return world.run(1, "evaluate", str(run), *argv)[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(run: Path, step: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / f"evaluation/step-{step:08d}.json").read_text())
    return content


def test_a_run_is_evaluated_while_it_trains(run: Path) -> None:
    figures = lines(run / "evaluation.jsonl")
    assert [line["step"] for line in figures] == [2, 4]
    for line in figures:
        assert 0 <= line["truth/accuracy"] <= 1 and 1 <= line["ranks/mean_rank"] <= 4
        assert {"answers/accuracy", "answers/exact", "ranks/recall_at_1"} <= line.keys()
        assert "truth/share/captions_counting" in line
    asked = {name: task["asked"] for name, task in report(run, 4)["tasks"].items()}
    assert asked["truth"] == 12 and asked["ranks"] == 30 and asked["answers"] >= 6


def test_figures_and_grids_are_in_tensorboard(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert {"evaluate/truth/accuracy", "evaluate/ranks/mrr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("evaluate/truth/accuracy")] == [2, 4]
    assert "evaluate/truth" in events.Tags()["images"]


def test_a_fault_in_evaluation_is_logged_and_training_goes_on(run: Path) -> None:
    log = (run / "log.txt").read_text()
    assert log.count("task paint: paint: there is no visual decoder to draw with") == 2
    assert "done: 4 steps" in log


def test_evaluation_does_not_touch_training(world: World, run: Path) -> None:
    plain = world.train("unasked", 2, *HELDOUT, *STEPS, "parallel.tensor=2")
    asked = lines(run / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in asked] == [line[key] for line in plain]


def test_a_task_by_name_joins_the_others_in_the_report(world: World, run: Path) -> None:
    before = report(run, 4)["tasks"]
    assert command(world, run, "--task", "truth", "--documents", "6") == 0, world.last_log
    after = report(run, 4)["tasks"]
    assert after.keys() == before.keys() and after["truth"]["asked"] == 6
    assert after["ranks"] == before["ranks"]
    assert "source" in world.last_log and "counting" in world.last_log
    table = (run / "evaluation/step-00000004.md").read_text()
    assert "| truth | shapes_captions | 6 |" in table and "| captions | counting |" in table


@pytest.fixture(scope="module")
def published(world: World) -> Path:
    """Held-out pictures in the published forms; one record names a picture that is not there."""
    folder = world.folder / "published"
    (folder / "images").mkdir(parents=True)
    images, captions, questions, annotations = [], [], [], []
    for source, start in (("captions", 0), ("train", 100)):
        path = world.folder / "demo_data" / ("captions" if start else "heldout/captions")
        shards = open_shards(path)
        for number in range(6):
            document, key = shards.document(number), start + number
            (folder / f"images/{key:012d}.jpg").write_bytes(document.parts[0].media[0])
            images.append({"id": key, "file_name": f"{key:012d}.jpg", "source": source})
            captions.append({"image_id": key, "caption": document.parts[1].text})
            questions.append({"question_id": key, "image_id": key, "question": "what colour ?"})
            said = [{"answer": document.meta["objects"][0]["colour"]}] * 10
            annotations.append({"question_id": key, "answers": said, "answer_type": "other"})
    images.append({"id": 7, "file_name": "gone.jpg", "source": "captions"})
    captions.append({"image_id": 7, "caption": "a hole"})

    def write(name: str, source: str, **tables: list[dict[str, Any]]) -> None:
        keys = {entry["id"] for entry in images if entry["source"] == source}
        own = {
            table: [e for e in rows if e.get("image_id", e.get("id", e.get("question_id"))) in keys]
            for table, rows in tables.items()
        }
        (folder / name).write_text(json.dumps(own))

    for source in ("captions", "train"):
        write(f"coco-{source}.json", source, images=images, annotations=captions)
        write(f"questions-{source}.json", source, questions=questions)
        write(f"answers-{source}.json", source, annotations=annotations)
    return folder


def test_published_benchmarks_are_asked_with_and_without_examples(
    world: World, run: Path, published: Path
) -> None:
    coco = (
        f"evaluate.tasks.coco={{kind: caption, path: {published}/coco-captions.json, images: "
        f"{published}/images, prompt: '', beams: 2, new_tokens: 6, shots: [0, 2, 8], support: "
        f"{{path: {published}/coco-train.json, images: {published}/images}}}}"
    )
    vqa = (
        f"evaluate.tasks.vqa={{kind: vqa, path: {published}/answers-captions.json, questions: "
        f"{published}/questions-captions.json, images: {published}/images, prompt: "
        "'{question} is', new_tokens: 4, beams: 1, shots: [2], choice: random, form: text, "
        f"support: {{path: {published}/answers-train.json, questions: "
        f"{published}/questions-train.json, images: {published}/images}}}}"
    )
    code = command(world, run, coco, vqa, "--task", "coco", "--task", "vqa")
    assert code == 0, world.last_log
    tasks = report(run, 4)["tasks"]
    for shots in (0, 2, 8):
        task = tasks[f"coco_{shots}_shots"]
        assert task["asked"] == 6 and task["broken"]["count"] == 1
        assert "gone.jpg" in task["broken"]["first"][0]
        assert task["metrics"]["cider"] >= 0 and len(task["records"]) == 6
    # 8 pictures of 6 positions with their words do not fit 64 positions: the farthest go
    assert tasks["coco_8_shots"]["notes"]["shots left out for want of room"] > 0
    assert "notes" in tasks["coco_2_shots"] and not tasks["coco_2_shots"]["notes"]
    assert 0 <= tasks["vqa"]["metrics"]["accuracy"] <= 100 and tasks["vqa"]["asked"] == 6
    assert {"question_id", "answer", "credit"} <= tasks["vqa"]["records"][0].keys()
    assert "gone.jpg" in world.last_log


def test_what_is_wrong_with_tasks_is_said_at_once(world: World, run: Path) -> None:
    code = command(
        world, run, "evaluate.tasks.a b={kind: chat, shots: [2]}", "evaluate.tasks.q={kind: vqa}"
    )
    assert code == 2
    for piece in ("names become file names", "chat shows no examples", "name the annotations"):
        assert piece in world.last_log
    few = "evaluate.tasks.few={kind: caption, path: x.json, shots: [4], prompt: ''}"
    assert command(world, run, few) == 2
    for piece in ("few.images", "few.support", "4 shots need examples"):
        assert piece in world.last_log
    assert command(world, run, "--task", "trth") == 2
    assert "there is no task 'trth' (did you mean truth?)" in world.last_log
    gone = "evaluate.tasks.gone={kind: vqa, path: no.json, images: none}"
    assert command(world, run, gone, "--task", "gone") == 2
    assert "there is no no.json" in world.last_log and "there is no folder none" in world.last_log
    assert command(world, run, "--task", "paint") == 66
    assert "name a decoder run as --decoder RUN" in world.last_log
    assert command(world, world.folder / "nothing") == 66
    assert "expected the folder of a run" in world.last_log


def test_a_watcher_evaluates_every_checkpoint_until_the_last(world: World, run: Path) -> None:
    before = lines(run / "evaluation.jsonl")
    (run / "evaluation.jsonl").unlink()
    only = ("--task", "truth", "--task", "ranks")
    assert command(world, run, "--watch", *only) == 0, world.last_log
    after = lines(run / "evaluation.jsonl")
    assert [line["step"] for line in after] == [2, 4]
    for old, new in zip(before, after, strict=True):
        assert new["ranks/mrr"] == old["ranks/mrr"]
        assert new["truth/accuracy"] == old["truth/accuracy"]
    assert command(world, run, "--watch", *only) == 0  # nothing is left to do
    assert lines(run / "evaluation.jsonl") == after


def test_grids_show_pictures_with_what_was_written(run: Path) -> None:
    with Image.open(run / "evaluation/step-00000002-truth.png") as grid:
        assert grid.width == 600 and grid.height > 12 * 64


def test_tasks_are_asked_on_pipelines_and_partitions_too(world: World) -> None:
    """The checkpoint is merged by name, whatever layout wrote it; ranks wait for the first."""
    options = (*HELDOUT, *TASKS[:2], *STEPS, "evaluate.every_steps=4")
    figures = []
    for name, ranks, layout in (
        ("asked-pp", 2, ("parallel.pipeline=2",)),
        ("asked-z3", 2, ("parallel.zero_stage=3",)),
        ("asked-one", 1, ()),
    ):
        world.train(name, ranks, *options, *layout)
        (line,) = lines(world.folder / "runs" / name / "evaluation.jsonl")
        figures.append(line)
    assert figures[0] == figures[1] == figures[2]


def test_every_steps_needs_something_to_ask(world: World) -> None:
    assert world.run(1, "train", str(TINY), "name=x", "evaluate.every_steps=5") == [2]
    assert "there is nothing to ask" in world.last_log


@pytest.fixture(scope="module")
def decoder(world: World) -> Path:
    """A decoder run that is evaluated while it trains, drawing what its frozen model writes."""
    world.train("written", 1, *HELDOUT, "train.steps=2", "schedule.warmup_steps=1")
    paint = "evaluate.tasks.paint={kind: draw, documents: 6, steps: 2, guidance: 1}"
    recipe = str(TINY.with_name("tiny_decoder.yaml"))
    options = ("decoder.language=runs/written", "train.steps=2", "schedule.warmup_steps=1")
    argv = ("train", recipe, "name=drawn", *options, paint, "evaluate.every_steps=2")
    assert world.run(2, *argv) == [0, 0], world.last_log
    return world.folder / "runs" / "drawn"


def test_a_decoder_is_judged_while_it_trains_and_by_command(world: World, decoder: Path) -> None:
    (line,) = lines(decoder / "evaluation.jsonl")
    assert 0 <= line["paint/accuracy"] <= 1 and "paint/attribute_binding" in line
    with Image.open(decoder / "evaluation/step-00000002-paint.png") as grid:
        assert grid.width > 6 * 112
    task = report(decoder, 2)["tasks"]["paint"]
    assert "clean" in task["notes"]["the judge's own error on the true pictures"]
    assert command(world, decoder) == 0, world.last_log  # draws the same again
    assert report(decoder, 2)["tasks"]["paint"]["records"] == task["records"]
    writer = world.folder / "runs" / "written"
    paint = "evaluate.tasks.paint={kind: draw, documents: 6, steps: 2, guidance: 1}"
    assert command(world, writer, paint, "--decoder", str(decoder)) == 0, world.last_log
    assert report(writer, 2)["tasks"]["paint"]["records"] == task["records"]
