"""Text and pictures out of a trained model and its decoder, through `mmtrain sample` and Python."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from world import REPOSITORY, World

from mmtrain.generation.artist import Artist
from mmtrain.generation.prompts import parse
from mmtrain.trained import Style

RECIPE = REPOSITORY / "configs/emu/tiny_decoder.yaml"


@pytest.fixture(scope="module")
def runs(world: World) -> tuple[Path, Path]:
    """A model that was trained to begin images, and its decoder; a step each."""
    world.train(
        "tiny", 1, "train.steps=1", "schedule.warmup_steps=1", "data.learn_image_begin=true"
    )
    found = world.run(1, "train", str(RECIPE), "train.steps=17")  # after its last change of rate
    assert found == [0], world.last_log
    return world.folder / "runs/tiny", world.folder / "runs/tiny_decoder"


def written(world: World, *argv: str) -> tuple[Path, list[dict[str, Any]]]:
    """Where a sample command wrote, and its records."""
    out = world.folder / f"out-{len(list(world.folder.glob('out-*')))}"
    assert world.run(1, "sample", *argv, "--out", str(out)) == [0], world.last_log
    lines = (out / "samples.jsonl").read_text().splitlines()
    return out, [json.loads(line) for line in lines]


def test_a_decoder_draws_what_a_prompt_asks_for(world: World, runs: tuple[Path, Path]) -> None:
    language, decoder = (str(run) for run in runs)
    options = ("--prompt", "a red circle [IMG]", "--samples", "2", "--steps", "2", "--seed", "5")
    out, (record,) = written(world, language, "--decoder", decoder, *options)
    assert record == {
        "prompt": "a red circle",
        "images": ["image-0000.png", "image-0001.png"],
    }
    first, second = (Image.open(out / name) for name in record["images"])
    assert first.size == (8, 8) and ImageChops.difference(first, second).getbbox()
    again, _ = written(world, decoder, *options)  # the decoder's recipe names its writer
    same = Image.open(again / "image-0000.png")
    assert ImageChops.difference(first, same).getbbox() is None


def test_examples_and_blends_are_prompts_too(world: World, runs: tuple[Path, Path]) -> None:
    picture = world.folder / "blue.png"
    Image.new("RGB", (40, 40), "blue").save(picture)
    prompts = world.folder / "prompts.txt"
    prompts.write_text(f"[{picture}][{picture}][IMG]\n[{picture}] one [{picture}] two [IMG]\n")
    options = ("--prompts", str(prompts), "--steps", "2")
    out, records = written(world, str(runs[1]), *options)
    assert [record["prompt"] for record in records] == [
        "[image] [image]",
        "[image] one [image] two",
    ]
    assert (out / "images.png").exists() and not (out / "text.png").exists()


def test_text_and_images_take_turns(world: World, runs: tuple[Path, Path]) -> None:
    options = ("--prompt", "a red circle [IMG]", "--images", "2", "--new-tokens", "4")
    _, (record,) = written(world, str(runs[1]), *options, "--steps", "2")
    pieces = record["pieces"]
    assert list(pieces[0]) == ["images"] and any("text" in piece for piece in pieces[1:])


def test_a_decoder_of_another_model_is_refused(world: World, runs: tuple[Path, Path]) -> None:
    wide = ("name=wide", "model.causal.queries=3", "train.steps=1", "schedule.warmup_steps=1")
    world.train("wide", 1, *wide)
    argv = (str(world.folder / "runs/wide"), "--decoder", str(runs[1]), "--prompt", "a [IMG]")
    assert world.run(1, "sample", *argv) == [65]
    assert "draws 4 rows of width 32" in world.last_log and "writes 3" in world.last_log


def test_drawing_from_python(
    world: World, runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    artist = Artist.load(*runs, style=Style(steps=2, guidance=1.0, seed=1))
    requests = parse(["a red circle [IMG]", "a blue square [IMG]"])
    pictures = artist.draw([request.pieces for request in requests])
    assert [picture.size for picture in pictures] == [(8, 8)] * 2
    prompt = artist.trained.prompt([pictures[0], "the colour is"])
    assert isinstance(artist.trained.write([prompt], new_tokens=3)[0], str)
