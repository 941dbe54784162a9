"""The VAE in training: its size, its losses, its critic, what a rank makes of micro-batches."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.data.batch import Batch, BatchInfo, Targets
from mmtrain.data.packed import image_rows
from mmtrain.data.tokens import SPECIAL_TOKENS
from mmtrain.encoders.features import moco_distance
from mmtrain.errors import MissingError
from mmtrain.models.spec import Use
from mmtrain.models.vae.config import CriticConfig, VaeConfig
from mmtrain.models.vae.model import (
    FIELDS,
    JUDGED,
    LOSSES,
    SEEDS,
    PatchCritic,
    VaeWithCritic,
    build_autoencoder,
)
from mmtrain.models.vae.spec import VAE, Judging
from mmtrain.nn.flow import Flow
from mmtrain.nn.init import draw_by_name
from mmtrain.nn.noise import row_numbers
from mmtrain.recipe import examine

SMALL = VaeConfig(
    size=16,
    latent_channels=4,
    channels=(8, 8),
    layers_per_block=1,
    encoder_attends=(False, True),
    decoder_attends=(False, False),
    norm_groups=4,
    critic=CriticConfig(channels=8, layers=1, norm_groups=4, from_step=3),
)
FORM = VAE.sequence(SMALL, {token: at for at, token in enumerate(SPECIAL_TOKENS)})
WEIGHTS = {"l1": 1.0, "perceptual": 1.0, "identity": 0.2, "kl": 1e-6, "adversarial": 0.5}


def drawn(config: VaeConfig = SMALL) -> VaeWithCritic:
    """A model with the first weights of a run."""
    model = VaeWithCritic(config)
    for name, parameter in model.named_parameters():
        parameter.data = draw_by_name(f"vae.{name}", tuple(parameter.shape), VAE.initial(config), 0)
    return model


def pictures(count: int, judged: bool = True) -> Flow:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    fields = {SEEDS: torch.arange(count) + 7, JUDGED: torch.tensor([int(judged)])}
    return Flow(pixels, {name: fields[name] for name in FIELDS})


def total(values: dict[str, Tensor]) -> Tensor:
    return torch.stack([WEIGHTS.get(name, 1.0) * v.mean() for name, v in values.items()]).sum()


def test_the_default_is_the_86m_of_the_paper() -> None:
    with torch.device("meta"):
        numbers = sum(p.numel() for p in build_autoencoder(VaeConfig()).parameters())
    assert numbers == 85_812_715
    assert numbers == pytest.approx(86e6, rel=0.02)
    assert VaeConfig().factor == 8


def test_one_picture_is_the_same_in_any_company() -> None:
    model, many = drawn(), pictures(3)
    values = model(many)
    assert tuple(values) == LOSSES
    assert all(value.shape == (3,) and value.dtype == torch.float32 for value in values.values())
    for number in range(3):
        alone = {SEEDS: many.fields[SEEDS][number : number + 1], JUDGED: many.fields[JUDGED]}
        one = model(Flow(many.hidden[number : number + 1], alone))
        for name, value in values.items():
            torch.testing.assert_close(one[name][0], value[number], rtol=1e-5, atol=1e-6)
    other = model(Flow(many.hidden, {SEEDS: many.fields[SEEDS] + 9, JUDGED: many.fields[JUDGED]}))
    assert bool((other["l1"] != values["l1"]).all())  # another draw of the posterior
    assert torch.equal(other["kl"], values["kl"])


def test_kl_is_that_of_the_posterior_in_nats_a_picture() -> None:
    model, flow = drawn(), pictures(2)
    mean, log_variance = model.moments(flow.hidden).double().chunk(2, 1)
    nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
    torch.testing.assert_close(model(flow)["kl"].double(), nats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss, moved, still", [
    ("adversarial", "autoencoder", "critic"),
    ("critic", "critic", "autoencoder"),
    ("l1", "autoencoder", "critic"),
])  # fmt: skip
def test_each_term_moves_its_own_half(loss: str, moved: str, still: str) -> None:
    model = drawn()
    model(pictures(2))[loss].sum().backward()
    shifts = [f"critic.{len(model.critic) - 1}.bias"]
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name.startswith(still):
            assert gradient is None or not bool(gradient.any()), name
        elif name.startswith(moved):
            assert gradient is not None, name
            # the shifts of keys change no attention; the critic's last bias shifts all alike
            assert bool(gradient.any()) or name in shifts or "to_k.bias" in name, name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_before_its_step_the_critic_stands_still_with_gradients_of_zero() -> None:
    model = drawn()
    values = model(pictures(2, judged=False))
    assert not bool(values["adversarial"].any()) and not bool(values["critic"].any())
    total(values).backward()
    for parameter in model.critic.parameters():
        assert parameter.grad is not None and not bool(parameter.grad.any())


def test_one_step_for_both_is_two_optimizers_in_turn() -> None:
    joint = drawn()
    # an epsilon above rounding: keys' biases have gradients of nothing else
    adam = partial(torch.optim.AdamW, lr=1e-3, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.0)
    one = adam(joint.parameters())
    split, seen = drawn(), []
    halves = [adam(part.parameters()) for part in (split.autoencoder, split.critic)]
    for step in range(1, 5):
        flow = pictures(step)
        one.zero_grad()
        values = joint(flow)
        total(values).backward()
        one.step()
        seen.append(float(values["critic"].detach().mean()))
        _two_optimizers(split, halves, flow)
    assert len(set(seen)) == 4
    first = drawn().parameters()
    named = joint.named_parameters()
    for (name, mine), plain, begun in zip(named, split.parameters(), first, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6, msg=name)
        assert float((mine - begun).detach().abs().max()) > 1e-4 or "to_k.bias" in name, name


def _two_optimizers(model: VaeWithCritic, halves: list[torch.optim.AdamW], flow: Flow) -> None:
    """A step of VQGAN's kind, both terms at the weights from before it."""
    pixels, found = flow.hidden, _reconstruction(model, flow)
    mean, log_variance = model.moments(pixels).chunk(2, 1)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
    own = (found - pixels).abs().mean() + 1e-6 * kl - 0.5 * model.critic(found).mean()
    own_gradients = torch.autograd.grad(own, list(model.autoencoder.parameters()))
    real, made = model.critic(pixels), model.critic(found.detach())
    hinge = 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + made).mean())
    its_gradients = torch.autograd.grad(hinge, list(model.critic.parameters()))
    pairs = ((model.autoencoder, own_gradients), (model.critic, its_gradients))
    for half, (part, gradients) in zip(halves, pairs, strict=True):
        for parameter, gradient in zip(part.parameters(), gradients, strict=True):
            parameter.grad = gradient
        half.step()


def _reconstruction(model: VaeWithCritic, flow: Flow) -> Tensor:
    """What the layer decodes: its own decoder, listened to."""
    kept: list[Tensor] = []
    hook = model.autoencoder.decoder.register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    model(flow)
    hook.remove()
    return kept[0]


def test_the_critic_is_the_patch_discriminator_of_pix2pix_but_for_its_norms() -> None:
    critic = PatchCritic(CriticConfig())
    assert critic(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)  # patches of 70 pixels
    widths = [part.weight.shape[0] for part in critic if isinstance(part, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]


def loaded(step: int) -> Batch:
    """A micro-batch of the loader: one picture and a stand-in."""
    fields = {"tokens": torch.full((8,), FORM.pad), "noise": row_numbers(5, 8)}
    fields |= image_rows([2], 2, FORM.visual_tokens, 8)
    pairs = torch.tensor([1.0, 1.0, 0.0, 0.0])
    return Batch(
        inputs=Flow(torch.rand(2, 3, 16, 16), fields),
        targets=Targets({"text": torch.ones(8), "image": pairs}, {"image": pairs.long()}),
        info=BatchInfo((0,), ("a",), 5, 1, 8, step),
    )


def test_weights_say_which_losses_take_part(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        training = Judging(SMALL, FORM, torch.device("cpu"), Use.training)
    assert "`perceptual` is LEFT OUT" in caplog.text and "`identity` is LEFT OUT" in caplog.text
    caplog.clear()
    heldout = Judging(SMALL, FORM, torch.device("cpu"), Use.heldout)
    assert caplog.text == ""
    for step, prepare, listened in ((2, training, 0.0), (3, training, 1.0), (3, heldout, 0.0)):
        batch = prepare(loaded(step))
        weights = {name: weight.tolist() for name, weight in batch.targets.weights.items()}
        assert weights["l1"] == weights["kl"] == [1.0, 0.0]
        assert weights["critic"] == weights["adversarial"] == [listened, 0.0]
        assert weights["perceptual"] == weights["identity"] == [0.0, 0.0]
        assert batch.inputs.fields[JUDGED].tolist() == [int(listened)]
        assert batch.inputs.fields[SEEDS].tolist() == [int(row_numbers(5, 8)[2]), 0]
        assert batch.targets.origins["l1"].tolist() == [1, 0]


def faults(**changed: object) -> dict[str, str]:
    config = replace(SMALL, **changed)  # type: ignore[arg-type]
    return {problem.place: problem.text for problem in VAE.problems(config, 1)}


def test_layouts_that_cut_the_model_are_refused_in_one_line() -> None:
    path = Path(__file__).parents[3] / "configs/transfusion/shapes_vae.yaml"
    (tensor,) = examine(path, ["parallel.tensor=2"], 2).faults
    assert str(tensor) == (
        "parallel.tensor: found 2; a VAE is trained data parallel: use 1, and ZeRO 1 to 3"
    )
    (stages,) = examine(path, ["parallel.pipeline=2"], 2).faults
    assert str(stages) == "parallel.pipeline: 2 stages for 1 layers; use 1 or fewer"


def test_faults_name_the_key_and_the_way_out(tmp_path: Path) -> None:
    assert faults() == {}
    assert "use a multiple of 2" in faults(size=17)["model.size"]
    assert "say true or false" in faults(encoder_attends=(True,))["model.encoder_attends"]
    assert "use a divisor of 8" in faults(norm_groups=3)["model.norm_groups"]
    assert "without model.vgg" in faults(lpips="x")["model.lpips"]
    critic = replace(SMALL.critic, layers=4)
    assert "use fewer" in faults(critic=critic)["model.critic.layers"]
    assert faults(critic=replace(SMALL.critic, from_step=-1)).keys() == {"model.critic.from_step"}
    named = replace(SMALL, vgg=str(tmp_path / "none.pth"))
    assert [problem.place for problem in VAE.missing(named)] == ["model.vgg"]
    with pytest.raises(MissingError, match="there is no such file"):
        moco_distance(tmp_path / "none.pth")
