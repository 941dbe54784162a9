"""A model that writes images and a visual decoder that draws them.

The frozen model writes the visual rows of an image after a prompt; the decoder run, trained on
such rows, turns them into a picture (Emu, arXiv:2307.05222, section 2.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from mmtrain.prompts import Row
from mmtrain.trained import Trained, load_run

_BATCH = 32  # pictures drawn at a time


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a decoder draws.

    Attributes:
        scheduler: pndm (as released), ddim or dpm.
        steps: of the scheduler.
        guidance: unconditional + guidance * (conditional - unconditional); 1 = no guidance.
        seed: of the first picture; the k-th of a call is drawn from a seed of its own.
    """

    scheduler: str = "pndm"
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0


class Drawer(Protocol):
    """What turns visual rows into pictures."""

    def draw(
        self,
        embeddings_BQD: Tensor,
        *,
        null_QD: Tensor,
        scheduler: str,
        steps: int,
        guidance: float,
        seeds: Sequence[int],
    ) -> list[Image.Image]:
        """One picture for each embedding, from a seed of its own."""


@dataclass(frozen=True)
class Artist:
    """A writer of visual rows, and what draws them, if anything does."""

    trained: Trained
    drawer: Drawer | None
    style: Style

    @classmethod
    def load(
        cls, run: Path, decoder: Path | None, checkpoint: str | None, style: Style
    ) -> "Artist":
        """Read a run and, when one is named, a decoder run."""
        return cls(load_run(run, checkpoint), None, style)

    def draw(self, rows: Sequence[Row]) -> list[Image.Image]:
        """The picture that follows each prompt."""
        embeddings_BQD = self.trained.rollout([self.trained.prompt(row) for row in rows])
        return self.pictures(embeddings_BQD, 0)

    def pictures(self, embeddings_BQD: Tensor, first: int) -> list[Image.Image]:
        """Pictures number `first` and on of a call, one for each embedding."""
        assert self.drawer is not None
        out: list[Image.Image] = []
        for start in range(0, len(embeddings_BQD), _BATCH):
            chunk = embeddings_BQD[start : start + _BATCH]
            seeds = [self.style.seed + first + start + k for k in range(len(chunk))]
            out += self.drawer.draw(
                chunk,
                null_QD=self.null_QD,
                scheduler=self.style.scheduler,
                steps=self.style.steps,
                guidance=self.style.guidance,
                seeds=seeds,
            )
        return out

    @cached_property
    def null_QD(self) -> Tensor:
        """The rows of no prompt: the model's own after <s> alone."""
        return self.trained.rollout([self.trained.prompt([])])[0]
