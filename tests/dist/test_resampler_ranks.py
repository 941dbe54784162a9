"""Two tensor ranks share the heads of a resampler: the same outputs and gradients as one."""

import pytest
import torch
from resampler_rank import PLAN
from safetensors.torch import load_file
from torch import Tensor
from world import World

SUMS = {  # forward and backward: the usual pair a half of a block, and the features' once
    "qk": [4, 5 + 4],  # and norms of queries and keys, of which a rank sees its heads' share
    "cosine": [4, 5],
}


def found(world: World, kind: str, ranks: int) -> list[dict[str, Tensor]]:
    """Tensors that each rank wrote."""
    argv = (kind, str(ranks), f"{kind}-{ranks}")
    codes = world.run(ranks, *argv, module="resampler_rank")
    assert codes == [0] * ranks, world.last_log
    return [load_file(world.folder / f"{kind}-{ranks}.{rank}") for rank in range(ranks)]


@pytest.mark.parametrize("kind", SUMS)
def test_two_tensor_ranks_give_what_one_gives(world: World, kind: str) -> None:
    (whole,) = found(world, kind, 1)
    parts = found(world, kind, 2)
    split = 0
    for name, wanted in whole.items():
        if name == "sums":
            continue
        cut = PLAN.slice_of(name)
        if cut is None:  # whole on both ranks, and the same to the last bit
            assert torch.equal(parts[0][name], parts[1][name]), name
            together = parts[0][name]
        else:
            together = torch.cat([part[name] for part in parts], cut.dim)
            split += 1
        assert wanted.any(), name
        error = float((together - wanted).abs().max() / wanted.abs().max())
        assert error < 5e-6, (name, error)
    assert split == 2 * (6 + (kind == "cosine"))
    assert whole["sums"].tolist() == [0, 0]
    assert [part["sums"].tolist() for part in parts] == [SUMS[kind]] * 2
