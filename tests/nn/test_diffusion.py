"""Noise processes against double precision, against diffusers, and against the checked values."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mmtrain.nn.diffusion import (
    Answer,
    NoiseProcess,
    Path,
    Times,
    cosine_kept,
    draw_times,
    spaced_times,
)
from mmtrain.nn.noise import normals, uniforms
from mmtrain.nn.patches import patchify, unpatchify

STEPS = 1000
KINDS = [
    (Path.cosine, Answer.epsilon),
    (Path.cosine, Answer.velocity),
    (Path.linear, Answer.velocity),
    (Path.cosine, Answer.clean),
    (Path.linear, Answer.clean),
]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_cosine_schedule_has_the_checked_values() -> None:
    kept = cosine_kept(STEPS)
    expected = {100: 0.9721, 250: 0.8470, 500: 0.4938, 750: 0.1443}
    for time, value in expected.items():
        assert float(kept[time]) == pytest.approx(value, abs=5e-5)
    assert float(kept[999]) == pytest.approx(2.43e-6, rel=2e-3)
    assert float(kept[0]) == 1
    assert float(kept[1000] / kept[999]) == pytest.approx(0.001)  # beta is cut off at 0.999


def test_the_cosine_schedule_is_that_of_diffusers_one_index_later() -> None:
    theirs = DDPMScheduler(STEPS, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(cosine_kept(STEPS)[1:], theirs, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("path, answer", KINDS)
def test_mixing_agrees_with_double_precision(path: Path, answer: Answer) -> None:
    process = NoiseProcess.of(path, answer, STEPS)
    times = torch.tensor([1, 100, 250, 500, 750, 999, 1000])
    clean, noise = some(7, 2, 3, 3, seed=1), some(7, 2, 3, 3, seed=2)
    noisy, wanted = process.mix(clean, noise, times).double().chunk(2, 1)
    for row, time in enumerate(times.tolist()):
        x, e = clean[row].double(), noise[row].double()
        if path is Path.linear:
            share = time / STEPS
            signal, spoilt, velocity = 1 - share, share, e - x
        else:
            kept = math.prod(
                1 - min(1 - alpha_bar((k + 1) / STEPS) / alpha_bar(k / STEPS), 0.999)
                for k in range(time)
            )
            signal, spoilt = math.sqrt(kept), math.sqrt(1 - kept)
            velocity = signal * e - spoilt * x
        torch.testing.assert_close(noisy[row], signal * x + spoilt * e, rtol=1e-5, atol=1e-6)
        expected = {Answer.epsilon: e, Answer.clean: x, Answer.velocity: velocity}[answer]
        torch.testing.assert_close(wanted[row], expected, rtol=1e-5, atol=1e-6)


def alpha_bar(share: float) -> float:
    return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2


@pytest.mark.parametrize("path, answer", KINDS)
def test_an_answer_gives_clean_picture_and_noise_back(path: Path, answer: Answer) -> None:
    process = NoiseProcess.of(path, answer, STEPS)
    times = torch.tensor([1, 300, 700, 900])
    clean, noise = some(4, 2, 3, 3, seed=1), some(4, 2, 3, 3, seed=2)
    noisy, wanted = process.mix(clean, noise, times).chunk(2, 1)
    for found, expected in zip(process.undo(noisy, wanted, times), (clean, noise), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path, answer", [kind for kind in KINDS if Answer.epsilon not in kind])
def test_weights_count_the_clean_pictures_error_up_to_their_limit(
    path: Path, answer: Answer
) -> None:
    process, times = NoiseProcess.of(path, answer, STEPS), torch.tensor([20, 300, 700, 950])
    noisy, wanted = process.mix(some(4, 2, 3, 3), some(4, 2, 3, 3, seed=1), times).chunk(2, 1)
    wrong = wanted + 0.1 * some(4, 2, 3, 3, seed=2)
    (true, _), (guess, _) = (process.undo(noisy, answer, times) for answer in (wanted, wrong))
    clean_N = (guess - true).square().mean((1, 2, 3)).double()
    snr_limited_N = (1 / process.spoilt[times].square()).clamp(max=5)
    own_N = (wrong - wanted).square().mean((1, 2, 3)) * process.weights(times, 5)
    torch.testing.assert_close(own_N.double(), snr_limited_N * clean_N, rtol=1e-3, atol=1e-6)
    assert process.weights(times, 0).tolist() == [1, 1, 1, 1]


def test_steps_are_those_of_the_posterior_in_double_precision() -> None:
    """Ho et al. 2020, eq. 6 and 7: mean and the lower variance."""
    process, kept = NoiseProcess.of(Path.cosine, Answer.epsilon, STEPS), cosine_kept(STEPS)
    clean, noise, fresh = (some(1, 2, 3, 3, seed=seed) for seed in (1, 2, 3))
    for now, then in ((1000, 996), (751, 750), (500, 250), (2, 1), (1, 0)):
        time = torch.tensor([now])
        noisy, wanted = process.mix(clean, noise, time).chunk(2, 1)
        found = process.step(noisy, wanted, (now, then), fresh=fresh)
        alpha = kept[now] / kept[then]
        mean = (
            kept[then].sqrt() * (1 - alpha) / (1 - kept[now]) * clean.double()
            + alpha.sqrt() * (1 - kept[then]) / (1 - kept[now]) * noisy.double()
        )
        spread = ((1 - kept[then]) / (1 - kept[now]) * (1 - alpha)).sqrt()
        tolerance = 1e-2 if now == STEPS else 2e-4  # there the signal is 5e-5 in float32
        torch.testing.assert_close(
            found.double(), mean + spread * fresh, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("answer", Answer)
def test_deterministic_steps_are_those_of_diffusers(answer: Answer) -> None:
    names = {
        Answer.epsilon: "epsilon",
        Answer.velocity: "v_prediction",
        Answer.clean: "sample",
    }
    theirs = DDIMScheduler(
        STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=names[answer],
        clip_sample=False,
        set_alpha_to_one=False,
    )
    theirs.set_timesteps(10)  # indices 900, 800, ...: times 901, 801, ...
    process = NoiseProcess.of(Path.cosine, answer, STEPS)
    x, said = some(2, 2, 3, 3, seed=1), some(2, 2, 3, 3, seed=2)
    for index in (900, 500, 100):
        expected = theirs.step(said, index, x).prev_sample
        found = process.step(x, said, (index + 1, index - 99))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_deterministic_steps_of_the_linear_path_are_eulers() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(STEPS, shift=1.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    process = NoiseProcess.of(Path.linear, Answer.velocity, STEPS)
    mine = expected = some(2, 2, 3, 3, seed=1)
    times = spaced_times(STEPS, 4)
    assert times == [1000, 750, 500, 250, 0]
    for at, index in zip(itertools.pairwise(times), theirs.timesteps, strict=True):
        said = some(2, 2, 3, 3, seed=at[0])
        expected = theirs.step(said, index, expected, return_dict=False)[0]
        mine = process.step(mine, said, at)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path, answer", KINDS)
@pytest.mark.parametrize("ancestral", [False, True])
def test_a_model_that_knows_the_picture_draws_it(
    path: Path, answer: Answer, ancestral: bool
) -> None:
    process, clean = NoiseProcess.of(path, answer, STEPS), some(2, 2, 3, 3, seed=1).clamp(-1, 1)
    x, times = some(2, 2, 3, 3, seed=2), spaced_times(STEPS, 25)
    for now, then in itertools.pairwise(times):
        here = torch.tensor([now, now])
        signal, spoilt = float(process.signal[now]), float(process.spoilt[now])
        _, said = process.mix(clean, (x - signal * clean) / spoilt, here).chunk(2, 1)
        fresh = some(2, 2, 3, 3, seed=now) if ancestral else None
        x = process.step(x, said, (now, then), limit=1.0, fresh=fresh)
    torch.testing.assert_close(x, clean, rtol=1e-4, atol=1e-4)


def test_times_are_spread_as_said_and_keep_their_limits() -> None:
    seeds = torch.arange(20_000) * 7919
    limits = torch.where(seeds % 2 == 0, 500, 1000)
    drawn = draw_times(seeds, limits, STEPS, Times.uniform)
    for limit in (500, 1000):
        own = drawn[limits == limit]
        assert (int(own.min()), int(own.max())) == (1, limit)
        assert float(own.double().mean()) == pytest.approx((limit + 1) / 2, rel=0.02)
        counts = torch.bincount((own - 1) * 10 // limit)
        assert counts.min() > 0.9 * 1000 and counts.max() < 1.1 * 1000
    middle = draw_times(seeds, torch.full_like(seeds, 1000), STEPS, Times.logit_normal)
    share = (middle.double() / STEPS).logit(eps=1e-4)
    assert float(share.mean()) == pytest.approx(0, abs=0.03)
    assert float(share.std()) == pytest.approx(1, abs=0.03)


def test_numbers_of_seeds_are_normal_and_independent() -> None:
    seeds = torch.arange(500) - 250
    drawn = normals(seeds, 1001)
    assert drawn.shape == (500, 1001) and drawn.dtype is torch.float32
    assert float(drawn.mean()) == pytest.approx(0, abs=0.005)
    assert float(drawn.std()) == pytest.approx(1, abs=0.005)
    assert float((drawn**4).mean()) == pytest.approx(3, abs=0.05)
    for other in (drawn.roll(1, 0), drawn.roll(1, 1)):
        assert abs(float((drawn * other).mean())) < 0.005
    torch.testing.assert_close(drawn[7:9], normals(seeds[7:9], 1001), rtol=0, atol=0)
    bits = uniforms(seeds, 100)
    assert float(bits.min()) >= 0 and float(bits.max()) < 1


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_squares_become_rows_and_pictures_again(k: int) -> None:
    x = some(3, 5, 16, 16)
    rows = patchify(x, k)
    assert rows.shape == (3, (16 // k) ** 2, 5 * k**2)
    torch.testing.assert_close(unpatchify(rows, k), x, rtol=0, atol=0)
    second = x[0, :, :k, k : 2 * k] if k < 16 else x[0]  # raster order: to the right first
    torch.testing.assert_close(rows[0, 1].view(k, k, 5), second.permute(1, 2, 0), rtol=0, atol=0)
