"""What a visual decoder draws while it is trained: the same held-out captions again and again."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmtrain.data.document import Document, Modality
from mmtrain.data.images import open_picture
from mmtrain.data.mixture import OnePass, Source
from mmtrain.data.pairs import picture_of
from mmtrain.data.picture import draw_rows
from mmtrain.decoder.conditions import Samples
from mmtrain.decoder.drawers import make_drawer
from mmtrain.parallel.mesh import Mesh
from mmtrain.train.ema import full_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A held-out caption, its picture, and its condition `[Q, D]`."""

    text: str
    picture: Image.Image
    condition_QD: Tensor


class Sketcher:
    """Draws the same held-out captions again and again while a decoder is trained."""

    def __init__(
        self,
        samples: Samples,
        sources: list[Source],
        mesh: Mesh,
        shapes: Mapping[str, tuple[int, ...]],
        held: Callable[[], Mapping[str, Tensor]],
        folder: Path,
    ) -> None:
        """Nothing is read before the first sketch.

        Args:
            samples: the run's data and frozen models.
            sources: held-out ones, or training ones when there are none.
            mesh: this rank's place.
            shapes: full shape of every parameter.
            held: this rank's part of the weights to draw with.
            folder: where pictures are kept.
        """
        self._samples, self._sources, self._mesh = samples, sources, mesh
        self._shapes, self._held, self._folder = shapes, held, folder

    def __call__(self, step: int) -> Image.Image | None:
        """Captions, their pictures, and what is drawn after them; on rank 0, a collective."""
        tensors = full_tensors(self._held(), self._shapes, self._mesh)
        if self._mesh.rank != 0:
            return None
        samples, subjects = self._samples, self._subjects
        style = samples.config.draw
        drawer = make_drawer(tensors, samples.sizes, samples.config, samples.vae, samples.device)
        drawn = drawer.draw(
            torch.stack([subject.condition_QD for subject in subjects]),
            null_QD=samples.null_QD,
            scheduler=style.scheduler.value,
            steps=style.steps,
            guidance=style.guidance,
            seeds=list(range(len(subjects))),
        )
        page = draw_rows(
            [
                [subject.picture, "->", picture, subject.text]
                for subject, picture in zip(subjects, drawn, strict=True)
            ],
            width=520,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:08d}.png"
        page.save(path)
        log.info("step %d drew %d pictures: %s", step, len(drawn), path)
        return page

    @cached_property
    def _subjects(self) -> list[Subject]:
        wanted, found = self._samples.config.draw.pictures, list[Subject]()
        for source in self._sources:
            share = -(-wanted // len(self._sources))
            found += self._of(source, min(share, wanted - len(found)))
        return found

    def _of(self, source: Source, count: int) -> list[Subject]:
        assembler = self._samples.assembler([source], drop=0.0)
        reach = min(len(source.lengths), 8 * count)  # not every document is a pair
        planned = self._samples.plan(OnePass(source)).pairs(0, reach)[:count]
        found, _ = assembler.read(planned)
        if not found:
            return []
        pairs = assembler.merge(found, tuple(range(len(found))))
        known = pairs.known or self._samples.frozen.know(pairs)
        documents = [source.documents.document(item.number) for item in planned]
        return [
            Subject(text_of(document), look_of(document), condition_QD)
            for document, condition_QD in zip(documents, known.conditions, strict=True)
        ]


def text_of(document: Document) -> str:
    """All text of a document."""
    return " ".join(part.text for part in document.parts if part.modality is Modality.text)


def look_of(document: Document) -> Image.Image:
    """The first picture of a document."""
    return open_picture(picture_of(document))
