"""A Transfusion small enough to test, and micro-batches of made-up documents."""

import random
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmtrain.data.assemble import TEXT
from mmtrain.data.batch import Batch, BatchInfo, Targets
from mmtrain.data.packed import image_rows, labels_of
from mmtrain.data.tokens import SPECIAL_TOKENS, SequenceFormat
from mmtrain.models.transfusion.config import Edge, ImageConfig, NoiseConfig, TransfusionConfig
from mmtrain.models.transfusion.model import build_plain
from mmtrain.models.transfusion.spec import TRANSFUSION
from mmtrain.nn.flow import Flow
from mmtrain.nn.init import draw_by_name
from mmtrain.nn.noise import row_numbers
from mmtrain.nn.trunk import TrunkConfig

WORDS = 20
IDS = {token: WORDS + index for index, token in enumerate(SPECIAL_TOKENS)}
IMAGE = "image"  # a piece of a document


def small(edge: Edge = Edge.linear, **noise: object) -> TransfusionConfig:
    """Two blocks of width 32, pixels of 8 x 8 in 4 rows an image."""
    image = ImageConfig(channels=3, size=8, factor=1, patch=4, edge=edge)
    if edge is Edge.unet:
        image = replace(
            image, unet_channels=(8, 8, 16), unet_blocks=1, unet_head_width=4, norm_groups=4
        )
    return TransfusionConfig(
        language=TrunkConfig(
            vocabulary=WORDS + len(IDS), layers=2, width=32, heads=4, mlp_width=64, context=64
        ),
        image=image,
        noise=NoiseConfig(**noise),  # type: ignore[arg-type]
    )


def form(config: TransfusionConfig) -> SequenceFormat:
    """Its sequence format."""
    return TRANSFUSION.sequence(config, IDS)


def drawn(config: TransfusionConfig, seed: int = 0, std: float = 0.2) -> dict[str, nn.Module]:
    """A model whose weights are far from 0, so that every part of it matters."""
    model = build_plain(config)
    for layer, module in model.items():
        for name, parameter in module.named_parameters():
            full = f"{layer}.{name}"
            made = draw_by_name(full, tuple(parameter.shape), TRANSFUSION.initial(config), seed)
            if made.dim() > 1 or not bool(made.any()):
                generator = torch.Generator().manual_seed(seed + len(full))
                made = made + std * torch.randn(made.shape, generator=generator) * (
                    made.shape[-1] ** -0.5
                )
            parameter.data = made
    return model


def document(pieces: list[int | str], layout: SequenceFormat) -> list[int]:
    """`<s>`, words and images, `</s>`."""
    group = [layout.image_begin, *[layout.image_slot] * layout.visual_tokens, layout.image_end]
    tokens = [layout.bos]
    for piece in pieces:
        tokens += group if piece == IMAGE else [int(piece)]
    return [*tokens, layout.eos]


def random_pieces(draw: random.Random, longest: int = 6) -> list[int | str]:
    """Words and images in any order; may be empty."""
    return [
        IMAGE if draw.random() < 0.35 else draw.randrange(WORDS)
        for _ in range(draw.randrange(longest + 1))
    ]


def packed(
    documents: list[list[int]],
    pixels: Tensor,
    layout: SequenceFormat,
    *,
    total: int | None = None,
    seeds: list[int] | None = None,
) -> Batch:
    """A micro-batch as the loader makes it: documents one after another, then padding.

    Args:
        documents: tokens of each.
        pixels: `[N, 3, S, S]`; more than there are images stand in for none.
        layout: of the sequences.
        total: T; what the documents take, if left out.
        seeds: noise of each document; its number if left out.
    """
    length = sum(map(len, documents))
    total = length if total is None else total
    row = torch.arange(total)
    fields = {
        "tokens": torch.full((total,), layout.pad),
        "positions": torch.zeros(total, dtype=torch.int64),
        "lo": row.clone(),
        "hi": row + 1,
        "labels": torch.full((total,), -100),
        "noise": torch.zeros(total, dtype=torch.int64),
    }
    begins, start = [], 0
    for number, tokens in enumerate(documents):
        stop = start + len(tokens)
        own = torch.tensor(tokens)
        fields["tokens"][start:stop] = own
        fields["positions"][start:stop] = torch.arange(len(tokens))
        fields["lo"][start:stop] = start
        fields["labels"][start:stop] = labels_of(own, layout)
        seed = number if seeds is None else seeds[number]
        fields["noise"][start:stop] = row_numbers(seed, len(tokens))
        for at, token in enumerate(tokens):
            if token == layout.image_begin:
                begins.append(start + at)
                first = start + at + 1
                if layout.sees_whole_image:
                    last = first + layout.visual_tokens
                    fields["hi"][first:last] = last
        start = stop
    fields |= image_rows(begins, len(pixels), layout.visual_tokens, total)
    real = (torch.arange(len(pixels)) < len(begins)).float()
    pairs = layout.visual_tokens + 1
    return Batch(
        inputs=Flow(pixels, fields),
        targets=Targets(
            weights={
                TEXT: (fields["labels"] != -100).float(),
                "image": real.repeat_interleave(pairs),
            },
            origins={
                TEXT: torch.zeros(total, dtype=torch.int64),
                "image": torch.zeros(len(pixels) * pairs, dtype=torch.int64),
            },
        ),
        info=BatchInfo((0,), (), length, len(begins), total),
    )
