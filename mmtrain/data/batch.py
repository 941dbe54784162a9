"""One micro-batch: inputs for the first stage, targets for the last.

T packed tokens   N image slots   Q visual tokens an image   P = N * (Q + 1) regression pairs
"""

from dataclasses import dataclass, replace

from torch import Tensor

from mmtrain.nn.flow import Flow


@dataclass(frozen=True)
class Targets:
    """Weights of the unreduced losses that the last layer returns, and where each came from.

    Attributes:
        weights: loss name -> float32 `[T]` or `[P]`; 0 where nothing is to be learned. Raw from
            the loader (1 per counted entry); the engine divides by the global count of the step.
        origins: loss name -> int64, same length: index of the data source (for logging).
    """

    weights: dict[str, Tensor]
    origins: dict[str, Tensor]


@dataclass(frozen=True)
class BatchInfo:
    """Host-side facts of a micro-batch, for logs."""

    pack_numbers: tuple[int, ...]
    sample_ids: tuple[str, ...]
    tokens: int  # real tokens, padding not counted
    images: int  # real images, dummies not counted
    slots: int  # positions, padding included
    step: int = 0  # batches of the run before this one; 0 for held-out ones


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    `inputs.hidden` holds normalised pixels `[N, 3, H, W]` float32. `inputs.fields`, all int64,
    for Emu:
        tokens `[T]`, positions `[T]` (restart at 0 in every document),
        lo, hi `[T]`: keys [lo, hi) that each row sees (padding rows see themselves alone),
        labels `[T]`: the next token to predict, -100 where there is none (weight 0 there),
        slots `[N * Q]`: row of each visual token, T for the slots of dummy images,
        carry `[P]`, source `[P]`: target row and source row of each regression pair (0 for
            dummies),
        noise `[T]`: a number of each row that depends on the document's draw and the position
            in it alone, for dropout.
    """

    inputs: Flow
    targets: Targets
    info: BatchInfo
    pixels: Tensor | None = None  # as decoded, to look at, where `inputs.hidden` holds other things

    def pin_memory(self) -> "Batch":
        """The same batch with its inputs in pinned memory (torch's DataLoader asks for this)."""
        return replace(self, inputs=self.inputs.pin_memory())
