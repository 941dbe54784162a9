"""Latents of a frozen VAE: made in the rank, or before and kept as shards; writing with them.

Both ways they are normalised by the statistics of all of them.
"""

import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from test_layouts import check_equal
from world import REPOSITORY, World

from mmtrain.recipe import read

TINY = REPOSITORY / "configs/transfusion/tiny.yaml"
OVERRIDES = (
    "model.image.channels=4",
    "model.image.size=8",
    "model.image.factor=2",
    "model.noise.clean_limit=5",
    "model.image.vae=vae",
    "train.steps=3",
    "schedule.warmup_steps=1",
    "validate.every_steps=3",
    "validate.packs=2",
    "data.heldout.pages={path: demo_data/heldout/pages, rule: document, max_images: 4,"
    " max_tokens: 64}",
)


def trained(world: World, name: str, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return world.train(name, ranks, *OVERRIDES, *overrides, recipe=TINY)


@pytest.fixture(scope="module")
def made(world: World) -> list[dict[str, Any]]:
    """One rank that encodes its pictures itself."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.save_pretrained(world.folder / "vae")
    asked = (str(TINY), "latents", *OVERRIDES, "--part-documents", "100")
    with pytest.MonkeyPatch.context() as patch:
        assert world.tool_here(patch, "encode_latents.py", *asked) == 0
    told = json.loads((world.folder / "latents/manifest.json").read_text())["statistics"]
    return trained(
        world,
        "made",
        1,
        f"model.image.latent_mean={told['mean']}",
        f"model.image.latent_std={told['std']}",
    )


def test_stored_latents_give_the_losses_of_those_made_in_the_rank(
    world: World, made: list[dict[str, Any]]
) -> None:
    cached = "model.image.latents=latents"
    stored = trained(world, "stored", 2, cached, "parallel.pipeline=2", "log.images_every_steps=2")
    check_equal(stored, made)
    # the run's own recipe holds the statistics, so that drawing needs no latents
    recipes = [read(world.folder / "runs" / name / "recipe.yaml") for name in ("stored", "made")]
    assert recipes[0].model.image.latent_std == recipes[1].model.image.latent_std
    assert len(recipes[0].model.image.latent_std) == 4
    again = json.loads((world.folder / "latents/manifest.json").read_text())
    assert again["form"]["latents"] == [8, 8, 8]
    argv = ("train", str(TINY), "name=stale", *OVERRIDES, cached)
    shutil.copytree(world.folder / "vae", world.folder / "other")
    weights = world.folder / "other/config.json"
    weights.write_text(weights.read_text().replace('"act_fn": "silu"', '"act_fn": "gelu"'))
    assert world.run(1, *argv, "model.image.vae=other") == [65]
    assert "latents is stale: vae: made with" in world.last_log
    part = next((world.folder / "latents").glob("captions-*/000000000100-000000000200"))
    shutil.rmtree(part)
    assert world.run(1, *argv) == [66]
    assert "documents from 100 on are not there" in world.last_log
    manifest = world.folder / "latents/manifest.json"
    manifest.write_text(json.dumps({**again, "statistics": {"mean": "x"}}))
    assert world.run(1, *argv) == [2]
    assert "manifest.json: holds no statistics of latents" in world.last_log
    assert world.run(1, *argv[:-1], "model.image.latents=nowhere") == [2]
    assert "the folder nowhere holds no manifest.json" in world.last_log


def test_a_run_writes_text_and_pictures_by_its_vae(
    world: World, made: list[dict[str, Any]]
) -> None:
    prompts = ("--prompt", "a red circle [IMG]", "--prompt", "a blue square")
    asked = ("sample", "runs/made", *prompts, "--steps", "3", "--scheduler", "ddim")
    assert world.run(1, *asked, "--samples", "2", "--new-tokens", "4") == [0]
    folder = world.folder / "runs/made/samples"
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sorted(record) for record in records] == [["prompt", "text"], ["pieces", "prompt"]]
    names = [piece["images"] for piece in records[1]["pieces"]]
    assert names == [["image-0000.png"], ["image-0001.png"]]
    pictures = [Image.open(folder / name).tobytes() for (name,) in names]
    assert pictures[0] != pictures[1] and Image.open(folder / "image-0000.png").size == (16, 16)
    shown = ("--prompt", f"[{folder / 'image-0000.png'}] this is")
    assert world.run(1, "sample", "runs/made", *shown, "--images", "1", "--new-tokens", "4") == [0]
    assert world.run(1, *asked[:-1], "pndm") == [65]
    assert "this model draws by ddpm or ddim" in world.last_log
