"""An example of an evaluation: pictures, a question, what people answered.

Pictures stay encoded, or on disk, until they are asked about: a set may be larger than memory.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmtrain.data import images
from mmtrain.errors import ContentError

Picture = Path | bytes
Row = list[str | Image.Image]  # a prompt: texts and pictures in order


@dataclass(frozen=True, kw_only=True)
class Example:
    """One thing to ask.

    Attributes:
        key: id of the record, unique in its set.
        image: id of the picture; an example is never a shot for a question about its own picture.
        pictures: of the prompt, in order.
        question: what is asked; empty when a caption is wanted.
        answers: what people said.
        group: kind of question, or category, that figures are split by.
        facts: `meta` of a document of the world of shapes.
    """

    key: str
    image: str
    pictures: tuple[Picture, ...]
    question: str = ""
    answers: tuple[str, ...] = ()
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """What most people said; of several, what was said first."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class ExampleSet:
    """Examples, and a line for every record that could not be used."""

    examples: tuple[Example, ...]
    broken: tuple[str, ...] = ()

    def first(self, count: int) -> "ExampleSet":
        """The first `count` examples; all of them for 0."""
        return ExampleSet(self.examples[: count or None], self.broken)


def open_pictures(pictures: Sequence[Picture]) -> list[Image.Image]:
    """Decode the pictures of an example, RGB.

    Raises:
        ContentError: one is not there or damaged; names it.
    """
    out = []
    for picture in pictures:
        name = f"picture {picture}" if isinstance(picture, Path) else "a stored picture"
        try:
            blob = picture.read_bytes() if isinstance(picture, Path) else picture
            images.check(blob)
            out.append(Image.open(io.BytesIO(blob)).convert("RGB"))
        except (OSError, images.DecodeError) as error:
            raise ContentError(f"{name} cannot be read: {error}") from error
    return out
