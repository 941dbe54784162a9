"""Questions put to a run: prompts with and without examples, kept within the context.

The form of prompts (Emu, arXiv:2307.05222; where it is silent, Emu2, arXiv:2312.13286): a picture,
the words of the task, then the answer. Examples of captions follow each other without a separator,
those of questions with ". ". An example that does not fit the context is left out, the one
farthest from the question first, and counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from mmtrain.artist import Artist
from mmtrain.errors import ContentError
from mmtrain.evaluate.examples import Example, ExampleSet, Row, open_pictures
from mmtrain.evaluate.shots import Support
from mmtrain.models.emu.generate import Prompt
from mmtrain.models.families import spec_of
from mmtrain.nn.choice import Beams
from mmtrain.settings import ShotForm, SourceConfig
from mmtrain.trained import BATCH, Trained


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a run with what draws for it, and the held-out sources of its recipe."""

    artist: Artist
    heldout: Mapping[str, SourceConfig]

    @property
    def trained(self) -> Trained:
        """The run that writes."""
        return self.artist.trained


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a task asks and how the answer is written.

    Attributes:
        prompt: words after the picture; `{question}` stands for the question.
        between: what parts one example from the next.
        beams: how the answer is searched for; one beam writes greedily, many prompts at a time.
        shots: examples before each question.
        form: what is shown of an example.
    """

    prompt: str = "{question}"
    between: str = ""
    beams: Beams
    shots: int = 0
    form: ShotForm = ShotForm.pictures

    def asks(self, example: Example, pictures: Sequence[Image.Image]) -> Row:
        """The pictures of an example, then the words that ask."""
        words = self.prompt.replace("{question}", example.question)
        return [*pictures, *([words] if words else [])]

    def shows(self, example: Example) -> Row:
        """An example with its answer.

        Raises:
            ContentError: its pictures cannot be read.
        """
        pictures = open_pictures(example.pictures) if self.form is ShotForm.pictures else []
        words = self.prompt.replace("{question}", example.question)
        if words and example.answer.startswith(words):
            words = ""  # a caption that begins with what it is asked with
        text = f"{words} {example.answer}".strip() + self.between
        return [*pictures, text]


@dataclass
class Asked:
    """What became of a set of examples."""

    answers: list[tuple[Example, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    shots_left_out: int = 0  # for want of room in the context


def ask(trained: Trained, found: ExampleSet, manner: Manner, support: Support | None) -> Asked:
    """Answers to every example that can be asked, in order."""
    asked = Asked(broken=list(found.broken))
    for start in range(0, len(found.examples), BATCH):  # pictures of one batch at a time
        examples, rows = [], []
        for example in found.examples[start : start + BATCH]:
            try:
                rows.append(_row(trained, example, manner, support, asked))
                examples.append(example)
            except ContentError as error:
                asked.broken.append(f"{example.key}: {error}")
        written = write(trained, [trained.prompt(row) for row in rows], manner.beams)
        asked.answers += zip(examples, written, strict=True)
    return asked


def write(trained: Trained, prompts: Sequence[Prompt], beams: Beams) -> list[str]:
    """Text after each prompt."""
    if beams.beams == 1:
        return trained.write(prompts, beams.new_tokens)
    decode = trained.vocabulary.decode
    return [decode(trained.sampler.beam(prompt, beams)) for prompt in prompts]


def _row(
    trained: Trained, example: Example, manner: Manner, support: Support | None, asked: Asked
) -> Row:
    """The prompt of an example, with as many shots as fit."""
    pictures = open_pictures(example.pictures)
    question = manner.asks(example, pictures)
    room = context_of(trained) - manner.beams.new_tokens - positions(trained, question)
    if room < 0:
        raise ContentError(f"the question leaves no room in a context of {context_of(trained)}")
    shown: list[Row] = []
    if support is not None and manner.shots:
        chosen = support.choose(example, pictures, trained, manner.shots)
        for shot in reversed(chosen):  # the nearest first: it is the last to go
            row = manner.shows(shot)
            room -= positions(trained, row) - 1  # <s> is counted already
            if room < 0:
                break
            shown.insert(0, row)
        asked.shots_left_out += len(chosen) - len(shown)
    return [piece for row in (*shown, question) for piece in row]


def context_of(trained: Trained) -> int:
    """Positions that the run's model can see."""
    return spec_of(trained.recipe.family, trained.recipe.phase).context(trained.recipe.model)


def positions(trained: Trained, row: Row) -> int:
    """Positions of a prompt, <s> included."""
    return 1 + sum(_lengths(trained, row))


def _lengths(trained: Trained, row: Row) -> Iterator[int]:
    for piece in row:
        if isinstance(piece, str):
            yield len(trained.vocabulary.encode(piece)) if piece.strip() else 0
        else:
            yield trained.layout.group_length
