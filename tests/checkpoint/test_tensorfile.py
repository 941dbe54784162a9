"""Files of tensors: what is written is what is read, however the tensor lay in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtrain.checkpoint.tensorfile import TensorFile, info_of, write_tensors

GRID = torch.arange(24.0).view(4, 6)


@pytest.mark.parametrize(
    "tensor",
    [
        GRID[:, 2:3],
        GRID[::3, ::5],
        GRID.t(),
        GRID[1:2, 3:4],
        GRID.view(-1)[::2][:1],  # contiguous by its one number, though with a stride of 2
        GRID[:, :0],
        torch.tensor(3.0),
        GRID.bfloat16()[2],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} by {tensor.stride()}",
)
def test_any_tensor_comes_back(tmp_path: Path, tensor: Tensor) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": info_of(tensor)}, {"w": tensor}.__getitem__)
    back = TensorFile.open(path).get("w")
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)
