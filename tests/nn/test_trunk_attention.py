"""Switches of the trunk's attention: norms of queries and keys, cosine similarity."""

import math
from collections.abc import Callable

import pytest
import torch

from mmtrain.nn import attention as attention_module
from mmtrain.nn.attention import Cosine, DotProduct, PackedAttention
from mmtrain.nn.cache import KeyValueCache, Prefill, Step
from mmtrain.nn.masks import Intervals
from mmtrain.nn.norm import RMSNorm
from mmtrain.ops.rotary import rotary_tables
from mmtrain.ops.select import QkBackend

WIDTH, HEADS, ROWS = 32, 4, 12


def attention(similarity: torch.nn.Module, kv_heads: int = HEADS) -> PackedAttention:
    torch.manual_seed(0)
    identity = torch.nn.Identity
    return PackedAttention(
        WIDTH, HEADS, kv_heads=kv_heads, q_norm=identity(), k_norm=identity(), similarity=similarity
    )


def run(module: PackedAttention, x: torch.Tensor) -> torch.Tensor:
    intervals = Intervals.causal_packed(torch.zeros(len(x), dtype=torch.int64))
    return module(x, rotary_tables(torch.arange(len(x)), WIDTH // HEADS, 1e4), intervals)


def test_cosine_attention_ignores_the_length_of_queries_and_keys() -> None:
    module, x = attention(Cosine(HEADS)), torch.randn(ROWS, WIDTH)
    before = run(module, x)
    with torch.no_grad():
        module.q.weight *= 3.0
        module.k.weight *= 0.2
    torch.testing.assert_close(run(module, x), before)


def test_cosine_logits_are_the_cosines_times_the_learned_scale() -> None:
    similarity = Cosine(HEADS)
    with torch.no_grad():
        similarity.log_scale.copy_(torch.tensor([2.0, 5.0, 50.0, 100.0]).log())
    q, k = torch.randn(2, ROWS, HEADS, 8)
    unit_q, unit_k, factor = similarity(q, k)
    cosine = torch.nn.functional.cosine_similarity(q, k, dim=-1)
    expected = cosine * torch.tensor([2.0, 5.0, 50.0, 100.0])
    torch.testing.assert_close((unit_q * unit_k).sum(-1) * factor, expected)


def test_the_cosine_scale_is_held_at_one_hundred() -> None:
    similarity = Cosine(1)
    with torch.no_grad():
        similarity.log_scale.fill_(math.log(100.0) + 5.0)
    q, _, _ = similarity(torch.randn(3, 1, 8), torch.randn(3, 1, 8))
    torch.testing.assert_close(q.norm(dim=-1), torch.full((3, 1), 100.0))
    q.sum().backward()
    assert similarity.log_scale.grad is not None and not similarity.log_scale.grad.any()


@pytest.mark.parametrize("norm", [lambda: RMSNorm(8, 1e-6), lambda: torch.nn.LayerNorm(8)])
def test_normalised_queries_and_keys_bound_the_logits(norm: object) -> None:
    """With unit weights each head's query has length sqrt(K), so logits stay within sqrt(K)."""
    module = attention(DotProduct())
    module.q_norm, module.k_norm = norm(), norm()  # type: ignore[operator]
    x = 1e3 * torch.randn(ROWS, WIDTH)
    q = module.q_norm(module.q(x).unflatten(-1, (-1, 8)))
    torch.testing.assert_close(
        q.norm(dim=-1), torch.full((ROWS, HEADS), math.sqrt(8.0)), rtol=1e-3, atol=0.0
    )
    scaled = run(module, x)
    torch.testing.assert_close(run(module, 5.0 * x), 5.0 * scaled, rtol=1e-3, atol=1e-2)


def test_the_number_of_heads_is_read_off_the_projections() -> None:
    """Half of the columns are half of the heads: what a tensor rank of two computes."""
    module, x = attention(DotProduct()), torch.randn(ROWS, WIDTH)
    whole = run(module, x)
    halves = []
    for rank in range(2):
        part = attention(DotProduct())
        rows = slice(rank * 16, rank * 16 + 16)
        for name in ("q", "k", "v"):
            weight = getattr(module, name).weight[rows]
            getattr(part, name).weight = torch.nn.Parameter(weight)
        part.out.weight = torch.nn.Parameter(module.out.weight[:, rows])
        halves.append(run(part, x))
    torch.testing.assert_close(halves[0] + halves[1], whole)


@pytest.mark.parametrize("similarity", [DotProduct(), Cosine(HEADS)])
def test_grouped_queries_equal_full_heads_with_repeated_keys(similarity: torch.nn.Module) -> None:
    grouped, full = attention(similarity, kv_heads=2), attention(similarity)
    assert grouped.k.weight.shape == grouped.v.weight.shape == (WIDTH // 2, WIDTH)
    with torch.no_grad():
        full.q.weight.copy_(grouped.q.weight)
        full.out.weight.copy_(grouped.out.weight)
        for name in ("k", "v"):
            heads = getattr(grouped, name).weight.unflatten(0, (2, -1))
            getattr(full, name).weight.copy_(heads.repeat_interleave(2, 0).flatten(0, 1))
    x = torch.randn(ROWS, WIDTH)
    torch.testing.assert_close(run(grouped, x), run(full, x))


@torch.inference_mode()
def test_grouped_keys_are_kept_narrow_and_read_alike_while_writing() -> None:
    module, x = attention(DotProduct(), kv_heads=2), torch.randn(ROWS, WIDTH)
    cos, sin = rotary_tables(torch.arange(ROWS), WIDTH // HEADS, 1e4)
    cache, last = KeyValueCache(1, ROWS), ROWS - 1
    zeros, slots = torch.zeros(last, dtype=torch.int64), torch.arange(last)
    prefill = Prefill(cache, Intervals.causal_packed(zeros), zeros, slots)
    module(x[:last], (cos[:last], sin[:last]), prefill)
    step = Step(cache, torch.tensor([last]), ROWS)
    written = module(x[last:], (cos[last:], sin[last:]), step)
    torch.testing.assert_close(written, run(module, x)[last:])
    assert cache.write(module, zeros[:0], slots[:0], *torch.zeros(2, 0, 2, 8))[0].shape[-2] == 2


NORMS = {
    "none": torch.nn.Identity,
    "rms": lambda: RMSNorm(32, 1e-6),
    "layer": lambda: torch.nn.LayerNorm(32, 1e-6),
}


@pytest.mark.parametrize("similarity", [DotProduct, lambda: Cosine(4)])
@pytest.mark.parametrize("norm", NORMS)
def test_the_fused_way_gives_what_the_modules_give(
    norm: str, similarity: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of inputs and every parameter; on a GPU the fused way is the kernel."""
    torch.manual_seed(0)
    module = PackedAttention(
        128,
        4,
        kv_heads=2,
        q_norm=NORMS[norm](),
        k_norm=NORMS[norm](),
        similarity=similarity(),
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.2)
    x, upstream = torch.randn(2, ROWS, 128)
    x.requires_grad_()
    intervals = Intervals.causal_packed(torch.zeros(ROWS, dtype=torch.int64))
    names = [name for name, _ in module.named_parameters()]

    def results() -> list[torch.Tensor]:
        out = module(x, rotary_tables(torch.arange(ROWS), 32, 1e4), intervals)
        return [out, *torch.autograd.grad(out, [x, *module.parameters()], upstream)]

    chain = results()
    calls = []
    monkeypatch.setattr(attention_module, "qk_backend", lambda device: QkBackend.KERNEL)
    op = attention_module.qk_norm_rope
    monkeypatch.setattr(
        attention_module, "qk_norm_rope", lambda *a, **k: calls.append(k["norm"]) or op(*a, **k)
    )
    for name, ours, wanted in zip(["out", "x", *names], results(), chain, strict=True):
        error = float(((ours - wanted).norm() / wanted.norm()).detach())
        assert error < 2e-6, f"{name}: {error:.1e}"
    cosine = similarity is not DotProduct
    assert len(calls) == 1 + (cosine and norm != "none")


def test_parts_that_the_op_does_not_know_run_as_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "qk_backend", lambda device: QkBackend.KERNEL)
    monkeypatch.setattr(attention_module, "qk_norm_rope", lambda *a, **k: pytest.fail("called"))
    narrow = attention(DotProduct())  # heads of 8 channels
    assert run(narrow, torch.randn(ROWS, WIDTH)).shape == (ROWS, WIDTH)


def test_an_attention_layer_names_the_parameters_that_it_reads_itself() -> None:
    module = PackedAttention(
        32, 4, kv_heads=4, q_norm=RMSNorm(8, 1e-6), k_norm=RMSNorm(8, 1e-6), similarity=Cosine(4)
    )
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {named[id(parameter)] for parameter in module.read_directly()} == {
        "q_norm.weight",
        "k_norm.weight",
        "similarity.log_scale",
    }
