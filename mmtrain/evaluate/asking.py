"""Questions put to a run: prompts with and without examples, kept within the context.

The form of prompts (Emu, arXiv:2307.05222; where it is silent, Emu2, arXiv:2312.13286): a picture,
the words of the task, then the answer. Examples of captions follow each other without a separator,
those of questions with ". ". An example that does not fit the context is left out, the one
farthest from the question first, and counted.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from mmtrain.data.chat import Turn, prompt_parts, template_of
from mmtrain.data.document import Modality, Part
from mmtrain.data.images import encode_png
from mmtrain.errors import ContentError
from mmtrain.evaluate.examples import Example, ExampleSet, Row
from mmtrain.evaluate.opening import open_pictures
from mmtrain.evaluate.shots import Support
from mmtrain.generation.artist import Artist
from mmtrain.models.families import spec_of
from mmtrain.models.writing import Prompt
from mmtrain.nn.choice import Beams
from mmtrain.settings import Phase, ShotForm, SourceConfig, TaskConfig
from mmtrain.trained import BATCH, Trained

log = logging.getLogger(__name__)

_LINE_SECONDS = 30.0  # between lines that say how far a long evaluation is


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
        system: message that begins a conversation, for runs tuned on those (`data.chat`).
    """

    prompt: str = "{question}"
    between: str = ""
    beams: Beams
    shots: int = 0
    form: ShotForm = ShotForm.pictures
    system: str = "auto"

    def asks(self, example: Example, pictures: Sequence[Image.Image]) -> Row:
        """The pictures of an example, then the words that ask."""
        words = self.prompt.replace("{question}", example.question)
        return [*pictures, *([words] if words else [])]

    def whole(self, example: Example, written: str) -> str:
        """The sentence that was written, with the words of the document that it goes on from."""
        begun = example.question if "{question}" in self.prompt else ""
        return f"{begun} {written}".strip()

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
    said = time.monotonic()
    for start in range(0, len(found.examples), BATCH):  # pictures of one batch at a time
        examples, prompts = [], []
        for example in found.examples[start : start + BATCH]:
            try:
                row = row_of(trained, example, manner, support, asked)
                prompts.append(trained.prompt(laid_out(trained, row, manner.system)))
                examples.append(example)
            except ContentError as error:
                asked.broken.append(f"{example.key}: {error}")
        written = write(trained, prompts, manner.beams)
        asked.answers += zip(examples, written, strict=True)
        if time.monotonic() - said > _LINE_SECONDS:
            said = time.monotonic()
            log.info("asked %d of %d examples", start + len(examples), len(found.examples))
    return asked


def write(trained: Trained, prompts: Sequence[Prompt], beams: Beams) -> list[str]:
    """Text after each prompt."""
    if beams.beams == 1:
        return trained.write(prompts, beams.new_tokens)
    decode = trained.vocabulary.decode
    return [decode(trained.sampler.beam(prompt, beams)) for prompt in prompts]


def laid_out(trained: Trained, row: Row, system: str) -> Sequence[str | Image.Image | Part]:
    """A prompt in the form the run was trained with: of conversations, if it was tuned on those."""
    if not is_tuned(trained):
        return row
    turn = Turn(contents(row))
    return prompt_parts([turn], template_of(system, [turn]))


def system_of(config: TaskConfig) -> str:
    """The system message of a task: that of its recipe, else as released, for shards none."""
    published = config.path.endswith(".json") or config.questions is not None
    return config.system or ("auto" if published else "none")


def is_tuned(trained: Trained) -> bool:
    """Whether the run answers in conversations."""
    return trained.recipe.phase is Phase.instruct


def contents(row: Row) -> tuple[str | Part, ...]:
    """Texts and pictures as a turn of a conversation holds them."""
    return tuple(
        piece
        if isinstance(piece, str)
        else Part(modality=Modality.image, media=(encode_png(piece),))
        for piece in row
    )


def row_of(
    trained: Trained, example: Example, manner: Manner, support: Support | None, asked: Asked
) -> Row:
    """The prompt of an example, with as many shots as fit."""
    pictures = open_pictures(example.pictures)
    question = manner.asks(example, pictures)
    taken = positions(trained, laid_out(trained, question, manner.system))
    room = context_of(trained) - manner.beams.new_tokens - taken
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


def positions(trained: Trained, pieces: Sequence[str | Image.Image | Part]) -> int:
    """Positions of a prompt, <s> included."""
    return 1 + sum(_lengths(trained, pieces))


def _lengths(trained: Trained, pieces: Sequence[str | Image.Image | Part]) -> Iterator[int]:
    for piece in pieces:
        if isinstance(piece, str):
            yield len(trained.vocabulary.encode(piece)) if piece.strip() else 0
        elif isinstance(piece, Part) and piece.modality is Modality.text:
            yield len(trained.vocabulary.encode_part(piece))
        else:
            images = len(piece.media) if isinstance(piece, Part) else 1
            yield images * trained.layout.group_length
