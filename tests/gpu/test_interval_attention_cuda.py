"""The compiled CUDA attention over intervals agrees with the tiled reference on the host."""

import pytest
import torch

from mmtrain.nn.masks import Intervals
from mmtrain.ops.attention import interval_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("lengths", [[1000], [300, 45, 3, 600], [17] * 60])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_output_and_gradients_are_those_of_the_reference(lengths: list[int], width: int) -> None:
    counts = torch.tensor(lengths)
    segments = torch.arange(len(lengths)).repeat_interleave(counts)
    host = [torch.randn(len(segments), 4, width) for _ in range(4)]

    def run(device: str) -> list[torch.Tensor]:
        leaves = [x.to(device).requires_grad_() for x in host[:3]]
        plan = Intervals.causal_packed(segments.to(device)).plan
        out = interval_attention(*leaves, plan, width**-0.5)
        return [out, *torch.autograd.grad(out, leaves, host[3].to(device))]

    for ours, reference in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), reference, atol=2e-3, rtol=2e-3)
