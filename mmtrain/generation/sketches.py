"""What a family that draws by itself draws and says while it is trained.

The same held-out pairs again and again, by the code that evaluation uses: the picture after each
caption, and the caption after each picture. Noise is a hash and text is the likeliest, so nothing
is drawn from a generator that training draws from.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path

from PIL import Image
from torch import Tensor

from mmtrain.data.document import Document, Modality
from mmtrain.data.mixture import Source
from mmtrain.data.picture import draw_rows
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.decoder.sketches import look_of, text_of
from mmtrain.generation.artist import Artist
from mmtrain.models.families import spec_of
from mmtrain.parallel.mesh import Mesh
from mmtrain.settings import Recipe
from mmtrain.train.ema import full_tensors
from mmtrain.trained import Style, Trained, load_layers

log = logging.getLogger(__name__)

_PAIRS = 8  # drawn and captioned at a time
_REACH = 1000  # documents of a source among which pairs are looked for
_NEW_TOKENS = 32  # of a caption

Pair = tuple[Image.Image, str]  # a picture and its caption


@dataclass(frozen=True)
class PairSketcher:
    """Draws captions and describes pictures of held-out pairs; nothing is read before the first.

    Attributes:
        recipe: of the run.
        vocabulary: its tokenizer.
        layout: special ids and pixels.
        sources: held-out ones, or training ones when there are none.
        mesh: this rank's place.
        shapes: full shape of every parameter.
        held: this rank's part of the weights to draw with.
        folder: of the run.
    """

    recipe: Recipe
    vocabulary: Vocabulary
    layout: SequenceFormat
    sources: Sequence[Source]
    mesh: Mesh
    shapes: Mapping[str, tuple[int, ...]]
    held: Callable[[], Mapping[str, Tensor]]
    folder: Path

    def __call__(self, step: int) -> Image.Image | None:
        """`draw_pairs` of the held-out pairs with the weights as they are.

        A collective; rank 0 keeps the page as `samples/step-XXXXXXXX.png` and returns it. None
        under tensor or pipeline ranks.
        """
        dims = self.mesh.dims
        if dims.tensor > 1 or dims.pipeline > 1:
            log.info(
                "step %d draws no pictures: tensor and pipeline ranks hold parts of the model; "
                "evaluate.every_steps with a task of kind draw draws them from checkpoints",
                step,
            )
            return None
        tensors = full_tensors(self.held(), self.shapes, self.mesh)
        if self.mesh.rank != 0 or not self._pairs:
            return None
        page = draw_pairs(self._trained(tensors), self._pairs)
        folder = self.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:08d}.png"
        page.save(path)
        log.info("step %d drew %d pictures: %s", step, len(self._pairs), path)
        return page

    def _trained(self, tensors: Mapping[str, Tensor]) -> Trained:
        spec = spec_of(self.recipe.family, self.recipe.phase)
        model, device = self.recipe.model, self.mesh.device
        layers = load_layers(spec, model, _Whole(tensors), device)
        sampler = spec.sampler(model, layers, self.layout)
        return Trained(self.folder, self.recipe, self.vocabulary, self.layout, sampler)

    @cached_property
    def _pairs(self) -> list[Pair]:
        return find_pairs(self.sources)


def find_pairs(sources: Sequence[Source]) -> list[Pair]:
    """The first pictures with captions, of each source in turn."""
    rows = zip_longest(*(_pairs_of(source) for source in sources))
    return list(islice((pair for row in rows for pair in row if pair is not None), _PAIRS))


def draw_pairs(trained: Trained, pairs: Sequence[Pair]) -> Image.Image:
    """Rows of true picture, caption, what is drawn after it, what is said of the true picture."""
    drawn = Artist(trained, None, Style()).draw([[text] for _, text in pairs])
    said = trained.write([trained.prompt([picture]) for picture, _ in pairs], _NEW_TOKENS)
    rows: list[list[str | Image.Image]] = [
        [picture, f"{text} ->", made, f"| said: {words}"]
        for (picture, text), made, words in zip(pairs, drawn, said, strict=True)
    ]
    return draw_rows(rows, width=720)


@dataclass(frozen=True)
class _Whole:
    """Weights in float32, whatever they are trained in."""

    tensors: Mapping[str, Tensor]

    def get(self, name: str) -> Tensor:
        return self.tensors[name].float()


def _pairs_of(source: Source) -> Iterator[Pair]:
    """Picture and caption of the documents that have one of each."""
    for number in range(min(len(source.lengths), _REACH)):
        document = source.documents.document(number)
        if _is_pair(document):
            yield look_of(document), text_of(document)


def _is_pair(document: Document) -> bool:
    pictures = [part for part in document.parts if part.modality is Modality.image]
    texts = [part for part in document.parts if part.modality is Modality.text and part.text]
    return len(pictures) == 1 and len(pictures[0].media) == 1 and len(texts) > 0
