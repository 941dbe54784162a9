"""Emu (Sun et al. 2023, arXiv:2307.05222) as a list of named layers; its forward is their fold.

Pixels -> vision.stem -> vision.blocks.* -> vision_norm -> causal -> embed -> blocks.* -> head.
Everything here is single-device PyTorch; `spec.PLAN` says how tensor ranks share it.

T tokens   D width   V vocabulary   P = N * (Q + 1) regression pairs
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mmtrain.encoders.causal_transformer import CausalTransformer
from mmtrain.encoders.eva_clip import PatchStem, VisionBlock, VisionNorm
from mmtrain.models.emu.config import (
    CausalConfig,
    EmuConfig,
    LanguageConfig,
    VisionConfig,
)
from mmtrain.models.spec import Layer
from mmtrain.nn.embed import SplicedEmbedding
from mmtrain.nn.flow import Flow
from mmtrain.nn.norm import RMSNorm
from mmtrain.nn.objectives import TokenCrossEntropy
from mmtrain.nn.trunk import trunk_block

VISION_NORM_EPS = 1e-6  # ln_visual; not the tower's own setting


class EmuHead(nn.Module):
    """Final norm, language head, regression head and both losses (labels are fields of the flow).

    Each [IMG] or visual row predicts the embedding that was fed to the trunk at the next position:
    Q + 1 pairs an image, the last one the [/IMG] token. Targets are detached, inputs are not.
    """

    def __init__(self, *, vocabulary: int, width: int, norm_eps: float) -> None:
        """Allocate both heads, without biases."""
        super().__init__()
        self.norm = RMSNorm(width, norm_eps)
        self.enter = nn.Identity()
        self.unembed = nn.Linear(width, vocabulary, bias=False)
        self.regress = nn.Linear(width, width, bias=False)
        self.cross_entropy = TokenCrossEntropy()

    def forward(self, flow: Flow) -> dict[str, Tensor]:
        """Unreduced float32 losses: `text [T]` (0 without a label), `image [P]` (mean over D)."""
        assert flow.carried is not None, "the embed layer carries the regression targets"
        hidden_TD = self.enter(self.norm(flow.hidden))
        predicted_PD = self.regress(hidden_TD[flow.fields["source"]])
        error_PD = predicted_PD.float() - flow.carried.detach().float()
        return {
            "text": self.cross_entropy(self.unembed(hidden_TD), flow.fields["labels"]),
            "image": error_PD.square().mean(-1),
        }

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Language logits `[T, V]` of trunk rows (before the final norm)."""
        out: Tensor = self.unembed(self.enter(self.norm(hidden_TD)))
        return out

    def regressed(self, hidden_TD: Tensor) -> Tensor:
        """Predicted next embedding `[T, D]` of trunk rows (before the final norm)."""
        out: Tensor = self.regress(self.enter(self.norm(hidden_TD)))
        return out


def layers(config: EmuConfig) -> list[Layer]:
    """The whole model in order; nothing is allocated until a layer's `build` is called."""
    vision, causal, language = config.vision, config.causal, config.language
    return [
        Layer("vision.stem", partial(_stem, vision)),
        *(
            Layer(f"vision.blocks.{i}", partial(_vision_block, vision))
            for i in range(vision.layers)
        ),
        Layer("vision_norm", partial(VisionNorm, vision.width, VISION_NORM_EPS)),
        Layer("causal", partial(_causal, causal, vision.width, language.width)),
        Layer("embed", partial(SplicedEmbedding, language.vocabulary, language.width)),
        *(
            Layer(f"blocks.{i}", partial(trunk_block, language, config.lora, f"blocks.{i}"))
            for i in range(language.layers)
        ),
        Layer("head", partial(_head, language)),
    ]


def build_plain(
    config: EmuConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """Build every layer on one device, in order of the fold; weights are torch's defaults.

    Use `parameters` for the canonical names, and fill them from a checkpoint or by
    `nn.init.draw_by_name`.
    """
    with torch.device(device):
        return {layer.name: layer.build().to(dtype) for layer in layers(config)}


def parameters(model: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter by canonical name."""
    return {
        f"{layer}.{name}": parameter
        for layer, module in model.items()
        for name, parameter in module.named_parameters()
    }


def losses(model: Mapping[str, nn.Module], inputs: Flow) -> dict[str, Tensor]:
    """Fold the whole list over one micro-batch."""
    flow = inputs
    *body, head = model.values()
    for layer in body:
        flow = layer(flow)
    values: dict[str, Tensor] = head(flow)
    return values


def _stem(config: VisionConfig) -> nn.Module:
    return PatchStem(tokens=config.tokens, patch_size=config.patch_size, width=config.width)


def _vision_block(config: VisionConfig) -> nn.Module:
    return VisionBlock(
        width=config.width,
        heads=config.heads,
        mlp_width=config.mlp_width,
        norm_eps=config.norm_eps,
    )


def _causal(config: CausalConfig, memory_width: int, output_width: int) -> nn.Module:
    return CausalTransformer(
        queries=config.queries,
        layers=config.layers,
        width=config.width,
        memory_width=memory_width,
        heads=config.heads,
        head_width=config.head_width,
        mlp_width=config.mlp_width,
        output_width=output_width,
        relative_buckets=config.relative_buckets,
        relative_distance=config.relative_distance,
        norm_eps=config.norm_eps,
    )


def _head(config: LanguageConfig) -> nn.Module:
    return EmuHead(vocabulary=config.vocabulary, width=config.width, norm_eps=config.norm_eps)
