"""Comparison of this Emu with a folder of recorded reference numbers.

The folder holds a tiny random-weight instance of the released implementation with its inputs and
outputs (its README lists every tensor). Weights come in through the name map; the padded batch of
the folder is packed into one row, so what is checked is the path that training takes.

B rows of the folder's batch   L padded length   T packed rows   D width   P regression pairs
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmtrain.data.tokens import SequenceFormat
from mmtrain.errors import MissingError
from mmtrain.models.emu.config import CausalConfig, EmuConfig, LanguageConfig, VisionConfig
from mmtrain.models.emu.model import build_plain, parameters
from mmtrain.models.emu.names import RELEASE, without_peft
from mmtrain.models.emu.spec import sequence
from mmtrain.models.writing import Prompt
from mmtrain.nn.flow import Flow
from mmtrain.nn.lora import LoraConfig
from mmtrain.nn.masks import Intervals
from mmtrain.nn.objectives import IGNORED

_FILES = (
    "config.json",
    "weights.safetensors",
    "io.safetensors",
    "grad_norms.json",
    "rollout.safetensors",
    "instruct_weights.safetensors",
    "instruct_io.safetensors",
)


@dataclass(frozen=True)
class Comparison:
    """One recorded quantity against ours.

    Attributes:
        quantity: name in the folder.
        error: largest difference; for ids and masks the number of entries that differ.
        limit: largest error allowed.
    """

    quantity: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the limit."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Golden:
    """A folder of recorded numbers, read when asked for."""

    folder: Path

    def __post_init__(self) -> None:
        """Find every file before any work is done.

        Raises:
            MissingError: files of the folder are missing.
        """
        missing = [name for name in _FILES if not (self.folder / name).is_file()]
        if missing:
            raise MissingError(f"{self.folder}: {', '.join(missing)} not found")

    @cached_property
    def description(self) -> dict[str, Any]:
        """`config.json`."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """Inputs, intermediates and gradients of one training batch."""
        return load_file(self.folder / "io.safetensors")

    @cached_property
    def generation(self) -> dict[str, Tensor]:
        """Rollouts, written text, ranking."""
        return load_file(self.folder / "rollout.safetensors")

    @cached_property
    def instruct(self) -> dict[str, Tensor]:
        """Inputs and outputs of the instruct model."""
        return load_file(self.folder / "instruct_io.safetensors")

    @cached_property
    def gradient_norms(self) -> dict[str, Any]:
        """`grad_norms.json`."""
        found: dict[str, Any] = json.loads((self.folder / "grad_norms.json").read_text())
        return found

    def config(self, vocabulary: int) -> EmuConfig:
        """The folder's sizes as an `EmuConfig`."""
        vision, causal, language = (self.description[k] for k in ("vision", "cformer", "llm"))
        return EmuConfig(
            vision=VisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                layers=vision["layers"],
                width=vision["width"],
                heads=vision["heads"],
                mlp_width=vision["mlp_hidden"],
                norm_eps=vision["layer_norm_eps"],
            ),
            causal=CausalConfig(
                queries=causal["n_causal"],
                layers=causal["num_layers"],
                width=causal["d_model"],
                heads=causal["num_heads"],
                head_width=causal["d_kv"],
                mlp_width=causal["d_ff"],
                relative_buckets=causal["relative_attention_num_buckets"],
                relative_distance=causal["relative_attention_max_distance"],
                norm_eps=causal["layer_norm_epsilon"],
            ),
            language=LanguageConfig(
                vocabulary=vocabulary,
                layers=language["num_hidden_layers"],
                width=language["hidden_size"],
                heads=language["num_attention_heads"],
                mlp_width=language["intermediate_size"],
                norm_eps=language["rms_norm_eps"],
                rope_theta=language["rope_theta"],
                context=language["max_position_embeddings"],
            ),
        )

    def form(self) -> SequenceFormat:
        """Special ids and image size."""
        vision, language = self.description["vision"], self.description["llm"]
        form = sequence(self.config(language["vocab_size"]), self.description["special_tokens"])
        mean, std = tuple(vision["image_mean"]), tuple(vision["image_std"])
        return replace(form, image_mean=mean, image_std=std)

    def pretrained(self) -> dict[str, nn.Module]:
        """The pretrain model with the folder's weights."""
        weights = load_file(self.folder / "weights.safetensors")
        return load_release(self.config(self.description["llm"]["vocab_size"]), weights)

    @cached_property
    def instruct_weights(self) -> dict[str, Tensor]:
        """The LoRA-wrapped instruct model's state dict."""
        return load_file(self.folder / "instruct_weights.safetensors")

    def instructed(self) -> dict[str, nn.Module]:
        """The instruct model, adapters beside the weights of the folder."""
        weights = {without_peft(name): t for name, t in self.instruct_weights.items()}
        config = self.config(self.description["instruct"]["vocab_size"])
        return load_release(replace(config, lora=self.adapters), weights)

    @property
    def adapters(self) -> LoraConfig:
        """Rank, alpha and targets of the instruct model; recorded without dropout."""
        told = self.description["instruct"]
        names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
        return LoraConfig(
            rank=told["lora_r"],
            alpha=told["lora_alpha"],
            dropout=0.0,
            targets=tuple(names[name] for name in told["target_modules"]),
        )

    def pixels(self, index: Tensor) -> Tensor | None:
        """The named images, or None when there are none."""
        return self.batch["in.images"][index] if len(index) else None


def load_release(config: EmuConfig, weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Build the plain layers and fill them with a release's state dict."""
    model = build_plain(config, "meta")
    shapes = {name: parameter.shape for name, parameter in parameters(model).items()}
    tensors = RELEASE.to_canonical(weights, expected=shapes)
    for layer, module in model.items():
        mine = {
            name.removeprefix(f"{layer}."): tensors[name].clone()
            for name in shapes
            if name.startswith(f"{layer}.")
        }
        module.load_state_dict(mine, assign=True)
    return model


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Padded rows of a folder laid one after another, and where each packed row came from."""

    flow: Flow
    labels_BL: Tensor  # before the shift, -100 where ignored
    source_BL: Tensor  # boolean: this hidden state predicts the next embedding
    target_BL: Tensor  # boolean: this embedding is predicted
    real_BL: Tensor  # boolean: not padding


def pack_rows(ids_BL: Tensor, mask_BL: Tensor, pixels: Tensor, form: SequenceFormat) -> PackedRows:
    """Pack right-padded rows by the rules of the release: one fold's input flow.

    Labels are the next id, except that padding, <image>, [IMG] and [/IMG] are never predicted.
    """
    real_BL = mask_BL.bool()
    ignored = torch.tensor([form.pad, form.image_slot, form.image_begin, form.image_end])
    labels_BL = torch.where(torch.isin(ids_BL, ignored), IGNORED, ids_BL)
    source_BL = torch.isin(ids_BL, torch.tensor([form.image_begin, form.image_slot]))
    target_BL = torch.isin(ids_BL, torch.tensor([form.image_slot, form.image_end]))
    next_BL = torch.nn.functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)
    segments_BL = torch.arange(len(ids_BL))[:, None].expand_as(ids_BL)
    positions_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
    intervals = Intervals.causal_packed(segments_BL[real_BL])
    tokens_T = ids_BL[real_BL]
    fields = {
        "tokens": tokens_T,
        "positions": positions_BL[real_BL],
        "lo": intervals.lo_T,
        "hi": intervals.hi_T,
        "labels": next_BL[real_BL],
        "slots": (tokens_T == form.image_slot).nonzero().squeeze(-1),
        "carry": target_BL[real_BL].nonzero().squeeze(-1),
        "source": source_BL[real_BL].nonzero().squeeze(-1),
    }
    return PackedRows(Flow(pixels, fields), labels_BL, source_BL, target_BL, real_BL)


def compare(quantity: str, ours: Tensor, recorded: Tensor, limit: float) -> Comparison:
    """Largest absolute difference; for integers the number of entries that differ.

    Tensors of different shapes are infinitely far apart.
    """
    if ours.shape != recorded.shape:
        shapes = f"{tuple(ours.shape)}, recorded {tuple(recorded.shape)}"
        return Comparison(f"{quantity}: shape {shapes}", math.inf, limit)
    if not recorded.is_floating_point():
        return Comparison(quantity, float((ours != recorded).sum()), limit)
    difference = (ours.detach().double() - recorded.double()).abs()
    return Comparison(quantity, float(difference.max()) if recorded.numel() else 0.0, limit)


def prompts_of(golden: Golden, tensors: Mapping[str, Tensor], prefix: str) -> list[Prompt]:
    """The prompts `<prefix>.prompt_ids`, padding removed, each with its images in order."""
    form = golden.form()
    ids, index = tensors[f"{prefix}.prompt_ids"], tensors[f"{prefix}.image_index"]
    mask = tensors.get(f"{prefix}.prompt_mask", torch.ones_like(ids)).bool()
    prompts, used = [], 0
    for row, real in zip(ids, mask, strict=True):
        tokens = tuple(row[real].tolist())
        images = tokens.count(form.image_slot) // form.visual_tokens
        prompts.append(Prompt(tokens, golden.pixels(index[used : used + images])))
        used += images
    return prompts


def padded(rows: list[list[int]], length: int, pad: int) -> Tensor:
    """Written ids as the folder stores them: `[B, length]`, `pad` after </s>."""
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])
