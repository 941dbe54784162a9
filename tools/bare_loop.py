"""The bare loop that `bench_cpu` compares with: transformers' LLaMA, AdamW, clipping, nothing else.

N documents side by side   L length of the longest
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmtrain.data.batch import Batch
from mmtrain.models.emu.config import LanguageConfig
from mmtrain.models.emu.names import LLAMA
from mmtrain.settings import OptimizerConfig


def documents_in(batch: Batch, pad: int) -> list[Tensor]:
    """Token ids of each document of a packed batch."""
    fields = batch.inputs.fields
    real = fields["tokens"] != pad
    starts = torch.nonzero(fields["positions"][real] == 0).flatten()[1:]
    return list(torch.tensor_split(fields["tokens"][real], starts.tolist()))


@dataclass(frozen=True)
class Rows:
    """Documents side by side: ids and labels `[N, L]`, mask None when all have length L."""

    ids: Tensor
    mask: Tensor | None
    labels: Tensor

    @classmethod
    def pad(cls, documents: Sequence[Tensor], pad: int) -> "Rows":
        """Pad each document to the longest."""
        ids = torch.nn.utils.rnn.pad_sequence(list(documents), True, pad)
        mask = ids != pad
        whole = bool(mask.all())
        return cls(ids, None if whole else mask.long(), ids.masked_fill(~mask, -100))


class BareLoop:
    """What one writes first: transformers' LLaMA, AdamW, clipping."""

    def __init__(
        self,
        language: LanguageConfig,
        config: OptimizerConfig,
        trunk: Mapping[str, Tensor],
    ) -> None:
        """A LLaMA of the trunk's size and with its weights.

        Args:
            language: sizes.
            config: the recipe's optimizer section.
            trunk: weights by canonical name; those of the encoders are left out.
        """
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=language.vocabulary,
                hidden_size=language.width,
                intermediate_size=language.mlp_width,
                num_hidden_layers=language.layers,
                num_attention_heads=language.heads,
                max_position_embeddings=language.context,
                rms_norm_eps=language.norm_eps,
                rope_theta=language.rope_theta,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        weights = {n: w.detach().clone() for n, w in trunk.items() if LLAMA.foreign_name(n)}
        self.model.load_state_dict(LLAMA.to_foreign(weights), strict=True)
        self.optimizer = adamw(self.model, config)
        self.clip_norm = config.clip_norm

    def step(self, rows: Rows) -> tuple[float, float]:
        """One optimizer step; returns loss and gradient norm."""
        loss = self.model(rows.ids, attention_mask=rows.mask, labels=rows.labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def adamw(model: LlamaForCausalLM, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Torch's fused AdamW with the recipe's numbers; vectors are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, config.learning_rate, betas, config.eps, fused=True)
