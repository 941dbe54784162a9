"""Distances of frozen features: the formula of LPIPS, files of both kinds, and their faults."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torchvision.models import resnet50, vgg16

from mmtrain.encoders.features import moco_distance, vgg_distance
from mmtrain.errors import ContentError
from mmtrain.models.vae.config import CriticConfig, VaeConfig
from mmtrain.models.vae.model import FIELDS, JUDGED, SEEDS, VaeWithCritic
from mmtrain.nn.flow import Flow

CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up weights under torchvision's names, without the head."""
    with torch.device("meta"):
        shapes = vgg16().features.state_dict()
    torch.manual_seed(0)
    made = {f"features.{name}": torch.randn(t.shape) * 0.03 for name, t in shapes.items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file(made, path)
    return path


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("lpips") / "vgg.pth"
    lins = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(CHANNELS)}
    torch.save(lins, path)
    return path


def by_hand(path: Path, lpips: Path | None, pixels: Tensor, others: Tensor) -> Tensor:
    """LPIPS as its authors wrote it (scaling layer, five slices, unit length, weights, means)."""
    weights = load_file(path)
    lins = torch.load(lpips, weights_only=True) if lpips else {}
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x = (torch.cat([pixels, others]) - shift) / scale
    total = torch.zeros(len(pixels))
    number = 0
    for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
        for _ in range(convolutions):
            w, b = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
            x = functional.relu(functional.conv2d(x, w, b, padding=1))
            number += 2
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        one, two = unit.chunk(2)
        lin = lins.get(f"lin{stage}.model.1.weight", torch.ones(1, x.shape[1], 1, 1))
        total += functional.conv2d((one - two).square(), lin).mean((1, 2, 3))
        x = functional.max_pool2d(x, 2)
        number += 1
    return total


@pytest.mark.parametrize("weighed", [False, True])
def test_the_distance_is_lpips(vgg: Path, lpips: Path, weighed: bool) -> None:
    told = lpips if weighed else None
    distance = vgg_distance(vgg, told)
    pixels, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    others.requires_grad_()
    found = distance(pixels, others)
    torch.testing.assert_close(found, by_hand(vgg, told, pixels, others), rtol=1e-4, atol=1e-6)
    found.sum().backward()
    assert others.grad is not None and bool(others.grad.any())
    assert not bool(distance(pixels, pixels).any())


def test_moco_files_are_read_by_their_own_names(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = resnet50().state_dict()
    torch.manual_seed(0)
    state = {
        f"module.encoder_q.{name}": torch.rand(t.shape) * 0.05
        for name, t in shapes.items()
        if not name.startswith("fc.") and t.is_floating_point()
    }
    state["module.encoder_q.fc.0.weight"] = torch.zeros(1)
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": state}, tmp_path / "moco.pth.tar")
    distance = moco_distance(tmp_path / "moco.pth.tar")
    pixels = torch.rand(2, 3, 32, 32)
    assert bool((distance(pixels, -pixels) > 0).all()) and not bool(distance(pixels, pixels).any())
    # a VAE trains by it: the loss is there, and nothing of the network is a parameter
    config = VaeConfig(
        size=32,
        channels=(8, 8),
        encoder_attends=(False, False),
        decoder_attends=(False, False),
        norm_groups=4,
        critic=CriticConfig(channels=8, layers=1, norm_groups=4),
        moco=str(tmp_path / "moco.pth.tar"),
    )
    model = VaeWithCritic(config)
    before = [name for name, _ in model.named_parameters()]
    fields = {SEEDS: torch.arange(2), JUDGED: torch.tensor([0])}
    values = model(Flow(pixels, {name: fields[name] for name in FIELDS}))
    assert bool((values["identity"] > 0).all()) and not bool(values["perceptual"].any())
    values["identity"].sum().backward()
    gradient = model.autoencoder.encoder.conv_in.weight.grad
    assert gradient is not None and bool(gradient.any())
    assert [name for name, _ in model.named_parameters()] == before


def test_files_of_something_else_are_refused(vgg: Path, lpips: Path, tmp_path: Path) -> None:
    with pytest.raises(ContentError, match=r"holds no features.0.weight; wanted: weights of VGG"):
        vgg_distance(lpips, None)
    with pytest.raises(ContentError, match=r"holds no lin0.model.1.weight"):
        vgg_distance(vgg, vgg)
    with pytest.raises(ContentError, match=r"holds no conv1.weight; wanted: weights of ResNet"):
        moco_distance(vgg)
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    for name in ("bad.pth", "bad.safetensors"):
        with pytest.raises(ContentError, match="cannot be read as weights"):
            moco_distance(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ContentError, match="holds a list"):
        moco_distance(tmp_path / "list.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "shape.pth")
    with pytest.raises(ContentError, match=r"conv1.weight is \(2,\)"):
        moco_distance(tmp_path / "shape.pth")
