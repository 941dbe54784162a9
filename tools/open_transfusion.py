"""The open implementation that `bench_transfusion` compares with, and documents in its form."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.data.batch import Batch
from mmtrain.data.tokens import SequenceFormat
from mmtrain.nn.patches import patchify

PATCH, SIZE = 4, 32  # 64 rows of 48 numbers an image
CLIP = 1.0


@dataclass(frozen=True)
class Sizes:
    """What both models have in common."""

    width: int
    layers: int
    heads: int
    vocabulary: int = 256

    @property
    def mlp(self) -> int:
        """Inner width of the gated MLP, as theirs computes it."""
        return int(self.width * 4 * 2 / 3)


def samples_of(batch: Batch, layout: SequenceFormat, patch: int) -> list[list[Tensor]]:
    """Documents of a packed batch as theirs wants them: words `[n]` and latents `[rows, values]`.

    What only marks a document or an image is left out: theirs puts its own marks.
    """
    fields, marks = batch.inputs.fields, torch.tensor(marks_of(layout))
    latents = iter(patchify(batch.inputs.hidden, patch))
    real = fields["tokens"] != layout.pad
    starts = torch.nonzero(fields["positions"][real] == 0).flatten()[1:]
    out = []
    for ids in torch.tensor_split(fields["tokens"][real], starts.tolist()):
        kept = ids[~torch.isin(ids, marks)]
        parts: list[Tensor] = []
        for is_image, run_of in itertools.groupby(kept.tolist(), layout.image_slot.__eq__):
            found = list(run_of)
            if is_image:
                count = len(found) // layout.visual_tokens
                parts += itertools.islice(latents, count)
            else:
                parts.append(torch.tensor(found))
        out.append(parts)
    return out


def units_of(samples: Sequence[Sequence[Tensor]]) -> int:
    """Words and rows of latents."""
    return sum(len(part) for sample in samples for part in sample)


def counted(batch: Batch, layout: SequenceFormat) -> int:
    """The same, counted in our fields: what is neither padding nor a mark."""
    none = torch.tensor([*marks_of(layout), layout.pad])
    return int((~torch.isin(batch.inputs.fields["tokens"], none)).sum())


def marks_of(layout: SequenceFormat) -> list[int]:
    """Tokens around documents and images."""
    return [layout.bos, layout.eos, layout.image_begin, layout.image_end]


class Theirs:
    """`transfusion-pytorch` with an optimizer; `computed` counts positions of its trunk."""

    def __init__(self, sizes: Sizes) -> None:
        """Build it; ImportError where the package is not installed."""
        from transfusion_pytorch import Transfusion

        rows, values = (SIZE // PATCH) ** 2, 3 * PATCH**2
        self.model: Any = Transfusion(
            num_text_tokens=sizes.vocabulary,
            dim_latent=values,
            modality_default_shape=(rows,),
            transformer={
                "dim": sizes.width,
                "depth": sizes.layers,
                "heads": sizes.heads,
                "dim_head": sizes.width // sizes.heads,
            },
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.computed = 0
        self.model.transformer.register_forward_pre_hook(self._count)

    def _count(self, module: object, inputs: tuple[Tensor, ...]) -> None:
        self.computed += inputs[0].shape[0] * inputs[0].shape[1]

    def step(self, parts: Sequence[list[list[Tensor]]]) -> float:
        """One optimizer step over the passes of `parts`; returns the mean loss."""
        total = 0.0
        for samples in parts:
            loss = self.model(samples) / len(parts)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def in_parts(samples: Sequence[list[Tensor]], parts: int) -> list[list[list[Tensor]]]:
    """Samples sorted by length, in `parts` passes of as many samples each (one more or less)."""
    ordered = sorted(samples, key=lambda sample: units_of([sample]))
    edges = [round(len(ordered) * place / parts) for place in range(parts + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(edges) if a < b]
