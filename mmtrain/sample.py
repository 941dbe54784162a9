"""What a trained run writes: text after prompts that may hold images, images after text.

One process, whatever layout trained the run: full tensors are merged from the checkpoint by name.
Until a visual decoder is trained, an image is shown as the training images whose embeddings lie
nearest to the one that was written.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmtrain.data import images
from mmtrain.data.document import Document, Modality
from mmtrain.data.picture import draw_rows
from mmtrain.data.shards import Shards, open_shards
from mmtrain.errors import ExitCode, MissingError, Problem, RecipeError
from mmtrain.models.emu.generate import Prompt
from mmtrain.nn.choice import Beams, Nucleus
from mmtrain.settings import SourceConfig
from mmtrain.trained import BATCH, Trained, load_layers, load_run

__all__ = ["load_layers", "load_run", "sample"]

log = logging.getLogger(__name__)

_IMAGE = re.compile(r"\[([^\[\]]+\.(?:png|jpe?g|webp))\]", re.IGNORECASE)
_ASKS_IMAGE = "[IMG]"
_CANDIDATES = 512  # training images a written image is compared with
_NEAREST = 5

Row = list[str | Image.Image]


# --- sample --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How text is chosen."""

    method: str
    top_p: float
    beams: int
    new_tokens: int
    seed: int

    def writer(self, trained: Trained) -> Callable[[Sequence[Prompt]], list[str]]:
        """The function that continues prompts."""
        if self.method != "beam":
            drawn = self.method == "top-p"
            nucleus = Nucleus(top_p=self.top_p, seed=self.seed) if drawn else None
            return lambda prompts: trained.write(prompts, self.new_tokens, nucleus)
        beams = Beams(beams=self.beams, new_tokens=self.new_tokens)
        decode = trained.vocabulary.decode
        return lambda prompts: [decode(trained.sampler.beam(p, beams)) for p in prompts]


def sample(
    run: Path,
    prompt: Sequence[str],
    method: str,
    top_p: float,
    beams: int,
    new_tokens: int,
    seed: int,
    checkpoint: str | None,
    out: Path | None,
) -> int:
    """Write text and images with a run; pictures and `samples.jsonl` go to `out`.

    Args:
        run: the run's folder.
        prompt: texts with images as `[path.png]`; one that ends with `[IMG]` asks for an image.
            Held-out documents of the recipe serve when there is none.
        method: greedy, top-p or beam.
        top_p: probability mass that top-p draws from.
        beams: width of the beam.
        new_tokens: of text at most.
        seed: of top-p.
        checkpoint: name of a checkpoint, or None for the newest.
        out: folder, or None for `samples` in the run's folder.
    """
    texts = [_parse(words) for words in prompt]  # before the weights are read
    trained = load_run(run, checkpoint)
    if not texts:
        texts = list(_heldout_prompts(trained))
    write = Options(method, top_p, beams, new_tokens, seed).writer(trained)
    asked = [pieces for pieces, wants_image in texts if not wants_image]
    wanted = [pieces for pieces, wants_image in texts if wants_image]
    folder = out or run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    if asked:
        written = write([trained.prompt(pieces) for pieces in asked])
        rows: list[Row] = [
            [*pieces, "->", text] for pieces, text in zip(asked, written, strict=True)
        ]
        _show(rows, folder / "text.png")
        for pieces, text in zip(asked, written, strict=True):
            records.append({"prompt": _plain(pieces), "text": text})
            print(f"{_plain(pieces)} -> {text}")
    if wanted:
        rows, nearest = [], Gallery.of(trained)
        rollouts = trained.sampler.rollout([trained.prompt(pieces) for pieces in wanted])
        for pieces, embedding in zip(wanted, rollouts, strict=True):
            found = nearest.search(embedding)
            rows.append([*pieces, "->", *(nearest.picture(index) for index, _ in found)])
            names = [nearest.names[index] for index, _ in found]
            error = found[0][1]
            records.append({"prompt": _plain(pieces), "nearest": names, "error": error})
            print(f"{_plain(pieces)} -> image like {names[0]} (error {error:.4f})")
        _show(rows, folder / "images.png")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "samples.jsonl").write_text(lines)
    print(f"{folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    return ExitCode.DONE


def _parse(words: str) -> tuple[Row, bool]:
    """Texts and pictures of a prompt, and whether it asks for an image.

    Raises:
        RecipeError: pictures that are not there or cannot be opened, all at once.
    """
    wants_image = words.rstrip().endswith(_ASKS_IMAGE)
    words = words.rstrip().removesuffix(_ASKS_IMAGE) if wants_image else words
    pieces: Row = []
    faults = []
    for index, piece in enumerate(_IMAGE.split(words)):
        if index % 2 == 0:
            pieces += [piece] if piece.strip() else []
            continue
        try:
            pieces.append(Image.open(piece).convert("RGB"))
        except OSError as error:
            faults.append(Problem("--prompt", f"picture {piece} cannot be opened: {error}"))
    if faults:
        raise RecipeError(faults)
    return pieces, wants_image


def _plain(pieces: Row) -> str:
    return " ".join(piece.strip() if isinstance(piece, str) else "[image]" for piece in pieces)


def _show(rows: list[Row], path: Path) -> None:
    draw_rows(rows).save(path)


def _heldout_prompts(trained: Trained, count: int = 6) -> Iterator[tuple[Row, bool]]:
    """Held-out pictures to be described, and held-out texts to be drawn."""
    described = [document for _, document in _pairs(trained.recipe.data.heldout, count)]
    if not described:
        raise MissingError(
            "the recipe has no data.heldout source with images; give --prompt, as in "
            '--prompt "[picture.png]" or --prompt "a red circle [IMG]"'
        )
    for document in described[:count]:
        picture = next(p for p in document.parts if p.modality is not Modality.text)
        yield [_open(picture.media[0]), *_beginning(document)], False
    for document in described[:count]:
        yield [next(p.text for p in document.parts if p.modality is Modality.text)], True


def _open(blob: bytes) -> Image.Image:
    return Image.open(BytesIO(blob)).convert("RGB")


def _pairs(sources: dict[str, SourceConfig], count: int) -> Iterator[tuple[str, Document]]:
    """The first documents of every source that hold both a picture and a text."""
    for name, config in sources.items():
        for document in _documents(open_shards(Path(config.path), config.remote), count):
            kinds = {part.modality for part in document.parts}
            if Modality.text in kinds and len(kinds) > 1:
                yield name, document


def _documents(shards: Shards, count: int) -> Iterator[Document]:
    for number in range(min(count, len(shards))):
        yield shards.document(number)


@dataclass(frozen=True)
class Gallery:
    """Training images and their embeddings."""

    names: list[str]
    blobs: list[bytes]
    embeddings_NQD: Tensor

    @classmethod
    def of(cls, trained: Trained) -> "Gallery":
        """The first single images of the recipe's sources, embedded by the run."""
        names: list[str] = []
        blobs: list[bytes] = []
        for source, document in _pairs(trained.recipe.data.sources, _CANDIDATES):
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
        return _open(self.blobs[index])


def _beginning(document: Document) -> list[str]:
    """The words a caption is asked with, if any (`prompt` in the facts of a shapes document)."""
    words = str(document.meta.get("prompt", ""))
    return [words] if words else []
