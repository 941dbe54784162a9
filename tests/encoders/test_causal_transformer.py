"""The causal transformer against transformers' T5 decoder stack."""

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from mmtrain.checkpoint.names import NameMap
from mmtrain.encoders.causal_transformer import CausalTransformer, distance_buckets
from mmtrain.models.emu.names import causal_rules
from mmtrain.nn.flow import Flow

QUERIES, WIDTH, HEADS, HEAD_WIDTH = 40, 32, 4, 6


@pytest.fixture
def pair() -> tuple[CausalTransformer, T5Stack]:
    torch.manual_seed(0)
    ours = CausalTransformer(
        queries=QUERIES,
        layers=3,
        width=WIDTH,
        memory_width=WIDTH,  # T5's cross-attention reads its own width
        heads=HEADS,
        head_width=HEAD_WIDTH,
        mlp_width=48,
        output_width=20,
        relative_buckets=32,
        relative_distance=64,
        norm_eps=1e-6,
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = T5Config(
        d_model=WIDTH,
        d_kv=HEAD_WIDTH,
        d_ff=48,
        num_layers=3,
        num_heads=HEADS,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        is_decoder=True,
        use_cache=False,
    )
    theirs = T5Stack(config, torch.nn.Embedding(3, WIDTH)).eval()
    named = {f"causal.{name}": p.detach() for name, p in ours.named_parameters()}
    released = NameMap("T5", causal_rules("")).to_foreign(named)
    stack = {
        name.removeprefix("cformer."): tensor
        for name, tensor in released.items()
        if name.startswith("cformer.")
    }
    missing, unexpected = theirs.load_state_dict(stack, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected
    return ours, theirs


def test_the_stack_is_a_t5_decoder_over_the_queries(
    pair: tuple[CausalTransformer, T5Stack],
) -> None:
    ours, theirs = pair
    memory = torch.randn(2, 9, WIDTH)
    expected = theirs(
        inputs_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=memory
    ).last_hidden_state
    out = ours(Flow(memory, {})).hidden
    torch.testing.assert_close(out, ours.projection(expected), atol=2e-4, rtol=1e-4)


def test_an_embedding_depends_on_its_own_and_earlier_queries_only(
    pair: tuple[CausalTransformer, T5Stack],
) -> None:
    ours, _ = pair
    out = ours(Flow(torch.randn(1, 9, WIDTH), {})).hidden[0]
    for row in (0, 7, QUERIES - 2):
        (gradient,) = torch.autograd.grad(out[row].sum(), ours.queries, retain_graph=True)
        assert gradient[: row + 1].any(1).all() and not gradient[row + 1 :].any()


def test_buckets_are_those_of_the_specification() -> None:
    far = [16, 16, 16, 17, 17, 18, 18, 18, 19, 19, 19, 20, 20, 20, 20, 21]
    assert list(distance_buckets(32, 32, 128)) == [*range(16), *far]
    assert distance_buckets(500, 32, 128)[128:] == (31,) * 372
