"""Pictures with their texts, one at a time: what a visual decoder is trained on.

The plan is that of packs (`data.pack`) with one document in each: order, shares of data ranks and
resuming are the same. Which noise a sample meets, how much of it, and whether its condition is
dropped are drawn from (seed, epoch, source, sample id), so every layout and every resumed run see
the same. Worker processes read, decode and draw; what needs the frozen models happens in the rank.

N samples   S pixels a side   V pixels a side of the vision tower   Q rows a picture, D wide
C channels, h x w size of what is diffused
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmtrain.data import images
from mmtrain.data.assemble import Failure, Made, failure_of, planned_of, tokenize
from mmtrain.data.batch import BatchInfo
from mmtrain.data.choices import Packing
from mmtrain.data.document import Document, Modality, SampleError
from mmtrain.data.latents import Known, KnownSource
from mmtrain.data.mixture import Cursor, Draws, Source
from mmtrain.data.pack import PackPlan, Plan, PlannedDocument
from mmtrain.data.rules import Draw, TextPiece
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary

Square = Callable[[Image.Image, int], Image.Image]  # makes a picture a square of so many pixels


class PairPlan(Plan):
    """A plan with one picture and its text in every pack; other documents are left out."""

    def __init__(
        self,
        draws: Draws,
        *,
        group_length: int,
        pack_tokens: int,
        longest_text: int,
        window_documents: int,
        seed: int,
        step_packs: int = 1,
        first_step: int = 0,
    ) -> None:
        """Plan pairs of `draws`.

        Args:
            draws: the order of documents.
            group_length: positions of one image.
            pack_tokens: positions of a document at most.
            longest_text: tokens; documents with more are left out; 0 = no limit.
            window_documents: documents planned together.
            seed: of everything that is drawn.
            step_packs: pairs of one optimizer step.
            first_step: the plan begins with its pairs.
        """
        super().__init__(
            draws,
            group_length=group_length,
            pack_tokens=pack_tokens,
            pack_images=1,
            window_documents=window_documents,
            seed=seed,
            packing=Packing.pad,
            step_packs=step_packs,
            first_step=first_step,
        )
        self._longest_text = longest_text

    def pairs(self, start: int, stop: int) -> list[PlannedDocument]:
        """The pairs among draws [start, stop), in order."""
        drawn = islice(self.draws.draw(Cursor(start), 0, self.cost), stop - start)
        documents = [self._choose(item)[0] for item, _ in drawn]
        return [document for document in documents if document and self._is_pair(document)]

    def _arrange(
        self, documents: list[PlannedDocument], window: int
    ) -> list[tuple[PlannedDocument, ...]]:
        return [(document,) for document in documents if self._is_pair(document)]

    def _is_pair(self, planned: PlannedDocument) -> bool:
        pieces = planned.selection.pieces
        if planned.selection.images != 1 or not any(isinstance(p, TextPiece) for p in pieces):
            return False
        return not self._longest_text or self._text_tokens(planned) <= self._longest_text

    def _text_tokens(self, planned: PlannedDocument) -> int:
        lengths = self.draws.sources[planned.source].lengths.document(planned.number)
        return sum(part.size for part in lengths.parts if part.modality is Modality.text)


@dataclass(frozen=True)
class Pairs:
    """A micro-batch before the frozen models have seen it.

    Attributes:
        prompts: ids of each text, `<s>` first.
        pixels: float32 `[N, 3, S, S]` in -1..1; None where latents are known.
        seen: float32 `[N, 3, V, V]` for the vision tower; None where nothing looks.
        known: conditions and latents that were made before, or None.
        noise: standard normal, float32 `[N, 2, C, h, w]`: to be mixed in, and for drawing latents.
        timesteps_N: int64, how much noise.
        dropped_N: bool, whether the condition is dropped.
        weights_N: float32, 0 for samples that could not be read and for padding.
        origins_N: int64, the data source.
        info: for logs.
    """

    prompts: tuple[tuple[int, ...], ...]
    pixels: Tensor | None
    seen: Tensor | None
    known: Known | None
    noise: Tensor
    timesteps_N: Tensor
    dropped_N: Tensor
    weights_N: Tensor
    origins_N: Tensor
    info: BatchInfo


@dataclass(frozen=True)
class Pair:
    """One sample of `Pairs`; `name` is its source and id."""

    name: str
    prompt: tuple[int, ...]
    pixels: Tensor | None = None
    seen: Tensor | None = None
    known: Known | None = None
    noise: Tensor | None = None
    timestep: int = 0
    dropped: bool = False
    origin: int = 0


@dataclass(frozen=True, kw_only=True)
class PairAssembler:
    """Reads and decodes planned pairs; safe to copy into worker processes.

    Attributes:
        sources: those of the plan, in its order.
        vocabulary: the tokenizer that the plan's lengths were counted with.
        layout: special ids, and Q.
        shape: C, h, w of what is diffused.
        side: S.
        square: how a picture becomes S x S.
        steps: timesteps there are.
        drop: share of samples whose condition is dropped.
        vision: how the vision tower sees pictures; None when it does not.
        known: source name -> conditions and latents made before; empty = none.
    """

    sources: Sequence[Source]
    vocabulary: Vocabulary
    layout: SequenceFormat
    shape: tuple[int, int, int]
    side: int
    square: Square
    steps: int
    drop: float
    vision: SequenceFormat | None
    known: Mapping[str, KnownSource]

    def batch(self, plans: Sequence[PackPlan]) -> Made[Pairs]:
        """One micro-batch of several pairs, what failed, and what was planned."""
        planned = [document for plan in plans for document in plan.documents]
        found, failures = self.read(planned)
        numbers = tuple(plan.number for plan in plans)
        made = self.merge(found, numbers)
        return Made(made, tuple(failures), planned_of(plans, self.sources))

    def read(self, planned: Sequence[PlannedDocument]) -> tuple[list[Pair], list[Failure]]:
        """Samples in order, without those that failed, and what failed."""
        found: list[Pair] = []
        failures: list[Failure] = []
        for document in planned:
            try:
                found.append(self.pair(document))
            except (SampleError, images.DecodeError) as error:
                failures.append(failure_of(error, document, self.sources))
        return found, failures

    def pair(self, planned: PlannedDocument) -> Pair:
        """One sample.

        Raises:
            SampleError: it is malformed.
            DecodeError: its picture is damaged, or it was so when latents were made.
        """
        source = self.sources[planned.source]
        document = source.documents.document(planned.number)
        draw = Draw(planned.noise, "diffusion")
        sample = Pair(
            name=f"{source.name}/{planned.sample_id}",
            prompt=self.prompt(document, planned),
            noise=self._noise(planned.noise),
            timestep=draw.below(self.steps),
            dropped=draw.chance(self.drop),
            origin=planned.source,
        )
        if source.name in self.known:
            known = self.known[source.name].read(planned.number, planned.sample_id)
            return replace(sample, known=known)
        picture = images.open_picture(picture_of(document))
        seen = None
        if self.vision is not None:
            seen = images.decode(picture_of(document), self.vision)
        return replace(sample, pixels=centred(self.square(picture, self.side)), seen=seen)

    def prompt(self, document: Document, planned: PlannedDocument) -> tuple[int, ...]:
        """`<s>` and the document's text."""
        words = tuple(p for p in planned.selection.pieces if isinstance(p, TextPiece))
        selection = replace(planned.selection, pieces=words)
        sequence = tokenize(document, selection, self.vocabulary, self.layout)
        return tuple(sequence.tokens_T.tolist()[:-1])  # without </s>

    def _noise(self, seed: int) -> Tensor:
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(seed))

    def merge(self, found: Sequence[Pair], pack_numbers: tuple[int, ...]) -> Pairs:
        """Samples, then padding up to the number of packs."""
        slots = len(pack_numbers)
        empty = Pair("", (self.layout.bos,), noise=torch.zeros(2, *self.shape))
        rows = [*found, *[empty] * (slots - len(found))]
        real = torch.arange(slots) < len(found)
        blank = None if self.known else torch.zeros(3, self.side, self.side)
        unseen = None
        if self.vision is not None and not self.known:
            unseen = torch.zeros(3, self.vision.image_size, self.vision.image_size)
        return Pairs(
            prompts=tuple(row.prompt for row in rows),
            pixels=_stack([row.pixels for row in rows], blank),
            seen=_stack([row.seen for row in rows], unseen),
            known=self._known(rows) if self.known else None,
            noise=torch.stack([row.noise for row in rows if row.noise is not None]),
            timesteps_N=torch.tensor([row.timestep for row in rows]),
            dropped_N=torch.tensor([row.dropped for row in rows]),
            weights_N=real.float(),
            origins_N=torch.tensor([row.origin for row in rows]),
            info=BatchInfo(
                pack_numbers=pack_numbers,
                sample_ids=tuple(sample.name for sample in found),
                tokens=len(found) * self.layout.visual_tokens,
                images=len(found),
                slots=slots * self.layout.visual_tokens,
            ),
        )

    def _known(self, rows: Sequence[Pair]) -> Known:
        blank = next(iter(self.known.values())).blank
        found = [row.known or blank for row in rows]
        return Known(
            torch.stack([known.conditions for known in found]),
            torch.stack([known.latents for known in found]),
        )


def _stack(found: Sequence[Tensor | None], blank: Tensor | None) -> Tensor | None:
    if blank is None:
        return None
    return torch.stack([blank if tensor is None else tensor for tensor in found])


def picture_of(document: Document) -> bytes:
    """The first picture of a document, encoded."""
    return next(part.media[0] for part in document.parts if part.modality is not Modality.text)


def centred(picture: Image.Image) -> Tensor:
    """Pixels of an RGB picture, float32 `[3, S, S]` in -1..1."""
    return torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def cropped(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture, its shorter side scaled to `side`."""
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=box)


def squashed(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture, both sides scaled to `side`."""
    return picture.resize((side, side), Image.Resampling.BICUBIC)
