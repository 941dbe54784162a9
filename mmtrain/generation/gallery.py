"""Written images shown as the training images that lie nearest: what there is without a decoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmtrain.data import images
from mmtrain.data.document import Document, Modality
from mmtrain.data.shards import open_shards
from mmtrain.settings import SourceConfig
from mmtrain.trained import BATCH, Trained

_CANDIDATES = 512  # training images a written image is compared with
_NEAREST = 5


@dataclass(frozen=True)
class Gallery:
    """Training images and their embeddings `[N, Q, D]`."""

    names: list[str]
    blobs: list[bytes]
    embeddings_NQD: Tensor

    @classmethod
    def of(cls, trained: Trained) -> "Gallery":
        """The first single images of the recipe's sources, embedded by the run."""
        names: list[str] = []
        blobs: list[bytes] = []
        for source, document in illustrated(trained.recipe.data.sources, _CANDIDATES):
            for part in document.parts:
                if part.modality is Modality.image and len(blobs) < _CANDIDATES:
                    names.append(f"{source}/{document.sample_id}")
                    blobs.append(part.media[0])
        rows = []
        with torch.inference_mode():
            for start in range(0, len(blobs), BATCH):
                chunk = blobs[start : start + BATCH]
                pixels = torch.stack([images.decode(blob, trained.layout) for blob in chunk])
                rows.append(trained.sampler.encode(pixels))
        return cls(names, blobs, torch.cat(rows))

    def search(self, embedding_QD: Tensor) -> list[tuple[int, float]]:
        """(index, mean squared error) of the nearest images, nearest first."""
        errors = (self.embeddings_NQD - embedding_QD).float().square().mean((1, 2))
        found = errors.topk(min(_NEAREST, len(self.names)), largest=False)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def picture(self, index: int) -> Image.Image:
        """A training image."""
        return images.open_picture(self.blobs[index])


def illustrated(sources: dict[str, SourceConfig], count: int) -> Iterator[tuple[str, Document]]:
    """Those of the first `count` documents of every source that hold a picture and a text."""
    for name, config in sources.items():
        shards = open_shards(Path(config.path), config.remote)
        for number in range(min(count, len(shards))):
            document = shards.document(number)
            kinds = {part.modality for part in document.parts}
            if Modality.text in kinds and len(kinds) > 1:
                yield name, document
