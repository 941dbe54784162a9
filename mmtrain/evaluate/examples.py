"""An example of an evaluation: pictures, a question, what people answered.

Pictures stay encoded, or on disk, until they are asked about: a set may be larger than memory.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

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
