"""How unlike two pictures are to a frozen network: distances of its features.

LPIPS (Zhang et al. 2018, arXiv:1801.03924): features of five layers of VGG-16, of unit length at
each place, squared differences weighted by channel, mean over places, sum over layers. The same of
the four stages of a ResNet-50 that MoCo-v2 taught (arXiv:2003.04297) is the identity loss of
Transfusion's VAE. Weights are local files; nothing is fetched.

N pictures   S pixels a side   C channels, h x w size of features
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet50, vgg16
from torchvision.models.feature_extraction import create_feature_extractor

from mmtrain.errors import ContentError, MissingError

# ImageNet's mean and deviation, for pixels in -1..1
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_VGG_LAYERS = ("features.3", "features.8", "features.15", "features.22", "features.29")
_RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_WRAPPERS = ("module.encoder_q.", "module.", "encoder_q.")  # of MoCo's own checkpoints
_TINY = 1e-10


class FeatureDistance:
    """A frozen network with its layers; no `nn.Module`, so that what trains does not hold it."""

    def __init__(self, network: nn.Module, layers: tuple[str, ...], weights: list[Tensor]) -> None:
        """Keep the layers of a network.

        Args:
            network: with its weights; pixels in -1..1 are normalised as for ImageNet.
            layers: whose outputs are compared.
            weights: `[C]` of each layer's channels, or none for 1.
        """
        self._extract: Any = create_feature_extractor(
            network.eval().requires_grad_(False), {name: name for name in layers}
        )
        self._weights = weights
        self._scale = torch.tensor([_MEAN, _STD]).view(2, 1, 3, 1, 1)

    def __call__(self, pixels: Tensor, others: Tensor) -> Tensor:
        """Distances, float32 `[N]`, of `[N, 3, S, S]` in -1..1; `others` get gradients."""
        self._move(pixels.device)
        with torch.no_grad():
            wanted = self._features(pixels)
        found = self._features(others)
        total = torch.zeros(len(pixels), device=pixels.device)
        for layer, (name, feature) in enumerate(found.items()):
            error = (_unit(feature) - _unit(wanted[name])).square()
            if self._weights:
                error = error * self._weights[layer].view(1, -1, 1, 1)
            total = total + error.sum(1).mean((1, 2))
        return total

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self._extract((pixels.float() - self._scale[0]) / self._scale[1])
        return out

    def _move(self, device: torch.device) -> None:
        if self._scale.device != device:
            self._extract.to(device)
            self._scale = self._scale.to(device)
            self._weights = [weight.to(device) for weight in self._weights]


def vgg_distance(path: Path, lpips: Path | None) -> FeatureDistance:
    """LPIPS by VGG-16.

    Args:
        path: torchvision's weights (`features.0.weight`, ...), .pth or .safetensors.
        lpips: LPIPS's weights of the channels (`lin0.model.1.weight`, ...); None = all 1.

    Raises:
        MissingError, ContentError: a file is not there, or holds something else.
    """
    network = _filled(vgg16, "classifier", path, "VGG-16 of torchvision")
    weights = []
    if lpips is not None:
        told = _read(lpips)
        for layer in range(len(_VGG_LAYERS)):
            name = f"lin{layer}.model.1.weight"
            if name not in told:
                raise ContentError(f"{lpips}: holds no {name}; wanted: LPIPS's weights for VGG-16")
            weights.append(told[name].float().flatten())
    return FeatureDistance(network, _VGG_LAYERS, weights)


def moco_distance(path: Path) -> FeatureDistance:
    """The distance by the four stages of a ResNet-50.

    Args:
        path: MoCo-v2's checkpoint, or torchvision's names; .pth, .tar or .safetensors.

    Raises:
        MissingError, ContentError: the file is not there, or holds something else.
    """
    network = _filled(resnet50, "fc", path, "ResNet-50 of MoCo-v2")
    return FeatureDistance(network, _RESNET_LAYERS, [])


def _filled(build: Callable[[], nn.Module], head: str, path: Path, what: str) -> nn.Module:
    """A network with a file's weights, without its head, which no distance looks at."""
    found = _read(path)
    with torch.device("meta"):
        network = build()
    setattr(network, head, nn.Identity())
    weights = {}
    for name, tensor in network.state_dict().items():
        counted = name.endswith("num_batches_tracked")  # absent in old files, of no use here
        given = found.get(name, torch.zeros((), dtype=torch.int64) if counted else None)
        if given is None:
            raise ContentError(f"{path}: holds no {name}; wanted: weights of {what}")
        if given.shape != tensor.shape:
            raise ContentError(
                f"{path}: {name} is {tuple(given.shape)}, {what} has {tuple(tensor.shape)}; name "
                "its file"
            )
        weights[name] = given if counted else given.float()
    network.load_state_dict(weights, assign=True)
    return network


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by plain name."""
    if not path.is_file():
        raise MissingError(f"{path}: there is no such file; name local weights, or null")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.PickleError, SafetensorError) as e:
        raise ContentError(f"{path}: cannot be read as weights ({type(e).__name__})") from e
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise ContentError(f"{path}: holds a {type(found).__name__}; wanted: tensors by name")
    return {_plain(str(key)): value for key, value in found.items() if isinstance(value, Tensor)}


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            return name.removeprefix(wrapper)
    return name


def _unit(feature: Tensor) -> Tensor:
    """Unit length over the channels of each place."""
    return feature / (feature.square().sum(1, keepdim=True) + _TINY).sqrt()
