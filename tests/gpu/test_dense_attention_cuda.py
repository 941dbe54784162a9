"""Forced dense attention on a GPU: the backend that was chosen runs, and computes the same."""

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from mmtrain.nn.masks import Intervals
from mmtrain.ops.attention import interval_attention
from mmtrain.ops.dense_attention import dense_attention
from mmtrain.ops.select import Shapes, dense_backends, table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# the op of torch that each backend's forward pass is
OPS = {
    SDPBackend.CUDNN_ATTENTION: "aten::_scaled_dot_product_cudnn_attention",
    SDPBackend.FLASH_ATTENTION: "aten::_scaled_dot_product_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "aten::_scaled_dot_product_efficient_attention",
    SDPBackend.MATH: "aten::_scaled_dot_product_attention_math",
}


@pytest.mark.parametrize("shapes", Shapes)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "width, rows, causal", [(64, 257, False), (88, 257, False), (128, 640, True)]
)
def test_the_first_choice_runs_and_agrees_with_the_host(
    shapes: Shapes, dtype: torch.dtype, width: int, rows: int, causal: bool
) -> None:
    host = [torch.randn(2, 4, rows, width).to(dtype) for _ in range(4)]

    def run(device: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(device, kind).requires_grad_() for x in host[:3]]
        out = dense_attention(*leaves, causal=causal, shapes=shapes)
        return [out, *torch.autograd.grad(out, leaves, host[3].to(device, kind))]

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ours = run("cuda", dtype)
    first = dense_backends(torch.device("cuda"), dtype, width, shapes)[0]
    assert OPS[first] in {event.key for event in seen.key_averages()}
    bound = 5e-3 if dtype == torch.float32 else 3e-2  # TF32 products may be on
    for found, wanted in zip(ours, run("cpu", torch.float32), strict=True):
        torch.testing.assert_close(found.cpu().float(), wanted, atol=bound, rtol=bound)


def test_a_call_that_the_first_choice_refuses_falls_to_the_next() -> None:
    """FlashAttention takes no mask, cuDNN no key alone."""
    q, k, v = torch.randn(3, 2, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    seen = torch.ones(2, 1, 1, 1, dtype=torch.bool, device="cuda")
    for shapes in Shapes:
        torch.testing.assert_close(dense_attention(q, k, v, shapes=shapes), v)
        torch.testing.assert_close(dense_attention(q, k, v, mask=seen, shapes=shapes), v)


@pytest.mark.parametrize(
    "lengths", [[700], [300, 45, 3, 600], [17] * 60, [32, 7, 200, *[30, 25] * 9]]
)
def test_prompts_of_known_lengths_agree_with_the_host_without_flex(lengths: list[int]) -> None:
    host = [torch.randn(sum(lengths), 4, 64) for _ in range(3)]

    def run(device: str) -> torch.Tensor:
        plan = Intervals.causal_lengths(lengths, torch.device(device)).plan
        assert plan.block_mask is None
        return interval_attention(*(x.to(device) for x in host), plan, 0.125).cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"), atol=5e-3, rtol=5e-3)


def test_the_table_names_the_first_choice() -> None:
    rows = {row.op: row for row in table(torch.device("cuda"), torch.bfloat16)}
    assert "forced for bfloat16" in rows["dense_attention"].reason
