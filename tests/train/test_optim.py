"""Learning rates and weight decay by name; the schedule; groups that all stages share."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from mmtrain.settings import Decay, Implementation, OptimizerConfig, ScheduleConfig
from mmtrain.train.optim import (
    Filled,
    all_groups,
    build_optimizer,
    choose,
    group_of,
    parameter_groups,
    rate_factor,
    used_groups,
)

PUBLISHED = OptimizerConfig(
    learning_rate=3e-5,
    learning_rates={"vision": 4e-5, "causal": 1e-4},
    weight_decay=0.05,
    no_decay=("vision.stem.position", "causal.queries"),
)


@pytest.mark.parametrize(
    ("name", "dims", "rate", "decay"),
    [
        ("vision.blocks.3.attention.q.weight", 2, 4e-5, 0.05),
        ("vision.blocks.3.attention.q.bias", 1, 4e-5, 0.0),
        ("vision.stem.position", 2, 4e-5, 0.0),
        ("causal.queries", 2, 1e-4, 0.0),
        ("causal.projection.weight", 2, 1e-4, 0.05),
        ("vision_norm.weight", 1, 3e-5, 0.0),  # a module of its own, not `vision`
        ("blocks.0.norm1.weight", 1, 3e-5, 0.0),
        ("head.unembed.weight", 2, 3e-5, 0.05),
    ],
)
def test_each_parameter_gets_the_published_rate_and_decay(
    name: str, dims: int, rate: float, decay: float
) -> None:
    group = group_of(name, dims, PUBLISHED)
    assert (group.learning_rate, group.weight_decay) == (rate, decay)
    assert group in all_groups(PUBLISHED)


def test_empty_groups_are_dropped_or_filled_so_that_stages_agree() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    named = [("blocks.0.attention.q.weight", weight)]
    alone = parameter_groups(named, PUBLISHED)
    assert [group["params"] for group in alone] == [[weight]]
    stage = nn.Linear(2, 2)
    filled = parameter_groups(named, PUBLISHED, Filled(stage, all_groups(PUBLISHED)))
    assert len(filled) == len(all_groups(PUBLISHED)) == 6
    lent = [p for group in filled for p in group["params"] if p is not weight]
    assert all(p.numel() == 1 for p in lent)
    # DeepSpeed looks for every optimized parameter in the module
    assert {id(p) for p in lent} <= {id(p) for p in stage.parameters()}


def test_frozen_parameters_are_not_optimized() -> None:
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    assert parameter_groups([("head.unembed.weight", frozen)], PUBLISHED) == []


def test_stages_keep_the_groups_that_hold_something_anywhere() -> None:
    trained = {"blocks.0.attention.q_lora.a.weight": (4, 8), "head.norm.weight": (8,)}
    used = used_groups(trained, PUBLISHED)
    assert [(group.label, group.weight_decay) for group in used] == [
        ("default", PUBLISHED.weight_decay),
        ("default", 0.0),
    ]
    stage = nn.Linear(2, 2)
    assert len(parameter_groups([], PUBLISHED, Filled(stage, used))) == 2


def test_cosine_warms_up_to_the_peak_and_ends_at_its_final_ratio() -> None:
    schedule = ScheduleConfig(warmup_steps=2000, decay=Decay.cosine, final_ratio=0.1)
    factors = [rate_factor(step, 10000, schedule) for step in range(10000)]
    assert factors[0] == 1 / 2000 and factors[1999] == 1.0 == factors[2000]
    assert factors[-1] == pytest.approx(0.1)
    middle = (2000 + 9999) / 2
    assert rate_factor(int(middle), 10000, schedule) == pytest.approx(0.55, abs=1e-3)
    assert all(a >= b for a, b in pairwise(factors[2000:]))


def test_linear_and_constant_schedules() -> None:
    linear = ScheduleConfig(warmup_steps=0, decay=Decay.linear)
    assert [rate_factor(step, 5, linear) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    constant = ScheduleConfig(warmup_steps=2, decay=Decay.constant)
    assert [rate_factor(step, 4, constant) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_auto_takes_the_fused_torch_optimizer_on_a_cpu() -> None:
    assert choose(Implementation.auto, torch.device("cpu")) is Implementation.torch_fused
    assert choose(Implementation.torch, torch.device("cpu")) is Implementation.torch


@pytest.mark.parametrize("implementation", [Implementation.torch, Implementation.torch_fused])
def test_implementations_take_the_same_step_as_the_formula(
    implementation: Implementation,
) -> None:
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.98, eps=1e-6)
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    groups = parameter_groups([("w", weight)], config)
    optimizer = build_optimizer(groups, config, implementation)
    gradient = torch.tensor([[0.3, -0.4]])
    expected, m, v = weight.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    for step in range(1, 4):
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        expected = expected * (1 - 0.1 * 0.5)  # decoupled decay (AdamW)
        scaled = (m / (1 - 0.9**step)) / ((v / (1 - 0.98**step)).sqrt() + 1e-6)
        expected = expected - 0.1 * scaled
    torch.testing.assert_close(weight.detach(), expected)
