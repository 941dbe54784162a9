"""AdamW over named parameters: learning rates and weight decay by name pattern, one schedule.

Implementation: apex's FusedAdam when importable and on CUDA, else torch's fused AdamW, else
plain torch; chosen once and logged.
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtrain.layout.names import deciding
from mmtrain.settings import Decay, Implementation, OptimizerConfig, ScheduleConfig

_DEFAULT = "default"  # label of parameters no pattern of `learning_rates` names


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate and a weight decay."""

    label: str
    learning_rate: float
    weight_decay: float


def group_of(name: str, dims: int, config: OptimizerConfig) -> Group:
    """The group of a parameter: the first pattern of `learning_rates` that matches decides.

    Args:
        name: canonical name.
        dims: number of dims of the full tensor; vectors are never decayed.
        config: the recipe's optimizer section.
    """
    label = deciding(config.learning_rates, name)
    rate = config.learning_rate if label is None else config.learning_rates[label]
    still = dims < 2 or deciding(config.no_decay, name) is not None
    return Group(label or _DEFAULT, rate, 0.0 if still else config.weight_decay)


@dataclass(frozen=True)
class Filled:
    """Under a pipeline: what keeps the optimizer groups of all stages alike.

    DeepSpeed reduces the gradient norm group by group over all stages, so each must have the same
    groups, also where none of its own parameters falls into one.

    Attributes:
        lender: module of this stage that lends one unused number to each group it cannot fill.
        groups: those that hold a parameter on some stage, in an order that all stages share.
    """

    lender: nn.Module
    groups: list[Group]


def all_groups(config: OptimizerConfig) -> list[Group]:
    """Every group a recipe can give, in a fixed order that all pipeline stages share."""
    rates = [(_DEFAULT, config.learning_rate), *config.learning_rates.items()]
    return [
        Group(label, rate, decay)
        for label, rate in rates
        for decay in dict.fromkeys((config.weight_decay, 0.0))
    ]


def used_groups(trained: Mapping[str, tuple[int, ...]], config: OptimizerConfig) -> list[Group]:
    """The groups that hold one of the trained parameters (canonical name -> full shape)."""
    used = {group_of(name, len(shape), config) for name, shape in trained.items()}
    return [group for group in all_groups(config) if group in used]


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    filled: Filled | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of the trained parameters; empty ones are dropped.

    Args:
        named: canonical name and parameter.
        config: the recipe's optimizer section.
        filled: the groups that stay, under a pipeline.
    """
    members: dict[Group, list[nn.Parameter]] = {group: [] for group in all_groups(config)}
    for name, parameter in named:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has flattened it
            members[group_of(name, len(shape), config)].append(parameter)
    out = []
    for number, (group, parameters) in enumerate(members.items()):
        if not parameters and filled is not None and group in filled.groups:
            lent = nn.Parameter(torch.zeros(1, device=next(iter(_devices(filled.lender)))))
            filled.lender.register_parameter(f"filler_{number}", lent)
            parameters = [lent]
        if parameters:
            out.append(
                {
                    "params": parameters,
                    "lr": group.learning_rate,
                    "peak": group.learning_rate,
                    "weight_decay": group.weight_decay,
                    "label": group.label,
                }
            )
    return out


def _devices(module: nn.Module) -> Iterable[torch.device]:
    return {parameter.device for parameter in module.parameters()} or {torch.device("cpu")}


def choose(implementation: Implementation, device: torch.device) -> Implementation:
    """Resolve `auto` to what is there."""
    if implementation is not Implementation.auto:
        return implementation
    if device.type == "cuda" and importlib.util.find_spec("apex") is not None:
        return Implementation.apex
    return Implementation.torch_fused


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, implementation: Implementation
) -> torch.optim.Optimizer:
    """The AdamW that `implementation` names, over `groups`."""
    settings = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if implementation is Implementation.apex:
        from apex.optimizers import FusedAdam  # optional package

        return FusedAdam(groups, adam_w_mode=True, **settings)  # type: ignore[no-any-return]
    if implementation is Implementation.deepspeed:
        from deepspeed.ops.adam import FusedAdam as DeepSpeedAdam  # compiles at first use

        return DeepSpeedAdam(groups, adam_w_mode=True, **settings)  # type: ignore[no-any-return]
    fused = implementation is Implementation.torch_fused
    return torch.optim.AdamW(groups, fused=fused, **settings)  # type: ignore[arg-type]


def rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) as a factor of the peak.

    Linear warm-up to 1, then `decay` to `final_ratio` at the last step, or the factors of
    `schedule.steps` from their steps on.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay is Decay.steps:
        passed = {int(at): factor for at, factor in schedule.steps.items() if int(at) <= step}
        return passed[max(passed)] if passed else 1.0
    if schedule.decay is Decay.constant:
        return 1.0
    span = max(1, steps - 1 - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / span)
    shape = 1 - done if schedule.decay is Decay.linear else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.final_ratio + (1 - schedule.final_ratio) * shape
