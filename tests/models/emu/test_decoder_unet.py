"""The visual decoder: sizes of the release, initial weights, losses, noise, solvers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.models.census import take_census
from mmtrain.models.emu.decoder import (
    EMU_DECODER,
    UNetConfig,
    build_unet,
    diffusers_config,
    flops,
    initial,
    problems,
)
from mmtrain.models.emu.diffusion import Diffusion
from mmtrain.models.spec import BatchShape
from mmtrain.nn.flow import Flow
from mmtrain.nn.init import draw_by_name
from mmtrain.settings import BetaSchedule, DecoderConfig, Prediction, Scheduler

SMALL = UNetConfig(
    sample_channels=3,
    sample_size=8,
    channels=(8, 16),
    attends=(False, True),
    layers_per_block=1,
    heads=2,
    norm_groups=4,
    conditions=4,
    condition_width=12,
)


def test_sd_15_has_its_published_size_and_emu_s_its_own() -> None:
    for width, numbers in ((768, 859_520_964), (5120, 968_146_884)):
        (layer,) = take_census(EMU_DECODER, UNetConfig(condition_width=width))
        assert layer.count == numbers
        assert len(layer.shapes) == 686
    assert layer.shapes["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (
        1280,
        5120,
    )
    assert not list(problems(UNetConfig(), 1))


def test_every_parameter_is_drawn_as_diffusers_draws_it() -> None:
    torch.manual_seed(0)
    wide = UNetConfig(**{**vars(SMALL), "channels": (32, 64)})
    reference = dict(UNet2DConditionModel(**diffusers_config(wide)).named_parameters())
    for name, parameter in reference.items():
        drawn = draw_by_name(f"unet.{name}", tuple(parameter.shape), initial(wide), seed=0)
        if parameter.numel() < 2000:  # too few to compare a spread
            continue
        assert drawn.std() == pytest.approx(parameter.std().item(), rel=0.1, abs=1e-7), name
        assert drawn.abs().max() == pytest.approx(parameter.abs().max().item(), rel=0.02), name
    zero = draw_by_name("unet.conv_norm_out.bias", (32,), initial(wide), 0)
    one = draw_by_name("unet.conv_norm_out.weight", (32,), initial(wide), 0)
    assert not zero.any() and bool((one == 1).all())
    bias = draw_by_name("unet.conv_in.bias", (32,), initial(wide), 0)
    assert 0 < bias.abs().max() <= 1 / math.sqrt(3 * 9)


def test_operations_are_those_that_torch_counts() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_unet(SMALL).predict(
            torch.empty(1, 3, 8, 8), torch.zeros(1).long(), torch.empty(1, 4, 12)
        )
    assert flops(SMALL, BatchShape(0, 3)) == [3 * counter.get_total_flops()]


def test_the_loss_is_the_mean_square_of_diffusers_own_forward() -> None:
    torch.manual_seed(0)
    unet, plain = build_unet(SMALL), UNet2DConditionModel(**diffusers_config(SMALL))
    plain.load_state_dict(unet.state_dict())
    noisy, wanted = torch.randn(2, 5, 3, 8, 8)
    rows, timesteps = torch.randn(5, 4, 12), torch.tensor([0, 10, 500, 900, 999])
    flow = Flow(torch.cat([noisy, wanted], 1), {"timesteps": timesteps}, rows.flatten(0, 1))
    answer = plain(noisy, timesteps, rows).sample
    torch.testing.assert_close(unet(flow)["noise"], (answer - wanted).square().mean((1, 2, 3)))


def test_patches_are_positions_of_the_unet() -> None:
    patched = UNetConfig(**{**vars(SMALL), "sample_size": 16, "patch": 2})
    torch.manual_seed(0)
    unet = build_unet(patched)
    assert unet.conv_in.in_channels == unet.conv_out.out_channels == 3 * 4
    noisy, timesteps, rows = torch.randn(2, 3, 16, 16), torch.tensor([5, 50]), torch.randn(2, 4, 12)
    plain = UNet2DConditionModel(**diffusers_config(patched))
    plain.load_state_dict(unet.state_dict())
    squares = torch.nn.functional.pixel_unshuffle(noisy, 2)
    answer = torch.nn.functional.pixel_shuffle(plain(squares, timesteps, rows).sample, 2)
    torch.testing.assert_close(unet.predict(noisy, timesteps, rows), answer)
    odd = UNetConfig(**{**vars(SMALL), "sample_size": 10, "patch": 2})
    assert "use a multiple of 4" in next(iter(problems(odd, 1))).text


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("schedule", BetaSchedule)
def test_noise_is_mixed_as_diffusers_mixes_it(
    prediction: Prediction, schedule: BetaSchedule
) -> None:
    config = DecoderConfig(beta_schedule=schedule, prediction=prediction)
    reference = DDPMScheduler(
        beta_schedule=schedule.value, beta_start=config.beta_start, beta_end=config.beta_end
    )
    clean, noise = torch.randn(2, 4, 3, 8, 8)
    timesteps = torch.tensor([0, 1, 500, 999])
    noisy, wanted = Diffusion(config).mix(clean, noise, timesteps).chunk(2, 1)
    torch.testing.assert_close(noisy, reference.add_noise(clean, noise, timesteps))
    answers = {
        Prediction.epsilon: noise,
        Prediction.sample: clean,
        Prediction.v_prediction: reference.get_velocity(clean, noise, timesteps),
    }
    torch.testing.assert_close(wanted, answers[prediction])


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("scheduler", Scheduler)
def test_every_solver_finds_the_picture_when_the_answers_are_right(
    scheduler: Scheduler, prediction: Prediction
) -> None:
    """A decoder that knows the one clean picture leads from any noise to it."""
    diffusion = Diffusion(DecoderConfig(prediction=prediction))
    clean = torch.rand(1, 3, 8, 8) * 1.6 - 0.8
    solver = diffusion.solver(scheduler, 40, limited=None)
    x = torch.randn(1, 3, 8, 8)
    for timestep in solver.timesteps:
        kept = solver.alphas_cumprod[timestep]
        noise = (x - kept.sqrt() * clean) / (1 - kept).sqrt()
        answer = {
            Prediction.epsilon: noise,
            Prediction.sample: clean,
            Prediction.v_prediction: kept.sqrt() * noise - (1 - kept).sqrt() * clean,
        }[prediction]
        answer = diffusion.spoken(scheduler, answer, x, timestep)
        x = solver.step(answer, timestep, x, return_dict=False)[0]
    assert (x - clean).abs().mean() < 0.05


def test_faults_of_sizes_name_what_would_fit() -> None:
    wrong = UNetConfig(
        channels=(30, 64), attends=(True,), heads=4, norm_groups=8, sample_size=7, conditions=0
    )
    found = {problem.place: problem.text for problem in problems(wrong, 1)}
    assert "divisor of 2" in found["model.heads"] and "[30]" in found["model.norm_groups"]
    assert "1 levels, model.channels has 2" in found["model.attends"]
    assert "multiple of 2" in found["model.sample_size"]
    assert "must be positive" in found["model.conditions"]


@pytest.mark.parametrize("prediction", Prediction)
def test_an_error_of_the_clean_picture_counts_alike_whatever_is_predicted(
    prediction: Prediction,
) -> None:
    """min(1 + snr, limit) times the squared error of the picture that the answer amounts to."""
    diffusion = Diffusion(DecoderConfig(prediction=prediction, snr_limit=20.0))
    timesteps = torch.tensor([10, 300, 800, 990])
    clean, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    noisy, wanted = diffusion.mix(clean, noise, timesteps).chunk(2, 1)
    kept = diffusion._kept.double()[timesteps].view(-1, 1, 1, 1)
    guess = clean + 0.1 * torch.randn_like(clean)
    answer = {
        Prediction.sample: guess,
        Prediction.epsilon: (noisy - kept.sqrt() * guess) / (1 - kept).sqrt(),
        Prediction.v_prediction: (kept.sqrt() * noisy - guess) / (1 - kept).sqrt(),
    }[prediction]
    error = (answer - wanted).square().mean((1, 2, 3)) * diffusion.weights(timesteps)
    counts = (1 / (1 - kept.flatten())).clamp(max=20)
    torch.testing.assert_close(
        error, counts * (guess - clean).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6
    )
    assert Diffusion(DecoderConfig()).weights(timesteps).tolist() == [1, 1, 1, 1]
