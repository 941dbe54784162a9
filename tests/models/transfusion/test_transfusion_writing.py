"""Writing: cached as without a cache, phases and their marks, guidance, batches."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_transfusion import IDS, WORDS, drawn, form, small
from torch import Tensor

from mmtrain.errors import ContentError
from mmtrain.models.transfusion.config import Context, Edge, ImageAttention, Positions
from mmtrain.models.transfusion.generate import TransfusionSampler
from mmtrain.models.writing import Limits, Prompt
from mmtrain.nn.choice import Nucleus
from mmtrain.nn.diffusion import Answer, Path, Solver, spaced_times
from mmtrain.nn.noise import normals, seed_of

BOS, EOS, BEGIN, END, SLOT = (IDS[t] for t in ("<s>", "</s>", "[IMG]", "[/IMG]", "<image>"))
ROWS = 4


def sampler_of(
    edge: Edge = Edge.linear,
    attention: ImageAttention = ImageAttention.image,
    kv_heads: int = 0,
    positions: Positions = Positions.raster,
    **noise: object,
) -> TransfusionSampler:
    options = {
        "solver_steps": 5,
        "clean_limit": 1.0,
        "guidance": 3.0,
        "solver": Solver.ddim,
    } | noise
    config = small(edge, **options)
    config = replace(
        config,
        image=replace(config.image, attention=attention, positions=positions),
        language=replace(config.language, kv_heads=kv_heads),
    )
    return TransfusionSampler(config, drawn(config, std=1.0), form(config))


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1


def group() -> list[int]:
    return [BEGIN, *[SLOT] * ROWS, END]


def uncached_rows(sampler: TransfusionSampler, before: Tensor, rows: Tensor, start: int) -> Tensor:
    """The last n trunk rows of a sequence that is folded whole, without a cache."""
    whole = torch.cat([before, rows])
    tokens = [BOS] * (len(before) - 1) + [BEGIN] + [SLOT] * len(rows)
    packed = sampler.lay(whole, (len(whole),), tokens)
    positions = packed.positions_T + start
    return sampler.fold(whole, positions, packed.intervals)[-len(rows) :]


@pytest.mark.parametrize("edge", Edge)
@pytest.mark.parametrize("attention", ImageAttention)
@pytest.mark.parametrize("positions", Positions)
@torch.inference_mode()
def test_a_picture_is_drawn_as_without_a_cache(
    edge: Edge, attention: ImageAttention, positions: Positions
) -> None:
    sampler = sampler_of(edge, attention, positions=positions).drawing(seed=7)
    prompt = (BOS, 3, 4, 5)
    (found,) = sampler.rollout([Prompt(prompt)])
    opened = (*prompt, BEGIN)
    x = normals(torch.tensor([seed_of(7, opened, 0)]), 192).view(1, 3, 8, 8)
    before = sampler.embed.tokens(torch.tensor(opened))
    for now, then in pairwise(spaced_times(1000, 5)):
        rows, beside = sampler.image.rows(x, torch.tensor([now]))
        told = uncached_rows(sampler, before, rows[0], 0)
        nothing = uncached_rows(sampler, before[-1:], rows[0], len(opened) - 1)
        answers = [sampler.head.answered(h[None], beside) for h in (told, nothing)]
        answer = answers[1] + 3.0 * (answers[0] - answers[1])
        x = sampler.process.step(x, answer, (now, then), limit=1.0)
    torch.testing.assert_close(found, x[0], rtol=1e-4, atol=1e-4)
    assert float(found.std()) > 0.1
    (other,) = sampler.rollout([Prompt((BOS, 9, 9, 9))])
    assert not torch.allclose(found, other, atol=1e-2)


@pytest.mark.parametrize("kv_heads", [0, 2])
@pytest.mark.parametrize("positions", Positions)
@torch.inference_mode()
def test_text_after_a_drawn_picture_is_that_after_the_picture_as_a_prompt(
    kv_heads: int, positions: Positions
) -> None:
    """A clean commit leaves the keys and values of a fresh prefill."""
    sampler = sampler_of(kv_heads=kv_heads, positions=positions)
    limits = Limits(new_tokens=8, images=0)
    (written,) = sampler.write([Prompt((BOS, 3, 4, BEGIN))], limits)
    picture, text = written
    assert isinstance(picture, Tensor) and isinstance(text, list) and len(text) == 8
    prompt = Prompt((BOS, 3, 4, *group()), picture[None])
    assert sampler.text([prompt], 8) == [text]
    whole = sampler.pack([Prompt((*prompt.tokens, *text), picture[None])])
    logits = sampler.head.logits(sampler.hidden(whole))
    marks = [BOS, IDS["[PAD]"], SLOT, END, BEGIN]
    logits[:, marks] = -torch.inf
    assert logits[len(prompt.tokens) - 1 : -1].argmax(-1).tolist() == text


@pytest.mark.parametrize("positions", Positions)
@torch.inference_mode()
def test_the_prefix_is_only_read_while_a_picture_is_drawn(positions: Positions) -> None:
    sampler = sampler_of(positions=positions)
    writing, _ = sampler.start([Prompt((BOS, 3, BEGIN))], ROWS)
    before = {layer: [x.clone() for x in kept] for layer, kept in writing.cache._layers.items()}
    clean = sampler._solve(writing, torch.tensor([0]), torch.tensor([5]))
    for layer, kept in writing.cache._layers.items():
        for found, expected in zip(kept, before[layer], strict=True):
            assert torch.equal(found, expected)
    places = sampler._of_image(writing.position_B)
    sampler._put(writing, torch.tensor([0]), sampler.encode(clean), places)
    assert int(writing.slot_B) == 3 + ROWS
    assert int(writing.position_B) == (4 if positions is Positions.shared else 3 + ROWS)
    fresh, _ = sampler.start([Prompt((BOS, 3, *group()), clean)], 0)
    for kept, wanted in zip(
        writing.cache._layers.values(), fresh.cache._layers.values(), strict=True
    ):
        for found, expected in zip(kept, wanted, strict=True):
            torch.testing.assert_close(found[:, :7], expected[:, :7], rtol=1e-4, atol=1e-5)


class Script:
    """Chooses what it is told, sequence by sequence."""

    def __init__(self, *lines: list[int]) -> None:
        self.lines = [list(line) for line in lines]

    def __call__(self, logits_BV: Tensor, which: object = None) -> Tensor:
        assert isinstance(which, list) and len(which) == len(logits_BV)
        chosen = [self.lines[number].pop(0) for number in which]
        for row, token in zip(logits_BV, chosen, strict=True):
            assert float(row[token]) > -torch.inf, "a token that may not come now"
        return torch.tensor(chosen)


def shape_of(pieces: list[list[int] | Tensor]) -> list[list[int] | str]:
    return [piece if isinstance(piece, list) else "image" for piece in pieces]


def test_text_and_pictures_take_turns() -> None:
    sampler = sampler_of(solver_steps=2)
    script = Script([1, BEGIN, 2, 3, BEGIN, 4, EOS], [5, EOS], [BEGIN, BEGIN, 6, 7, 8, 9, 10, 11])
    prompts = [Prompt((BOS, 1)), Prompt((BOS, 2)), Prompt((BOS, 3))]
    found = sampler.write(prompts, Limits(new_tokens=6, images=2), script)
    assert [shape_of(pieces) for pieces in found] == [
        [[1], "image", [2, 3], "image", [4, EOS]],
        [[5, EOS]],
        ["image", "image", [6, 7, 8, 9, 10, 11]],
    ]
    assert script.lines == [[], [], []]
    with pytest.raises(AssertionError, match="may not come"):
        sampler.write(prompts[:1], Limits(new_tokens=4, images=0), Script([BEGIN]))
    with pytest.raises(AssertionError, match="may not come"):
        sampler.write(prompts[:1], Limits(new_tokens=4, images=1), Script([END]))


@pytest.mark.parametrize("positions", Positions)
@torch.inference_mode()
def test_a_text_piece_after_two_pictures_is_that_of_a_fresh_prompt(positions: Positions) -> None:
    sampler = sampler_of(solver_steps=2, positions=positions)
    script = Script([1, BEGIN, 2, BEGIN, 4, 5, 6])
    (pieces,) = sampler.write([Prompt((BOS,))], Limits(new_tokens=5, images=2), script)
    first, second = (piece for piece in pieces if isinstance(piece, Tensor))
    tokens = (BOS, 1, *group(), 2, *group(), 4)
    expected = sampler.text([Prompt(tokens, torch.stack([first, second]))], 3, of_words)
    redone = sampler.write(
        [Prompt((BOS,))], Limits(new_tokens=6, images=2), Forced([1, BEGIN, 2, BEGIN, 4])
    )
    assert redone[0][-1] == [4, *expected[0]]


def of_words(logits_BV: Tensor, which: object = None) -> Tensor:
    """The likeliest, marks left out."""
    marks = torch.tensor([BOS, IDS["[PAD]"], SLOT, END, BEGIN])
    return logits_BV.index_fill(1, marks, -torch.inf).argmax(-1)


class Forced:
    """Chooses what it is told, then greedily."""

    def __init__(self, line: list[int]) -> None:
        self.line = line

    def __call__(self, logits_BV: Tensor, which: object = None) -> Tensor:
        return torch.tensor([self.line.pop(0)]) if self.line else logits_BV.argmax(-1)


@pytest.mark.parametrize("positions", Positions)
def test_neither_batch_nor_order_change_what_is_written(positions: Positions) -> None:
    sampler = sampler_of(solver=Solver.ddpm, positions=positions).drawing(seed=3)
    prompts = [
        Prompt((BOS, 3, BEGIN)),
        Prompt((BOS, 5, 6, 7, 8)),
        Prompt((BOS, *group(), 2, BEGIN), pictures(1)),
    ]
    limits = Limits(new_tokens=6, images=1)
    together = sampler.write(prompts, limits, Nucleus(seed=1).rows(0, 3))
    for number, prompt in enumerate(prompts):
        (alone,) = sampler.write([prompt], limits, Nucleus(seed=1).rows(number, 1))
        assert shape_of(alone) == shape_of(together[number])
        for one, other in zip(alone, together[number], strict=True):
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    backwards = sampler.rollout([Prompt(p.tokens[:-1], p.pixels) for p in prompts[::2]][::-1])
    assert isinstance(together[0][0], Tensor)
    torch.testing.assert_close(backwards[1], together[0][0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_answers_are_ranked_under_the_mask_of_their_pictures() -> None:
    """The likelihood of an answer is that of the steps which would write it."""
    sampler = sampler_of()
    prompt = Prompt((BOS, *group(), 2), pictures(1))
    answers = [[3, 4], [5, EOS]]
    found = sampler.negative_log_likelihoods(prompt, answers)
    for answer, ranked in zip(answers, found, strict=True):
        told = sampler.pack([Prompt((*prompt.tokens, *answer), prompt.pixels)])
        logits = sampler.head.logits(sampler.hidden(told)).log_softmax(-1)
        steps = zip(logits[len(prompt.tokens) - 1 : -1], answer, strict=True)
        assert float(ranked) == pytest.approx(-sum(float(row[a]) for row, a in steps), rel=1e-5)


def test_a_model_that_was_trained_on_copies_writes_without_them() -> None:
    with_copies = sampler_of(context=Context.copies, solver_steps=2)
    assert with_copies.form.visual_tokens == ROWS
    (drawn_so,) = with_copies.rollout([Prompt((BOS, *group(), 3), pictures(1))])
    (drawn_else,) = sampler_of(solver_steps=2).rollout([Prompt((BOS, *group(), 3), pictures(1))])
    assert torch.equal(drawn_so, drawn_else)


def test_guidance_of_one_is_a_single_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of().drawing(guidance=1.0)
    monkeypatch.setattr(sampler, "_null", lambda slots: pytest.fail("a second pass"))
    passes = []
    fold = sampler.fold
    monkeypatch.setattr(sampler, "fold", lambda *given: passes.append(1) or fold(*given))
    sampler.rollout([Prompt((BOS, 1))])
    assert len(passes) == 1 + 5  # prefill, then one a step


@pytest.mark.parametrize("solver", Solver)
def test_every_solver_draws_on_the_linear_path(solver: Solver) -> None:
    sampler = sampler_of(path=Path.linear, answer=Answer.velocity, solver=solver)
    found = sampler.rollout([Prompt((BOS, 1)), Prompt((BOS, 2))])
    assert found.shape == (2, 3, 8, 8)
    assert bool(found.isfinite().all()) and float(found.abs().max()) <= 1.0


def test_seeds_make_other_pictures_and_the_same_seed_the_same() -> None:
    sampler, prompts = sampler_of(), [Prompt((BOS, 1))]
    first, again, other = (sampler.drawing(seed=s).rollout(prompts) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-2)


def test_what_cannot_be_drawn_is_refused() -> None:
    sampler = sampler_of()
    with pytest.raises(ContentError, match="scheduler pndm: this model draws by ddpm or ddim"):
        sampler.drawing(scheduler="pndm")
    with pytest.raises(ContentError, match=r"1001 steps: .* use 1 to 1000"):
        sampler.drawing(steps=1001)
    with pytest.raises(ContentError, match="prompt 0: 0 <image> positions for 1 images"):
        sampler.text([Prompt((BOS, 1), pictures(1))], 2)
    assert WORDS < BEGIN
