"""What a trained run writes: text after prompts that may hold images, images after text.

One process, whatever layout trained the run. With a visual decoder an image is drawn; without one
it is shown as the training images whose embeddings lie nearest to the one that was written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mmtrain.data.document import CHAT, Document, Modality, is_edit
from mmtrain.data.images import open_picture
from mmtrain.data.picture import draw_rows
from mmtrain.errors import ExitCode, MissingError
from mmtrain.generation.artist import Artist
from mmtrain.generation.gallery import Gallery, illustrated
from mmtrain.generation.prompts import Request, Row, asked_before
from mmtrain.models.writing import Limits, Prompt
from mmtrain.nn.choice import Beams, Nucleus
from mmtrain.trained import Style, Trained

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How text is chosen and how much is written.

    Attributes:
        method: greedy, top-p or beam.
        top_p: probability mass that top-p draws from.
        temperature: of top-p.
        beams: width of the beam.
        new_tokens: of text at most.
        images: images a sequence may begin by itself, where the model chooses [IMG].
        samples: pictures of every image that a decoder draws.
        style: how a decoder draws; its seed is top-p's too.
    """

    method: str = "greedy"
    top_p: float = 0.9
    temperature: float = 1.0
    beams: int = 5
    new_tokens: int = 64
    images: int = 0
    samples: int = 1
    style: Style = field(default_factory=Style)

    @property
    def nucleus(self) -> Nucleus | None:
        """What top-p draws from."""
        if self.method != "top-p":
            return None
        return Nucleus(top_p=self.top_p, temperature=self.temperature, seed=self.style.seed)


def sample(
    run: Path,
    requests: Sequence[Request],
    options: Options,
    *,
    checkpoint: str | None = None,
    decoder: Path | None = None,
    out: Path | None = None,
) -> int:
    """Write text and images with a run; pictures and `samples.jsonl` go to `out`.

    Args:
        run: the run's folder; of a decoder run, the model that it draws for is the writer.
        requests: prompts; held-out documents of the recipe serve when there is none.
        options: how.
        checkpoint: of `run`, by name; None for the newest.
        decoder: a decoder run that draws the images, if any.
        out: folder, or None for `samples` in the run's folder.
    """
    artist = Artist.load(run, decoder, checkpoint, options.style)
    trained = artist.trained
    if not requests:
        requests = _heldout_prompts(trained)
    folder = out or run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    sheet = _Sheet(folder, artist, options.samples)
    asked = [r for r in requests if not r.wants_image and not options.images]
    for request, text in zip(asked, _texts(trained, asked, options), strict=True):
        sheet.add(request, [text])
    wanted = [r for r in requests if r.wants_image or options.images]
    for request, pieces in zip(wanted, _interleaved(trained, wanted, options), strict=True):
        sheet.add(request, pieces)
    sheet.write()
    print(f"{folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    return ExitCode.DONE


def _texts(trained: Trained, requests: Sequence[Request], options: Options) -> list[str]:
    prompts = [trained.prompt(request.pieces) for request in requests]
    if options.method != "beam":
        return trained.write(prompts, options.new_tokens, options.nucleus)
    beams = Beams(beams=options.beams, new_tokens=options.new_tokens)
    return [trained.vocabulary.decode(trained.sampler.beam(p, beams)) for p in prompts]


def _interleaved(
    trained: Trained, requests: Sequence[Request], options: Options
) -> list[list[str | Tensor]]:
    """Texts and images; as published, an image that was asked for ends the sequence."""
    prompts = []
    for request in requests:
        prompt = trained.prompt(request.pieces)
        if request.wants_image and options.images:
            prompt = Prompt((*prompt.tokens, trained.layout.image_begin), prompt.pixels)
        prompts.append(prompt)
    if options.images:
        limits = Limits(new_tokens=options.new_tokens, images=options.images)
        return trained.interleave(prompts, limits, options.nucleus)
    if not prompts:
        return []
    if not trained.sampler.draws:  # a decoder makes as many pictures of the same rows
        return [[rows] for rows in trained.rollout(prompts)]
    drawn = [
        trained.drawing(replace(options.style, seed=options.style.seed + number)).rollout(prompts)
        for number in range(options.samples)
    ]
    return [list(pictures) for pictures in zip(*drawn, strict=True)]


class _Sheet:
    """What was written: lines on the screen, `samples.jsonl`, and two pictures to look at."""

    def __init__(self, folder: Path, artist: Artist, samples: int) -> None:
        self.folder, self.artist, self.samples = folder, artist, samples
        self.records: list[Record] = []
        self.rows: dict[str, list[Row]] = {"text.png": [], "images.png": []}
        self._gallery: Gallery | None = None
        self._drawn = 0

    def add(self, request: Request, pieces: Sequence[str | Tensor]) -> None:
        """One answered prompt."""
        shown: Row = [*request.row, "->"]
        entries: list[Record] = []
        for piece in pieces:
            if isinstance(piece, str):
                shown.append(piece)
                entries.append({"text": piece})
                print(f"{request.plain} -> {piece}")
            else:
                pictures, entry = self._image(request, piece)
                shown += pictures
                entries.append(entry)
        has_image = any(isinstance(piece, Tensor) for piece in pieces)
        self.rows["images.png" if has_image else "text.png"].append(shown)
        one = entries[0] if len(entries) == 1 else {"pieces": entries}
        self.records.append({"prompt": request.plain, **one})

    def _image(self, request: Request, rows_QD: Tensor) -> tuple[list[Image.Image], Record]:
        names = []
        if (own := self.artist.trained.sampler.picture(rows_QD)) is not None:
            pictures = [own]
        elif self.artist.drawer is None:
            return self._nearest(request, rows_QD)
        else:
            pictures = self.artist.pictures(rows_QD[None].repeat(self.samples, 1, 1), self._drawn)
        for picture in pictures:
            names.append(f"image-{self._drawn:04d}.png")
            picture.save(self.folder / names[-1])
            self._drawn += 1
        print(f"{request.plain} -> {', '.join(names)}")
        return pictures, {"images": names}

    def _nearest(self, request: Request, rows_QD: Tensor) -> tuple[list[Image.Image], Record]:
        if self._gallery is None:
            self._gallery = Gallery.of(self.artist.trained)
        gallery = self._gallery
        found = gallery.search(rows_QD)
        names, error = [gallery.names[index] for index, _ in found], found[0][1]
        print(f"{request.plain} -> image like {names[0]} (error {error:.4f})")
        return [gallery.picture(i) for i, _ in found], {"nearest": names, "error": error}

    def write(self) -> None:
        """Leave everything in the folder."""
        for name, rows in self.rows.items():
            if rows:
                draw_rows(rows).save(self.folder / name)
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        (self.folder / "samples.jsonl").write_text(lines)


def _heldout_prompts(trained: Trained, count: int = 6) -> list[Request]:
    """Held-out questions to be answered, pictures to be edited or described, texts to be drawn."""
    found = [document for _, document in illustrated(trained.recipe.data.heldout, count)]
    talks = [document for document in found if document.kind == CHAT][:count]
    edits = [document for document in found if is_edit(document)][:count]
    described = [d for d in found if d.kind != CHAT and not is_edit(d)][:count]
    requests = [asked_before(document.parts) for document in talks]
    for document in edits:
        first, asked, _ = document.parts
        requests.append(Request([open_picture(first.media[0]), asked.text], wants_image=True))
    for document in described:
        picture = next(p for p in document.parts if p.modality is not Modality.text)
        requests.append(Request([open_picture(picture.media[0]), *_beginning(document)]))
    for document in described:
        words = next(p.text for p in document.parts if p.modality is Modality.text)
        requests.append(Request([words], wants_image=True))
    if not requests:
        raise MissingError(
            "the recipe has no data.heldout source with images; give --prompt, as in "
            '--prompt "[picture.png]" or --prompt "a red circle [IMG]"'
        )
    return requests


def _beginning(document: Document) -> list[str]:
    """The words a caption is asked with, if any (`prompt` in the facts of a shapes document)."""
    words = str(document.meta.get("prompt", ""))
    return [words] if words else []
