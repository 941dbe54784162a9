"""The trunk is LLaMA: same numbers as transformers on the same random weights."""

import pytest
import torch
from small_emu import document, packed, small
from transformers import LlamaConfig, LlamaForCausalLM

from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.emu.config import EmuConfig
from mmtrain.models.emu.model import build_plain, losses, parameters
from mmtrain.models.emu.names import LLAMA


@pytest.fixture(params=[0, 2], ids=["full-heads", "grouped-queries"])
def config(request: pytest.FixtureRequest) -> EmuConfig:
    return small(kv_heads=request.param)


@pytest.fixture
def theirs(config: EmuConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    language = config.language
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=language.vocabulary,
            hidden_size=language.width,
            intermediate_size=language.mlp_width,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.key_heads,
            rms_norm_eps=language.norm_eps,
            rope_theta=language.rope_theta,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_losses_and_gradients_are_those_of_transformers(
    theirs: LlamaForCausalLM, config: EmuConfig, form: SequenceFormat
) -> None:
    """Two text documents in one pack, against two padded rows with a mask."""
    model = build_plain(config)
    named = parameters(model)
    trunk = [name for name in named if LLAMA.foreign_name(name)]
    weights = LLAMA.to_canonical(theirs.state_dict(), {n: named[n].shape for n in trunk})
    with torch.no_grad():
        for name in trunk:
            named[name].copy_(weights[name])

    documents = [document(0, 20, 0), document(1, 37, 0)]
    flow = packed(documents, torch.zeros(0, 3, 28, 28), form)
    loss_T = losses(model, flow)["text"]
    mean = loss_T.sum() / (flow.fields["labels"] >= 0).sum()

    length = max(map(len, documents))
    ids = torch.tensor([[*d, *[form.pad] * (length - len(d))] for d in documents])
    mask = (ids != form.pad).long()
    expected = theirs(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-6)

    expected.backward()
    ours = torch.autograd.grad(mean, [named[name] for name in trunk])
    reference = LLAMA.to_canonical({n: p.grad for n, p in theirs.named_parameters()})
    for name, gradient in zip(trunk, ours, strict=True):
        scale = reference[name].abs().max()
        assert float((gradient - reference[name]).abs().max() / scale) < 2e-5, name


def test_names_of_a_llama_read_and_write_back(theirs: LlamaForCausalLM) -> None:
    state = theirs.state_dict()
    back = LLAMA.to_foreign(LLAMA.to_canonical(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
