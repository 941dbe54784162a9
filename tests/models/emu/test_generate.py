"""Writing with a cache equals writing without one; every way of choosing keeps its promise."""

import pytest
import torch
from small_emu import IDS, QUERIES, SIZE, drawn, small
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import ContentError
from mmtrain.models.emu.generate import EmuSampler
from mmtrain.models.emu.model import parameters
from mmtrain.models.emu.names import LLAMA
from mmtrain.models.writing import Limits, Packed, Prompt
from mmtrain.nn.choice import Beams, Nucleus
from mmtrain.nn.embed import splice

GROUP = (IDS["[IMG]"], *[IDS["<image>"]] * QUERIES, IDS["[/IMG]"])


@pytest.fixture(scope="module")
def sampler(form: SequenceFormat) -> EmuSampler:
    return EmuSampler(drawn(small()), form)


def prompts() -> list[Prompt]:
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return [
        Prompt((1, 5, 6, 7, 8, 9, 10, 11)),
        Prompt((1, *GROUP, 12), pixels[:1]),
        Prompt((1, *GROUP, *GROUP, 20, 21, 22), pixels[1:]),
    ]


def rows_without_cache(sampler: EmuSampler, prompt: Prompt, more: Tensor) -> Tensor:
    """Trunk rows of a prompt and further embedded rows, all computed again."""
    rows = torch.cat([sampler.pack([prompt]).rows_TD, more])
    length = len(rows)
    row, zeros = torch.arange(length), torch.zeros(length, dtype=torch.int64)
    return sampler.hidden(Packed(rows, row, row, zeros, (length,)))


@torch.inference_mode()
def test_greedy_text_with_a_cache_is_that_without_one(sampler: EmuSampler) -> None:
    """Three prompts of different lengths at once, against one at a time from scratch."""
    written = sampler.text(prompts(), 12)
    for prompt, ids in zip(prompts(), written, strict=True):
        tokens = prompt.tokens
        for new in ids:
            hidden = sampler.hidden(sampler.pack([Prompt(tokens, prompt.pixels)]))
            assert int(sampler.head.logits(hidden[-1:]).argmax()) == new
            tokens = (*tokens, new)
        assert len(ids) == 12 or ids[-1] == IDS["</s>"]


@torch.inference_mode()
def test_a_visual_rollout_with_a_cache_is_that_without_one(sampler: EmuSampler) -> None:
    embeddings = sampler.rollout(prompts())
    assert embeddings.shape == (3, QUERIES, 32)
    for prompt, ours in zip(prompts(), embeddings, strict=True):
        opened = Prompt((*prompt.tokens, IDS["[IMG]"]), prompt.pixels)
        slow = torch.zeros(0, 32)
        for _ in range(QUERIES):
            hidden = rows_without_cache(sampler, opened, slow)
            slow = torch.cat([slow, sampler.head.regressed(hidden[-1:])])
        torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_prompt_that_asks_for_an_image_gets_that_of_a_rollout_and_text_after_it(
    sampler: EmuSampler,
) -> None:
    asked = [Prompt((*p.tokens, IDS["[IMG]"]), p.pixels) for p in prompts()]
    # the middle one asks for text alone, beside two that ask for images
    mixed = [asked[0], prompts()[1], asked[2]]
    written = sampler.write(mixed, Limits(new_tokens=6, images=1))
    images = sampler.rollout(prompts())
    for number in (0, 2):
        image, text = written[number]
        torch.testing.assert_close(image, images[number], atol=1e-5, rtol=1e-5)
        rows = torch.cat([image, sampler.embed.tokens(torch.tensor([IDS["[/IMG]"]]))])
        hidden = rows_without_cache(sampler, mixed[number], rows)
        logits = sampler.head.logits(hidden[-1:])
        logits[:, [IDS["[IMG]"], IDS["[/IMG]"], IDS["<image>"], IDS["[PAD]"]]] = -torch.inf
        assert text[0] == int(logits.argmax())
    assert written[1] == sampler.write([prompts()[1]], Limits(new_tokens=6))[0]
    assert sampler.write([asked[0]], Limits(new_tokens=0, images=1))[0][0].shape == (QUERIES, 32)


@torch.inference_mode()
def test_a_model_that_chooses_to_begins_images_by_itself(form: SequenceFormat) -> None:
    """Wishes for [IMG] at every token: images until they are used up, then text alone."""
    eager = EmuSampler(drawn(small()), form)
    wish = 30.0 * torch.nn.functional.one_hot(torch.tensor(form.image_begin), 44)
    eager.head.unembed.register_forward_hook(lambda _, inputs, logits: logits + wish)
    (pieces,) = eager.write(prompts()[:1], Limits(new_tokens=5, images=2))
    assert [isinstance(piece, Tensor) for piece in pieces] == [True, True, False]
    (text,) = eager.write(prompts()[:1], Limits(new_tokens=5))
    assert len(text) == 1 and form.image_begin not in text[0]


def test_nucleus_sampling_repeats_with_its_seed_and_spares_torchs_generator(
    sampler: EmuSampler,
) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampler.text(prompts(), 10, Nucleus(top_p=0.95, seed=7).rows(0, 3))
    assert first == sampler.text(prompts(), 10, Nucleus(top_p=0.95, seed=7).rows(0, 3))
    assert first != sampler.text(prompts(), 10, Nucleus(top_p=0.95, seed=8).rows(0, 3))
    alone = [
        sampler.text([prompt], 10, Nucleus(top_p=0.95, seed=7).rows(number, 1))[0]
        for number, prompt in enumerate(prompts())
    ]
    assert first == alone  # the prompts beside it do not matter
    assert torch.equal(torch.get_rng_state(), state)


def test_nucleus_sampling_draws_from_the_nucleus_only() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    wide, narrow = Nucleus(top_p=0.75).rows(0, 1), Nucleus(top_p=0.01).rows(0, 1)
    drawn_ids = [int(wide(logits)) for _ in range(300)]
    assert set(drawn_ids) == {0, 1}
    assert 0.5 < drawn_ids.count(0) / 300 < 0.75  # 0.5 / 0.8 of the nucleus
    assert {int(narrow(logits)) for _ in range(50)} == {0}


def test_one_beam_is_greedy(sampler: EmuSampler) -> None:
    for prompt in prompts():
        assert sampler.beam(prompt, Beams(beams=1, new_tokens=9)) == sampler.text([prompt], 9)[0]


@pytest.mark.parametrize("least", [1, 4, 8])
def test_the_end_comes_at_the_minimum_length_and_not_before(
    form: SequenceFormat, least: int
) -> None:
    """A model all too willing to stop; the <s> that generation seeds is counted."""
    eager = EmuSampler(drawn(small()), form)
    wish = 30.0 * torch.nn.functional.one_hot(torch.tensor(form.eos), 44)
    eager.head.unembed.register_forward_hook(lambda _, inputs, logits: logits + wish)
    ids = eager.beam(prompts()[0], Beams(new_tokens=12, minimum_length=least))
    assert len(ids) == least and ids[-1] == form.eos and form.eos not in ids[:-1]


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_finds_what_transformers_finds(sampler: EmuSampler, seed: int) -> None:
    """Without a length penalty the versions of transformers agree, so any release will do."""
    config = small().language
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            rms_norm_eps=config.norm_eps,
        )
    ).eval()
    named = {n: p.detach() for n, p in parameters(drawn(small())).items()}
    trunk = {n: p for n, p in named.items() if LLAMA.foreign_name(n)}
    theirs.load_state_dict(LLAMA.to_foreign(trunk))
    generator = torch.Generator().manual_seed(seed)
    tokens = [1, *torch.randint(3, 40, (6,), generator=generator).tolist()]
    expected = theirs.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        num_beams=4,
        max_new_tokens=10,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=40,
    )[0, len(tokens) :].tolist()
    options = Beams(beams=4, new_tokens=10)
    assert sampler.beam(Prompt(tuple(tokens)), options) == [i for i in expected if i != 40]


@torch.inference_mode()
def test_likelihoods_of_candidates_do_not_depend_on_each_other(sampler: EmuSampler) -> None:
    prompt, candidates = prompts()[1], [[5, 6], [7], [8, 9, 10]]
    together = sampler.negative_log_likelihoods(prompt, candidates)
    for ids, nll in zip(candidates, together, strict=True):
        hidden = sampler.hidden(sampler.pack([Prompt((*prompt.tokens, *ids), prompt.pixels)]))
        chance = sampler.head.logits(hidden).log_softmax(-1)
        rows = range(len(prompt.tokens) - 1, len(prompt.tokens) + len(ids) - 1)
        expected = -sum(chance[row, token] for row, token in zip(rows, ids, strict=True))
        torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)


def test_images_that_do_not_fit_their_prompt_are_refused(sampler: EmuSampler) -> None:
    with pytest.raises(ContentError, match="4 <image> positions for 0 images"):
        sampler.text([Prompt((1, *GROUP))], 1)
    with pytest.raises(ContentError, match="empty"):
        sampler.text([Prompt(())], 1)


def test_visual_rows_stand_where_the_placeholders_are(sampler: EmuSampler) -> None:
    prompt = prompts()[2]
    packed = sampler.pack([prompt])
    tokens = torch.tensor(prompt.tokens)
    slots = (tokens == IDS["<image>"]).nonzero().squeeze(-1)
    assert prompt.pixels is not None
    visual = sampler.encode(prompt.pixels).flatten(0, 1)
    embedded = splice(torch.zeros(len(tokens), 32), slots, visual)
    torch.testing.assert_close(packed.rows_TD[slots], embedded[slots])
