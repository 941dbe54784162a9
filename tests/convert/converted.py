"""Comparison of weights on disk, and where the recorded ones are."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtrain.convert.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/emu_a"

Convert = Callable[..., str]


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file or folder, by torch's and safetensors' own readers."""
    if path.is_dir():
        source = open_source(path)
        return {name: source.get(name) for name in source.infos}
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, shapes, number types and bits."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
