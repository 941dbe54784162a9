"""Latents are normalised by their statistics, both ways, and only where there are some."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from small_transfusion import small

from mmtrain.data.latent_statistics import MANIFEST, Sums
from mmtrain.encoders.vae import Vae, mode
from mmtrain.errors import RecipeError
from mmtrain.models.pictures import an_image_each
from mmtrain.models.transfusion.config import TransfusionConfig
from mmtrain.models.transfusion.latents import Latents
from mmtrain.models.transfusion.spec import TRANSFUSION

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TransfusionConfig:
    """A model with a VAE, without statistics."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
    ).save_pretrained(folder)
    config = small()
    return replace(config, image=replace(config.image, vae=str(folder), factor=2))


def test_latents_have_mean_0_and_deviation_1_and_come_back(plain: TransfusionConfig) -> None:
    pixels = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = Latents(plain, CPU)
    assert plain.image.vae is not None
    moments = Vae(Path(plain.image.vae), CPU).encode(pixels)
    assert torch.equal(raw.likeliest(pixels), mode(moments))
    found = Sums.of(moments).statistics()
    image = replace(plain.image, latent_mean=found.mean, latent_std=found.std)
    told = Latents(replace(plain, image=image), CPU)
    torch.testing.assert_close(
        told.decode(told.likeliest(pixels)), raw.decode(raw.likeliest(pixels)), rtol=1e-4, atol=1e-5
    )
    numbers = torch.arange(64)
    drawn, other = told.of(pixels, numbers), raw.of(pixels, numbers)
    torch.testing.assert_close(drawn.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.ones(3), rtol=0, atol=0.05)
    mean, std = (torch.tensor(told).view(3, 1, 1) for told in (found.mean, found.std))
    torch.testing.assert_close(drawn * std + mean, other, rtol=1e-4, atol=1e-4)
    # stored moments are those of the VAE itself, and are normalised alike
    stored = Latents(replace(plain, image=replace(image, latents="folder")), CPU)
    assert torch.equal(stored.of(moments, numbers), drawn)
    assert an_image_each(numbers, 64).tolist() == [*range(64)]


def test_the_recipe_takes_what_is_recorded_unless_it_says_so_itself(
    plain: TransfusionConfig, tmp_path: Path
) -> None:
    recorded = {"mean": [0.5, 1.0, -1.0], "std": [2.0, 1.0, 3.0], "pictures": 9}
    named = replace(plain, image=replace(plain.image, latents=str(tmp_path)))
    assert TRANSFUSION.settled(plain) == plain
    assert TRANSFUSION.settled(named) == named  # nothing is there yet
    (tmp_path / MANIFEST).write_text("{}")
    assert TRANSFUSION.settled(named) == named  # made before statistics were recorded
    (tmp_path / MANIFEST).write_text(json.dumps({"statistics": recorded}))
    settled = TRANSFUSION.settled(named)
    assert settled.image.latent_mean == (0.5, 1.0, -1.0)
    assert settled.image.latent_std == (2.0, 1.0, 3.0)
    assert TRANSFUSION.settled(settled) is settled
    own = replace(named, image=replace(named.image, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3))
    assert TRANSFUSION.settled(own) is own
    (tmp_path / MANIFEST).write_text('{"statistics": 3}')
    with pytest.raises(RecipeError) as error:
        TRANSFUSION.settled(named)
    (problem,) = error.value.problems
    assert problem.place == "model.image.latents"
    assert "holds no statistics of latents" in problem.text and "encode_latents" in problem.text


@pytest.mark.parametrize("vae, mean, std, place, words", [
    (None, (0.0,) * 3, (1.0,) * 3, "latent_mean", "without model.image.vae"),
    ("vae", (0.0,) * 2, (1.0,) * 3, "latent_mean", "2 numbers for model.image.channels = 3"),
    ("vae", (0.0,) * 3, (), "latent_std", "0 numbers"),
    ("vae", (0.0,) * 3, (1.0, 0.0, 1.0), "latent_std", "must be positive"),
])  # fmt: skip
def test_statistics_that_do_not_fit_are_faults(
    vae: str | None, mean: tuple[float, ...], std: tuple[float, ...], place: str, words: str
) -> None:
    image = small().image
    factor = 2 if vae else 1
    image = replace(image, vae=vae, factor=factor, latent_mean=mean, latent_std=std)
    found = TRANSFUSION.problems(replace(small(), image=image), 1)
    (problem,) = [problem for problem in found if problem.place.startswith("model.image.latent")]
    assert problem.place == f"model.image.{place}" and words in problem.text
