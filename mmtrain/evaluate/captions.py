"""Captions of the world of shapes: held-out pictures described, and the truth computed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from mmtrain.data.document import Document, Modality
from mmtrain.data.shapes_text import judge
from mmtrain.data.shards import open_shards
from mmtrain.errors import ExitCode, MissingError
from mmtrain.settings import SourceConfig
from mmtrain.trained import load_run

_FRAMES = 8  # of a clip that is captioned

Row = list[str | Image.Image]


@dataclass
class Score:
    """How many captions were right."""

    right: int = 0
    asked: int = 0

    @property
    def share(self) -> float:
        """Right captions of all."""
        return self.right / self.asked


def evaluate(run: Path, checkpoint: str | None, documents: int) -> int:
    """Caption held-out pictures and print how many captions are true, by source and category.

    Truth is computed from the facts that the shapes world keeps with every document, so it needs
    sources made by `mmtrain data shapes`. Figures and every caption go to `evaluation.json`.

    Args:
        run: the run's folder.
        checkpoint: name of a checkpoint, or None for the newest.
        documents: of each source.
    """
    trained = load_run(run, checkpoint)
    heldout = trained.recipe.data.heldout
    judged = [
        (name, document)
        for name, document in _pairs(heldout, documents)
        if {"category", "objects"} <= set(document.meta)
    ]
    if not judged:
        raise MissingError(
            f"{run}: no source of data.heldout keeps facts to judge captions by; held-out losses "
            "are in heldout.jsonl, set validate.every_steps to get them"
        )
    asked = [_question(document) for _, document in judged]
    answers = trained.write([trained.prompt(pieces) for pieces in asked], new_tokens=24)
    scores: dict[tuple[str, str], Score] = {}
    captions = []
    for (name, document), answer in zip(judged, answers, strict=True):
        prefix = str(document.meta.get("prompt", ""))
        text = f"{prefix} {answer}".strip()
        right = judge(text, document.meta)
        score = scores.setdefault((name, str(document.meta["category"])), Score())
        score.asked, score.right = score.asked + 1, score.right + right
        captions.append({"sample": f"{name}/{document.sample_id}", "text": text, "right": right})
    print(f"{'source':<12}{'category':<20}{'right':>7}{'asked':>7}{'share':>8}")
    for (name, category), score in sorted(scores.items()):
        print(f"{name:<12}{category:<20}{score.right:7}{score.asked:7}{score.share:8.1%}")
    table = [
        {"source": name, "category": category, "right": s.right, "asked": s.asked}
        for (name, category), s in sorted(scores.items())
    ]
    path = run / "evaluation.json"
    path.write_text(json.dumps({"scores": table, "captions": captions}, indent=1) + "\n")
    print(f"every caption: {path}")
    return ExitCode.DONE


def _question(document: Document) -> Row:
    """The pictures of a document, then the words its caption begins with."""
    row: Row = [
        _open(blob)
        for part in document.parts
        if part.modality is not Modality.text
        for blob in part.media[:_FRAMES]
    ]
    return [*row, *_beginning(document)]


def _beginning(document: Document) -> list[str]:
    """The words a caption is asked with, if any (`prompt` in the facts of a shapes document)."""
    words = str(document.meta.get("prompt", ""))
    return [words] if words else []


def _open(blob: bytes) -> Image.Image:
    return Image.open(BytesIO(blob)).convert("RGB")


def _pairs(sources: dict[str, SourceConfig], count: int) -> Iterator[tuple[str, Document]]:
    """The first documents of every source that hold both a picture and a text."""
    for name, config in sources.items():
        shards = open_shards(Path(config.path), config.remote)
        for number in range(min(count, len(shards))):
            document = shards.document(number)
            kinds = {part.modality for part in document.parts}
            if Modality.text in kinds and len(kinds) > 1:
                yield name, document
