"""Conversations as documents: Emu's instruction template (arXiv:2307.05222, section 3.3).

One turn is the system message, then " [USER]: " + instruction + " [ASSISTANT]: " + answer. Several
turns follow the released dialogue evaluator: the pictures of the first question stand apart, and
every answer is closed,

    SYSTEM [USER]: (picture)</s> [USER]: question [ASSISTANT]: answer</s> [USER]: ... answer</s>

where the last `</s>` is the sequence's own. The same parts make documents for training (`render`)
and prompts for writing (`prompt_parts`), so both have the same tokens.

The frame is markup: its special tokens are real ones. What users and assistants say never is, so
that nobody's "[ASSISTANT]" ends a turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from mmtrain.data.document import CHAT, Document, Modality, Part
from mmtrain.errors import ContentError, MissingError

# Of the meaning and structure of the released ones (Emu1/inference.py, lines 10 and 11), in words
# of our own; the literal marks around ImageContent become the real tokens [IMG] and [/IMG].
SYSTEM = MappingProxyType(
    {
        "image": "I am going to show you one image, written as [IMG]ImageContent[/IMG]. Look at it "
        "when it comes, and answer what I ask from what can be seen in it.",
        "video": "You are an assistant who helps people understand videos. A video comes as a few "
        "images in the order of time, each written as [IMG]ImageContent[/IMG]. Look at all of "
        "them when they come, and answer what I ask from what can be seen in them.",
        "none": "",
    }
)
_USER, _ASSISTANT, _CLOSE = " [USER]: ", " [ASSISTANT]: ", "</s>"

Content = str | Part  # words, or a picture or clip


@dataclass(frozen=True)
class Turn:
    """A question and its answer; an empty answer is one that is asked for."""

    question: tuple[Content, ...]
    answer: tuple[Content, ...] = ()


@dataclass(frozen=True)
class Template:
    """What a conversation begins with: its system message, markup or plain text, or nothing."""

    system: Part | None = None


def markup(text: str) -> Part:
    """A text part whose special tokens are real ones."""
    return Part(modality=Modality.text, text=text, markup=True)


def template_of(system: str, turns: Sequence[Turn]) -> Template:
    """The template of a conversation.

    Args:
        system: `image`, `video`, `none`, the path of a file that holds the message (its special
            tokens are honoured), or `auto`: `image` for one picture, `video` for a clip, `none`
            for words alone and for several pictures, as released.
        turns: of the conversation; `auto` looks at what they show.

    Raises:
        MissingError: there is no such file.
        ContentError: it is no text.
    """
    text = SYSTEM[_shown(turns)] if system == "auto" else SYSTEM.get(system)
    if text is None:
        text = _read(Path(system))
    return Template(markup(text) if text.strip() else None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise MissingError(
            f"the system message {path} cannot be read ({error.strerror}); name a file, or one of "
            f"auto, {', '.join(SYSTEM)}"
        ) from error
    except UnicodeDecodeError as error:
        raise ContentError(f"the system message {path} is no UTF-8 text: {error}") from error


def _shown(turns: Sequence[Turn]) -> str:
    kinds = [
        content.modality
        for turn in turns
        for content in (*turn.question, *turn.answer)
        if isinstance(content, Part)
    ]
    if Modality.video in kinds:
        return "video"
    return "image" if len(kinds) == 1 else "none"


def render(turns: Sequence[Turn], template: Template) -> tuple[Part, ...]:
    """The parts of a conversation whose every turn has an answer.

    The `</s>` after the last answer is not among them: a sequence ends with one.
    """
    assert turns and all(turn.answer for turn in turns), turns
    return tuple(_laid_out(turns, template))


def prompt_parts(turns: Sequence[Turn], template: Template) -> tuple[Part, ...]:
    """The parts up to the answer that is asked for, that of the last turn.

    One turn is asked in the form of one turn, the next one in the form of several, as trained.
    """
    assert turns and not turns[-1].answer and all(turn.answer for turn in turns[:-1]), turns
    return tuple(_laid_out(turns, template))


def chat_document(
    sample_id: str, turns: Sequence[Turn], template: Template, meta: Mapping[str, object]
) -> Document:
    """A conversation as it is stored."""
    return Document(sample_id=sample_id, kind=CHAT, parts=render(turns, template), meta=meta)


def _laid_out(turns: Sequence[Turn], template: Template) -> Iterable[Part]:
    if template.system is not None:
        yield template.system
    first, *later = turns
    pictures, words = _pictures_around(first.question)
    if later and pictures and words:
        yield from (markup(_USER), *pictures, markup(_CLOSE))
        first = Turn(words, first.answer)
    for number, turn in enumerate((first, *later)):
        if number:
            yield replace(markup(_CLOSE), answer=True)
        yield from (markup(_USER), *_parts(turn.question), markup(_ASSISTANT))
        yield from (replace(part, answer=True) for part in _parts(turn.answer))


def _parts(contents: Iterable[Content]) -> Iterable[Part]:
    """Blanks at both ends of a text go, as they do around special tokens and pictures."""
    for content in contents:
        if isinstance(content, Part):
            yield content
        elif content.strip():
            yield Part(modality=Modality.text, text=content.strip())


def _pictures_around(
    question: tuple[Content, ...],
) -> tuple[tuple[Part, ...], tuple[Content, ...]]:
    """The pictures before and after the words of a question, and the words."""
    places = [i for i, content in enumerate(question) if isinstance(content, str)]
    places = [i for i in places if str(question[i]).strip()]
    if not places:
        return (), ()
    first, last = places[0], places[-1] + 1
    around = (*question[:first], *question[last:])
    return tuple(part for part in around if isinstance(part, Part)), question[first:last]
