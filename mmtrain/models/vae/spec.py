"""What a VAE in training declares to the platform: sizes, costs, faults, batches.

Any source of documents with images will do; their text is read and not used. An image counts as
three positions, so packs are bounded by `data.pack_images`.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from mmtrain.data.batch import Batch, Targets
from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import Problem
from mmtrain.layout.plan import TensorPlan
from mmtrain.models.pictures import Pictures, an_image_each
from mmtrain.models.spec import BatchShape, ModelSpec, Use
from mmtrain.models.vae.config import VaeConfig
from mmtrain.models.vae.model import (
    ADVERSARIAL,
    CRITIC,
    FIELDS,
    IDENTITY,
    JUDGED,
    LAYER,
    LOSSES,
    PERCEPTUAL,
    SEEDS,
    VaeWithCritic,
    layers,
)
from mmtrain.nn.flow import Flow
from mmtrain.nn.init import InitialRules, torch_defaults
from mmtrain.nn.products import flops_of
from mmtrain.nn.trunk import divides, positive

log = logging.getLogger(__name__)

_ROWS = 1  # of an image between its marks
_UNBOUNDED = 1 << 30


@lru_cache(maxsize=8)
def initial(config: VaeConfig) -> InitialRules:
    """How diffusers draws each parameter: torch's defaults."""
    with torch.device("meta"):
        return torch_defaults(VaeWithCritic(config), LAYER)


def flops(config: VaeConfig, shape: BatchShape) -> list[float]:
    """Forward operations of encoder, decoder and three looks of the critic."""
    return [shape.images * _picture_flops(config)]


@lru_cache(maxsize=8)
def _picture_flops(config: VaeConfig) -> float:
    def run(model: VaeWithCritic) -> None:
        pixels = torch.empty(1, 3, config.size, config.size)
        found = model.decode(model.moments(pixels).chunk(2, 1)[0])
        model.judge(torch.cat([pixels, found, found]))

    return flops_of(lambda: VaeWithCritic(config), run)


def problems(config: VaeConfig, tensor: int) -> Iterator[Problem]:
    """Faults of the `model:` section; more than one stage has no second layer to hold."""
    if tensor > 1:
        yield Problem(
            "parallel.tensor",
            f"found {tensor}; a VAE is trained data parallel: use 1, and ZeRO 1 to 3",
        )
    yield from positive("model", config)
    yield from positive("model.critic", replace(config.critic, from_step=1))
    if config.critic.from_step < 0:
        yield Problem(
            "model.critic.from_step", f"found {config.critic.from_step}; allowed: 0 or more"
        )
    if not config.channels or min(config.channels) <= 0:
        yield Problem("model.channels", f"found {list(config.channels)}; wanted: positive numbers")
        return
    for key, told in (
        ("encoder_attends", config.encoder_attends),
        ("decoder_attends", config.decoder_attends),
    ):
        if len(told) != len(config.channels):
            yield Problem(
                f"model.{key}",
                f"{len(told)} levels, model.channels has {len(config.channels)}; say true or false "
                "for each level",
            )
    odd = [width for width in config.channels if width % max(config.norm_groups, 1)]
    if odd:
        yield Problem(
            "model.norm_groups",
            f"{config.norm_groups} does not divide model.channels {odd}; use a divisor of "
            f"{math.gcd(*config.channels)}",
        )
    critic = config.critic
    yield from divides(
        "model.critic.channels", 2 * critic.channels, "norm_groups", critic.norm_groups
    )
    if config.size % config.factor:
        yield Problem(
            "model.size",
            f"{config.size} cannot be halved {len(config.channels) - 1} times, once for every "
            f"level of model.channels but the last; use a multiple of {config.factor}",
        )
    # two convolutions of four pixels stand behind the halvings, and each takes one pixel away
    if config.size // 2 ** max(critic.layers, 0) < 3:
        yield Problem(
            "model.critic.layers",
            f"{critic.layers} leave no patch of {config.size} pixels (model.size); use fewer",
        )
    if config.lpips is not None and config.vgg is None:
        yield Problem(
            "model.lpips", f"found {config.lpips} without model.vgg, whose channels it weighs"
        )


def missing(config: VaeConfig) -> Iterator[Problem]:
    """Weights of frozen networks that are not there."""
    for key in ("vgg", "lpips", "moco"):
        path = getattr(config, key)
        if path is not None and not Path(path).is_file():
            yield Problem(
                f"model.{key}", f"there is no file {path}; or null, which leaves the loss out"
            )


class Judging:
    """Micro-batches of the loader as pictures, with one weight a picture for every loss."""

    def __init__(
        self, config: VaeConfig, layout: SequenceFormat, device: torch.device, use: Use
    ) -> None:
        """Say which losses are left out.

        Args:
            config: of the model.
            layout: of its sequences.
            device: not used; nothing is frozen outside the layer.
            use: the critic is not asked of held-out pictures.
        """
        self.from_step, self.use = config.critic.from_step, use
        self._absent = {PERCEPTUAL} if config.vgg is None else set()
        self._absent |= {IDENTITY} if config.moco is None else set()
        if use is Use.training and config.vgg is None:
            log.warning("the loss `perceptual` is LEFT OUT: model.vgg names no weights of VGG-16")
        if use is Use.training and config.moco is None:
            log.warning("the loss `identity` is LEFT OUT: model.moco names no weights of MoCo-v2")

    def __call__(self, batch: Batch) -> Batch:
        """`inputs.hidden` stays; its fields become `FIELDS`, and weights are of pictures."""
        pictures = Pictures.of(batch.inputs.fields, _ROWS)
        judged = self.use is Use.training and batch.info.step >= self.from_step
        silent = self._absent | (set() if judged else {ADVERSARIAL, CRITIC})
        counts_N = pictures.real_N.float()
        origins_N = an_image_each(batch.targets.origins["image"], len(counts_N))
        fields = {SEEDS: pictures.seeds_N, JUDGED: torch.tensor([int(judged)])}
        return replace(
            batch,
            inputs=Flow(batch.inputs.hidden, {name: fields[name] for name in FIELDS}),
            targets=Targets(
                weights={
                    name: torch.zeros_like(counts_N) if name in silent else counts_N
                    for name in LOSSES
                },
                origins=dict.fromkeys(LOSSES, origins_N),
            ),
            pixels=batch.inputs.hidden,
        )


def sequence(config: VaeConfig, ids: Mapping[str, int]) -> SequenceFormat:
    """Pictures are cropped to squares in -1..1."""
    return SequenceFormat.of(
        ids,
        visual_tokens=_ROWS,
        image_size=config.size,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        crops_images=True,
    )


VAE = ModelSpec(
    name="vae",
    config_type=VaeConfig,
    problems=problems,
    layers=layers,
    plan=TensorPlan({}),
    initial=initial,
    flops=flops,
    losses=LOSSES,
    fields=FIELDS,
    sequence=sequence,
    context=lambda config: _UNBOUNDED,  # text is read and not used
    vocabulary=lambda config: _UNBOUNDED,
    prepare=Judging,
    missing=missing,
)
