"""Switches of the trunk's attention: norms of queries and keys, cosine similarity."""

import math

import pytest
import torch

from mmtrain.nn.attention import Cosine, DotProduct, PackedAttention
from mmtrain.nn.masks import Intervals
from mmtrain.nn.norm import RMSNorm
from mmtrain.ops.rotary import rotary_tables

WIDTH, HEADS, ROWS = 32, 4, 12


def attention(similarity: torch.nn.Module) -> PackedAttention:
    torch.manual_seed(0)
    identity = torch.nn.Identity
    return PackedAttention(
        WIDTH, HEADS, q_norm=identity(), k_norm=identity(), similarity=similarity
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
