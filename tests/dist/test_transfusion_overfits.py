"""A Transfusion learns 64 pairs by heart, in both directions."""

import json
from pathlib import Path

import pytest
from world import REPOSITORY, Forge, World

from mmtrain.data.shapes import write_shapes
from mmtrain.data.shards import open_shards
from mmtrain.decoder.sketches import look_of, text_of
from mmtrain.trained import load_run

SHAPES = REPOSITORY / "configs/transfusion/shapes.yaml"
PAIRS = "{path: demo_data/captions, rule: pair, max_images: 1, max_tokens: 56, image_first: 0.5}"


@pytest.mark.slow
def test_64_pairs_are_learnt_by_heart_in_both_directions(
    tmp_path: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shapes(tmp_path / "demo_data", 104, 0)
    world = World(tmp_path, forge)
    lines = world.train(
        "overfit",
        1,
        f"data.sources.captions={PAIRS}",
        f"data.heldout.captions={PAIRS}",
        "train.steps=600",
        "train.global_batch_packs=1",
        "train.ema=0.98",
        "model.noise.drop=0",
        "log.images_every_steps=0",
        "validate.every_steps=600",
        recipe=SHAPES,
    )
    heldout = json.loads((tmp_path / "runs/overfit/heldout.jsonl").read_text().splitlines()[-1])
    monkeypatch.chdir(tmp_path)
    trained, shards = load_run(Path("runs/overfit")), open_shards(Path("demo_data/captions"))
    pairs = [shards.document(number) for number in range(len(shards))]
    assert len(pairs) == 64
    prompts = [trained.prompt([look_of(pair)]) for pair in pairs]
    assert trained.write(prompts, 24) == [text_of(pair) for pair in pairs]
    assert heldout["image/captions"] < 0.05 * lines[0]["loss_image"]
