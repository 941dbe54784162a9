"""A small Emu with weights drawn by name, and packed micro-batches for it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.emu.config import CausalConfig, EmuConfig, LanguageConfig, VisionConfig
from mmtrain.models.emu.golden import pack_rows
from mmtrain.models.emu.model import build_plain, parameters
from mmtrain.models.emu.spec import EMU
from mmtrain.nn.flow import Flow
from mmtrain.nn.init import draw_by_name

QUERIES, SIZE = 4, 28
IDS = {"<s>": 1, "</s>": 2, "[PAD]": 40, "[IMG]": 41, "[/IMG]": 42, "<image>": 43}


def small(**language: object) -> EmuConfig:
    """An Emu of a few ten thousand parameters."""
    sizes: dict[str, object] = {
        "vocabulary": 44,
        "layers": 2,
        "width": 32,
        "heads": 4,
        "mlp_width": 48,
        "context": 128,
    }
    return EmuConfig(
        vision=VisionConfig(image_size=SIZE, layers=2, width=24, heads=2, mlp_width=48),
        causal=CausalConfig(
            queries=QUERIES, layers=2, width=24, heads=2, head_width=12, mlp_width=32
        ),
        language=LanguageConfig(**(sizes | language)),  # type: ignore[arg-type]
    )


def drawn(config: EmuConfig) -> dict[str, nn.Module]:
    """The model with weights drawn by name, ten times larger in the trunk: gradients show."""
    model, rules = build_plain(config), EMU.initial(config)
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            parameter.copy_(draw_by_name(name, tuple(parameter.shape), rules, seed=0))
            if name.startswith(("embed", "blocks", "head.unembed")) and parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def document(seed: int, words: int, images: int) -> list[int]:
    """`<s>`, words with images between them, `</s>`."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 40, (words,), generator=generator).tolist()
    group = [IDS["[IMG]"], *[IDS["<image>"]] * QUERIES, IDS["[/IMG]"]]
    cut = words // 2
    return [IDS["<s>"], *text[:cut], *group * images, *text[cut:], IDS["</s>"]]


def packed(documents: Sequence[list[int]], pixels: Tensor, form: SequenceFormat) -> Flow:
    """Documents in one packed row, with `pixels` for their images in order."""
    length = max(map(len, documents))
    ids = torch.tensor([[*d, *[form.pad] * (length - len(d))] for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (length - len(d)) for d in documents])
    return pack_rows(ids, mask, pixels, form).flow
