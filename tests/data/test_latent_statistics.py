"""Statistics of latents: those of what is drawn, added up over parts, recorded once."""

import json
from pathlib import Path

import pytest
import torch

from mmtrain.data import latent_statistics
from mmtrain.data.latent_statistics import MANIFEST, SUMS, Sums
from mmtrain.encoders.vae import draw
from mmtrain.errors import ContentError


def moments(count: int) -> torch.Tensor:
    """Two channels with means 3 and -1 and deviations of the posterior 0.5 and 2."""
    generator = torch.Generator().manual_seed(count)
    mean = torch.randn(count, 2, 4, 4, generator=generator) * torch.tensor([1.0, 0.1]).view(2, 1, 1)
    mean = mean + torch.tensor([3.0, -1.0]).view(2, 1, 1)
    spread = torch.tensor([0.5, 2.0]).square().log().view(2, 1, 1).expand(count, 2, 4, 4)
    return torch.cat([mean, spread], 1)


def test_they_are_the_mean_and_deviation_of_drawn_latents() -> None:
    some = moments(2000)
    found = Sums.of(some).statistics()
    drawn = draw(some, torch.randn(2000, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.tensor(found.mean), drawn.mean((0, 2, 3)), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.tensor(found.std), drawn.std((0, 2, 3)), rtol=0, atol=0.03)
    assert found.std == pytest.approx((1.25**0.5, 4.01**0.5), abs=0.03)
    assert found.pictures == 2000


def test_parts_add_up_and_are_recorded_once(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"form": 1}')
    some, parts = moments(30), []
    for number, chunk in enumerate(some.split(11)):
        parts.append(tmp_path / str(number))
        parts[-1].mkdir()
        Sums.of(chunk).write(parts[-1])
    parts.append(tmp_path / "without pictures")
    parts[-1].mkdir()
    Sums.none(2).write(parts[-1])
    assert latent_statistics.read(tmp_path) is None
    found = latent_statistics.record(tmp_path, parts)
    assert found is not None and found.pictures == 30
    whole = Sums.of(some).statistics()
    assert found.mean == pytest.approx(whole.mean) and found.std == pytest.approx(whole.std)
    assert latent_statistics.read(tmp_path) == found
    assert json.loads((tmp_path / MANIFEST).read_text())["form"] == 1
    assert latent_statistics.record(tmp_path, parts[:1]) == found  # runs were begun with it


def test_older_parts_and_damaged_files_are_told(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    assert latent_statistics.record(tmp_path, [tmp_path]) is None  # no sums were kept
    assert latent_statistics.read(tmp_path) is None
    assert latent_statistics.read(tmp_path / "nowhere") is None
    (tmp_path / SUMS).write_text('{"pictures": "many"}')
    with pytest.raises(ContentError, match=r"sums.json holds no sums of latents"):
        latent_statistics.record(tmp_path, [tmp_path])
    (tmp_path / MANIFEST).write_text('{"statistics": {"mean": 1}}')
    with pytest.raises(ContentError, match=r"manifest.json: holds no statistics"):
        latent_statistics.read(tmp_path)
