"""The door to torch's attention: forces the backends it is told, and nothing on a CPU."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.functional import scaled_dot_product_attention

from mmtrain.ops import dense_attention as module
from mmtrain.ops.dense_attention import dense_attention

ORDER = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_on_a_cpu_it_is_torchs_own_call_to_the_last_bit(
    causal: bool, masked: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "sdpa_kernel", lambda *_, **__: pytest.fail("forced"))
    leaves = [torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3)]
    mask = torch.rand(9, 9) < 0.7 if masked else None

    def results(out: torch.Tensor) -> list[torch.Tensor]:
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    ours = results(dense_attention(*leaves, mask=mask, causal=causal, scale=scale))
    plain = scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=causal, scale=scale)
    for found, wanted in zip(ours, results(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_forced_holds_for_the_call_alone(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both flags and order; inside `torch.compile` without a break of the graph."""
    seen = []
    before = _cur_sdpa_kernel_backends(with_priority=True)

    def look(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        seen.append(_cur_sdpa_kernel_backends(with_priority=True))
        return q

    monkeypatch.setattr(module, "_forced", lambda q, shapes: ORDER)
    q = torch.randn(1, 2, 4, 8)
    wanted = scaled_dot_product_attention(q, q, q)
    call = torch.compile(dense_attention, fullgraph=True, backend="eager")
    attend = call if compiled else dense_attention
    torch.testing.assert_close(attend(q, q, q), wanted)
    monkeypatch.setattr(module, "scaled_dot_product_attention", look)
    dense_attention(q, q, q)
    assert seen == [list(ORDER)]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
