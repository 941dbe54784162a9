"""Transfusion (Zhou et al. 2024, arXiv:2408.11039) as a list of named layers.

Noisy latents -> image -> embed -> blocks.* -> head. Text rows are looked up, image rows come from
the edge; the head gives the cross-entropy of text and the squared error of what the edge answers.
What the answer should have been travels beside the trunk (`Flow.carried`), so that the last stage
of a pipeline has it; a U-Net edge sends its skips the same way.

T tokens   D width   V vocabulary   N images   n rows an image   C channels, h x w size of latents
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mmtrain.models.spec import Layer
from mmtrain.models.transfusion.config import ImageConfig, TransfusionConfig
from mmtrain.models.transfusion.edges import (
    as_rows,
    beside_numbers,
    edge_in,
    edge_out,
    rows_of,
)
from mmtrain.nn.embed import SplicedEmbedding
from mmtrain.nn.flow import Flow
from mmtrain.nn.lora import LoraConfig
from mmtrain.nn.norm import RMSNorm
from mmtrain.nn.objectives import TokenCrossEntropy
from mmtrain.nn.trunk import TrunkConfig, trunk_block

TIMES = "times"  # integer field `[N]`: the time of each image


class Grid(nn.Module):
    """Where a row of an image lies: a learned vector of its line plus one of its column."""

    def __init__(self, side: int, width: int) -> None:
        """Allocate two tables `[side, width]`."""
        super().__init__()
        self.lines = nn.Parameter(torch.zeros(side, width))
        self.columns = nn.Parameter(torch.zeros(side, width))

    def forward(self, rows_NnD: Tensor) -> Tensor:
        """Add them, in raster order."""
        return rows_NnD + (self.lines[:, None] + self.columns).flatten(0, 1)


class ImageIn(nn.Module):
    """Noisy latents to image rows; wanted answers and the edge's other half beside them."""

    def __init__(self, config: TransfusionConfig) -> None:
        """Allocate the edge."""
        super().__init__()
        image, self.width = config.image, config.language.width
        self.copies = config.copies
        self.edge = edge_in(image, self.width)
        told = image.tables_std is not None
        self.grid: nn.Module = Grid(image.side, self.width) if told else nn.Identity()

    def forward(self, flow: Flow) -> Flow:
        """`hidden [N, 2C, h, w]`, noisy and wanted, to `hidden [N n, D]` and `carried [N r, D]`.

        With copies the clean latents stand behind these two, and their rows, of time 0, behind the
        noised ones of each image.
        """
        noisy, wanted, *clean = flow.hidden.chunk(1 + self.copies, 1)
        times_N = flow.fields[TIMES]
        rows, beside = self.rows(noisy, times_N)
        carried = as_rows([wanted.to(beside.dtype), beside], self.width)
        copied = [self.rows(latents, torch.zeros_like(times_N))[0] for latents in clean]
        hidden = torch.cat([rows, *copied], 1).flatten(0, 1)
        return Flow(hidden, flow.fields, carried, flow.derived)

    def rows(self, latents: Tensor, times_N: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `[N, n, D]` of latents `[N, C, h, w]`, and what the edge's other half needs."""
        rows, beside = self.edge(latents, times_N)
        return self.grid(rows), beside


class TransfusionHead(nn.Module):
    """Final norm, language head, the edge's other half and both losses."""

    def __init__(self, config: ImageConfig, language: TrunkConfig, copies: int) -> None:
        """Allocate both heads; the language head has no bias."""
        super().__init__()
        self.copies = copies
        self.shape = (config.channels, config.size, config.size)
        self.wanted = config.values * config.rows
        self.numbers = self.wanted + beside_numbers(config)
        self.norm = RMSNorm(language.width, language.norm_eps)
        self.enter = nn.Identity()
        self.unembed = nn.Linear(language.width, language.vocabulary, bias=False)
        self.edge = edge_out(config, language.width)
        self.cross_entropy = TokenCrossEntropy()

    def forward(self, flow: Flow) -> dict[str, Tensor]:
        """Unreduced float32 losses: `text [T]` (0 without a label), `image [N]` (mean of C, h, w).

        Images without a row, which stand in for none, answer from row 0 and have weight 0.
        """
        assert flow.carried is not None, "the image layer carries the wanted answers"
        hidden_TD = self.enter(self.norm(flow.hidden))
        slots, count = flow.fields["slots"], len(flow.fields[TIMES])
        slots = torch.where(slots < len(hidden_TD), slots, 0)
        width = flow.carried.shape[-1]
        carried = flow.carried.reshape(count, rows_of(self.numbers, width) * width)
        wanted, beside = carried[:, : self.wanted], carried[:, self.wanted : self.numbers]
        noised = slots.view(count, self.copies, -1)[:, 0]
        answer = self.edge(hidden_TD[noised], beside)
        error = answer.float() - wanted.detach().view(count, *self.shape).float()
        return {
            "text": self.cross_entropy(self.unembed(hidden_TD), flow.fields["labels"]),
            "image": error.square().mean((1, 2, 3)),
        }

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Language logits `[T, V]` of trunk rows (before the final norm)."""
        out: Tensor = self.unembed(self.enter(self.norm(hidden_TD)))
        return out

    def answered(self, hidden_NnD: Tensor, beside: Tensor) -> Tensor:
        """The answer `[N, C, h, w]` of trunk rows (before the final norm)."""
        out: Tensor = self.edge(self.enter(self.norm(hidden_NnD)), beside)
        return out


def layers(config: TransfusionConfig) -> list[Layer]:
    """The whole model in order; nothing is allocated until a layer's `build` is called."""
    language = config.language
    return [
        Layer("image", partial(ImageIn, config)),
        Layer("embed", partial(SplicedEmbedding, language.vocabulary, language.width)),
        *(
            Layer(f"blocks.{i}", partial(trunk_block, language, LoraConfig(), f"blocks.{i}"))
            for i in range(language.layers)
        ),
        Layer("head", partial(TransfusionHead, config.image, language, config.copies)),
    ]


def build_plain(
    config: TransfusionConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, nn.Module]:
    """Build every layer on one device, in order of the fold; weights are torch's defaults."""
    with torch.device(device):
        return {layer.name: layer.build().to(dtype) for layer in layers(config)}


def losses(model: Mapping[str, nn.Module], inputs: Flow) -> dict[str, Tensor]:
    """Fold the whole list over one micro-batch."""
    flow = inputs
    *body, head = model.values()
    for layer in body:
        flow = layer(flow)
    values: dict[str, Tensor] = head(flow)
    return values
