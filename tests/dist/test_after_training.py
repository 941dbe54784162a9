"""What is done with a run: sampling, evaluating, exporting, looking at its data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from world import TINY, World

from mmtrain.checkpoint.portable import open_tensors
from mmtrain.data.assemble import Assembler
from mmtrain.data.images import decode, encode_png
from mmtrain.data.loader import heldout_batches
from mmtrain.data.mixture import OnePass
from mmtrain.feed import make_plan, open_sources, read_setting
from mmtrain.models.emu.model import losses
from mmtrain.trained import load_layers, load_run

HELDOUT = (
    "data.heldout.captions={path: demo_data/heldout/captions, rule: pair, max_images: 1,"
    " max_tokens: 32}"
)
VALIDATE = (HELDOUT, "validate.every_steps=10", "validate.packs=2")


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """A run of two tensor ranks with held-out captions."""
    world.train("after", 2, *VALIDATE, "parallel.tensor=2", "log.images_every_steps=10")
    return world.folder / "runs" / "after"


def command(world: World, *argv: str) -> int:
    """Exit code of a command on one rank."""
    return world.run(1, *argv)[0]


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_with_and_without_pictures_are_answered(world: World, run: Path) -> None:
    picture = world.folder / "red.png"
    Image.new("RGB", (90, 60), "red").save(picture)
    prompts = [f"[{picture}] the", "a red circle [IMG]", f"[{picture}] and then [IMG]"]
    argv = [word for prompt in prompts for word in ("--prompt", prompt)]
    out = world.folder / "out"
    assert command(world, "sample", str(run), *argv, "--out", str(out)) == 0, world.last_log
    text, *drawn = records(out / "samples.jsonl")
    assert text["prompt"] == "[image] the" and isinstance(text["text"], str)
    assert [record["prompt"] for record in drawn] == ["a red circle", "[image] and then"]
    assert all(len(record["nearest"]) == 5 and record["error"] > 0 for record in drawn)
    assert Image.open(out / "images.png").size[0] == Image.open(out / "text.png").size[0] == 900


@pytest.mark.parametrize("method", ["greedy", "top-p", "beam"])
def test_heldout_documents_serve_as_prompts_and_seeds_repeat(
    world: World, run: Path, method: str
) -> None:
    written = []
    for attempt in ("first", "second"):
        out = world.folder / f"{method}-{attempt}"
        options = ("--method", method, "--new-tokens", "8", "--seed", "3", "--out", str(out))
        assert command(world, "sample", str(run), *options) == 0, world.last_log
        written.append(records(out / "samples.jsonl"))
    assert written[0] == written[1]
    assert sum("text" in record for record in written[0]) == 6
    assert sum("nearest" in record for record in written[0]) == 6


def test_a_missing_picture_is_named_before_weights_are_read(world: World, run: Path) -> None:
    argv = ("--prompt", "[no/such.png] what", "--prompt", "[neither.jpg]")
    assert command(world, "sample", str(run), *argv) == 2
    assert "no/such.png" in world.last_log or "neither.jpg" in world.last_log


def test_evaluation_judges_every_heldout_caption(world: World, run: Path) -> None:
    assert command(world, "evaluate", str(run)) == 0, world.last_log
    report = json.loads((run / "evaluation.json").read_text())
    asked = {score["category"]: score["asked"] for score in report["scores"]}
    assert len(asked) == 6 and sum(asked.values()) == len(report["captions"])
    assert all(0 <= score["right"] <= score["asked"] for score in report["scores"])


def test_heldout_losses_are_those_of_the_plain_model(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensor ranks and one plain fold agree on packs that neither has trained on."""
    monkeypatch.chdir(world.folder)  # a recipe's paths are relative to where it runs
    lines = records(run / "heldout.jsonl")
    assert [line["step"] for line in lines] == [10, 20]
    trained = load_run(run)
    setting = read_setting(trained.recipe)
    (source,) = open_sources(setting, trained.recipe.data.heldout)
    assembler = Assembler(
        sources=[source],
        vocabulary=setting.vocabulary,
        layout=setting.layout,
        pack_tokens=trained.recipe.data.pack_tokens,
    )
    layers = load_layers(setting.spec, trained.recipe.model, open_tensors(run), torch.device("cpu"))
    sums = {"text": [0.0, 0.0], "image": [0.0, 0.0]}
    for batch in heldout_batches(
        make_plan(setting, OnePass(source)), assembler, packs=2, micro_batch_packs=1
    ):
        values = losses(layers, batch.inputs)
        for name, entry in sums.items():
            entry[0] += float((values[name] * batch.targets.weights[name]).sum())
            entry[1] += float(batch.targets.weights[name].sum())
    for name, (total, count) in sums.items():
        assert lines[-1][f"{name}/captions"] == pytest.approx(total / count, rel=1e-5)


def test_export_holds_every_full_tensor_and_never_overwrites(world: World, run: Path) -> None:
    out = world.folder / "export"
    assert command(world, "convert", str(run), "--out", str(out)) == 0, world.last_log
    full, exported = open_tensors(run), open_tensors(out)
    assert exported.names() == full.names()
    assert all(torch.equal(exported.get(name), full.get(name)) for name in full.names())
    assert command(world, "convert", str(run), "--out", str(out)) == 74
    assert "nothing was overwritten" in world.last_log


def test_packs_are_drawn_before_training(world: World) -> None:
    out = world.folder / "look"
    assert command(world, "data", "look", str(TINY), "--packs", "2", "--out", str(out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["pack-00000.png", "pack-00001.png"]


def test_a_damaged_checkpoint_is_refused_by_name(world: World) -> None:
    world.train("damaged", 1, "train.steps=1", "schedule.warmup_steps=1")
    (part,) = (world.folder / "runs/damaged/checkpoints/step-00000001").glob("*.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert command(world, "convert", "runs/damaged", "--out", "never") == 65
    assert part.name in world.last_log and "sha256" in world.last_log
    assert not (world.folder / "never").exists()


def test_text_is_decoded_from_the_runs_own_tokenizer(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    trained = load_run(run)
    picture = Image.new("RGB", (28, 28), "blue")
    prompt = trained.prompt([picture, "a red circle"])
    group = trained.layout.group_length
    assert len(prompt.tokens) == 1 + group + len(trained.vocabulary.encode("a red circle"))
    assert trained.vocabulary.decode(prompt.tokens[1 + group :]) == "a red circle"
    assert prompt.pixels is not None
    assert torch.equal(prompt.pixels[0], decode(encode_png(picture), trained.layout))
