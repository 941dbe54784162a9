"""The JSON that people have, as conversations: LLaVA, ShareGPT, Alpaca, VideoChat and others.

A reader takes one record and returns who says what, pictures and clips still by their names, or
raises `Dropped` with a reason that is counted. Nothing is repaired in silence: turns out of order,
empty turns and marks without pictures break a record. One thing is cut and counted: a last
question that nobody answered, which ShareGPT has often.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.data.document import Modality
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.errors import ContentError

_MARKS = re.compile(r"(<image>|<video>)")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


@dataclass(frozen=True)
class Reference:
    """A picture or clip by its name: a path, or a `data:` address."""

    modality: Modality
    name: str


Said = tuple[str | Reference, ...]


@dataclass(frozen=True)
class Conversation:
    """Who said what.

    Attributes:
        turns: questions and answers in order.
        system: the record's own system message, or empty.
        cut: questions at the end that had no answer.
    """

    turns: tuple[tuple[Said, Said], ...]
    system: str = ""
    cut: int = 0


@dataclass(frozen=True)
class Format:
    """A kind of records.

    Attributes:
        keys: what a record holds, for messages.
        fits: whether a record looks like one.
        read: record -> conversation; raises Dropped.
    """

    keys: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Conversation]


@dataclass(frozen=True)
class _Message:
    role: str
    said: Said


# --- readers -------------------------------------------------------------------------------


def _llava(record: Mapping[str, Any]) -> Conversation:
    messages = _messages(record, "conversations", "from", "value")
    return _conversation(_placed(messages, _media(record)), record)


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    """Without pictures of its own, what looks like a mark is text."""
    messages = _messages(record, "conversations", "from", "value")
    media = _media(record)
    return _conversation(_placed(messages, media) if media else messages, record)


def _openai(record: Mapping[str, Any]) -> Conversation:
    messages = _messages(record, "messages", "role", "content")
    media = _media(record)
    unnamed = [s for m in messages for s in m.said if isinstance(s, Reference) and not s.name]
    if unnamed:
        if [item.modality for item in media] != [said.modality for said in unnamed]:
            raise Dropped(
                Reason.marks, f"{len(unnamed)} parts name no picture, {len(media)} are named"
            )
        names = iter(media)
        messages = [
            _Message(m.role, tuple(next(names) if said in unnamed else said for said in m.said))
            for m in messages
        ]
    elif media:
        messages = _placed(messages, media)
    return _conversation(messages, record)


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    asked = [_text(record, "instruction"), _text(record, "input", "")]
    messages = [
        *_pairs(record),
        _Message("user", ("\n".join(text for text in asked if text.strip()),)),
        _Message("assistant", (_text(record, "output"),)),
    ]
    return _conversation(messages, record)


def _pairs(record: Mapping[str, Any]) -> list[_Message]:
    """Earlier turns: `history`, a list of [question, answer]."""
    messages = []
    for pair in _list(record, "history", ()):
        if not isinstance(pair, list) or [type(item) for item in pair] != [str, str]:
            raise Dropped(Reason.fields, "history holds no pairs of texts")
        messages += [_Message("user", (pair[0],)), _Message("assistant", (pair[1],))]
    return messages


def _videochat(record: Mapping[str, Any]) -> Conversation:
    messages: list[_Message] = []
    for number, pair in enumerate(_list(record, "QA"), 1):
        if not isinstance(pair, Mapping):
            raise Dropped(Reason.fields, f"QA {number} is {_kind(pair)}; wanted: a table of q, a")
        asked = [_text(pair, "i", ""), _text(pair, "q")]
        messages += [
            _Message("user", ("\n".join(text for text in asked if text.strip()),)),
            _Message("assistant", (_text(pair, "a"),)),
        ]
    return _conversation(_first(messages, _clip(record, "video")), record)


def _video_chatgpt(record: Mapping[str, Any]) -> Conversation:
    key = "video_id" if "video_id" in record else "video"
    messages = [
        _Message("user", (_text(record, "q"),)),
        _Message("assistant", (_text(record, "a"),)),
    ]
    return _conversation(_first(messages, _clip(record, key)), record)


def _is_talk(key: str, role: str, text: str) -> Callable[[Mapping[str, Any]], bool]:
    def fits(record: Mapping[str, Any]) -> bool:
        talk = record.get(key)
        return isinstance(talk, list) and any(
            isinstance(said, Mapping) and role in said and text in said for said in talk
        )

    return fits


def _shows(record: Mapping[str, Any]) -> bool:
    return any(record.get(key) for key in ("image", "images", "video", "videos"))


_FROM_VALUE = _is_talk("conversations", "from", "value")
FORMATS: Mapping[str, Format] = {
    "llava": Format(
        "image, conversations of from, value", lambda r: _FROM_VALUE(r) and _shows(r), _llava
    ),
    "sharegpt": Format("conversations of from, value", _FROM_VALUE, _sharegpt),
    "alpaca": Format(
        "instruction, input, output", lambda r: {"instruction", "output"} <= r.keys(), _alpaca
    ),
    "videochat": Format("video, QA of q, a", lambda r: "QA" in r, _videochat),
    "video-chatgpt": Format(
        "video_id, q, a",
        lambda r: {"q", "a"} <= r.keys() and bool({"video_id", "video"} & r.keys()),
        _video_chatgpt,
    ),
    "messages": Format(
        "messages of role, content", _is_talk("messages", "role", "content"), _openai
    ),
}


def detect(records: Sequence[Any], place: str) -> str:
    """The format that most of some records have; with pictures in one of them, not text alone.

    Raises:
        ContentError: they have none of the known ones.
    """
    tables = [record for record in records if isinstance(record, Mapping)]
    counts = Counter(
        name
        for record in tables
        for name in [next((n for n, known in FORMATS.items() if known.fits(record)), None)]
        if name is not None
    )
    if counts:
        name = counts.most_common(1)[0][0]
        return "llava" if name == "sharegpt" and counts["llava"] else name
    found = f"keys {', '.join(map(str, tables[0]))}" if tables else "no tables of keys"
    known = "; ".join(f"{name} ({form.keys})" for name, form in FORMATS.items())
    raise ContentError(
        f"{place} holds records of no known format (the first has {found}); name it with --format: "
        f"{known}"
    )


# --- who says what -------------------------------------------------------------------------


def _conversation(messages: Iterable[_Message], record: Mapping[str, Any]) -> Conversation:
    """Pair questions and answers; what stands before them is the system message."""
    said = list(messages)
    system = [_text(record, "system", "") or _text(record, "system_prompt", "")]
    while said and said[0].role == "system":
        system += [words for words in said.pop(0).said if isinstance(words, str)]
    for number, message in enumerate(said):
        wanted = ("user", "assistant")[number % 2]
        if message.role != wanted:
            raise Dropped(Reason.order, f"turn {number + 1} is of {message.role}, wanted: {wanted}")
        if not any(isinstance(part, Reference) or part.strip() for part in message.said):
            reason = Reason.unanswered if wanted == "assistant" else Reason.empty
            raise Dropped(reason, f"turn {number + 1}, of {wanted}, is empty")
    if len(said) < 2:
        raise Dropped(Reason.unanswered, "nobody answers" if said else "nobody says anything")
    pairs = zip(said[::2], said[1::2], strict=False)
    return Conversation(
        tuple((question.said, answer.said) for question, answer in pairs),
        "\n".join(text.strip() for text in system if text.strip()),
        len(said) % 2,
    )


def _messages(record: Mapping[str, Any], key: str, role: str, content: str) -> list[_Message]:
    messages = []
    for number, message in enumerate(_list(record, key), 1):
        if not isinstance(message, Mapping):
            raise Dropped(Reason.fields, f"{key} {number} is {_kind(message)}; wanted: a table")
        who = _text(message, role)
        if who.lower() not in _ROLES:
            known = ", ".join(_ROLES)
            raise Dropped(Reason.order, f"{key} {number}: unknown role {who!r}; known: {known}")
        messages.append(_Message(_ROLES[who.lower()], _said(message, content)))
    return messages


def _said(message: Mapping[str, Any], key: str) -> Said:
    content = message.get(key)
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        raise Dropped(Reason.fields, f"{key} is {_kind(content)}; wanted: text, or a list of parts")
    return tuple(_said_part(part) for part in content)


def _said_part(part: Any) -> str | Reference:
    """One part of an OpenAI-style content; a picture without a name stands for one of `images`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return _text(part, "text")
    if kind not in ("image", "image_url", "video", "video_url"):
        raise Dropped(Reason.fields, f"content holds {kind or _kind(part)!r}; wanted: text, image")
    modality = Modality(str(kind).removesuffix("_url"))
    place = part.get(kind, part.get("url", part.get("path")))
    if isinstance(place, Mapping):
        place = place.get("url", place.get("path"))
    return Reference(modality, "" if place is None else _name(place))


# --- pictures and clips --------------------------------------------------------------------


def _media(record: Mapping[str, Any]) -> list[Reference]:
    """What a record names under `image`, `images`, `video`, `videos`: one name or a list."""
    found = []
    for modality in (Modality.image, Modality.video):
        for key in (modality.value, modality.value + "s"):
            names = record.get(key)
            if names is None or names == "":
                continue
            for name in names if isinstance(names, list) else [names]:
                inner = name.get("path", name.get("url")) if isinstance(name, Mapping) else name
                found.append(Reference(modality, _name(inner)))
    return found


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Dropped(Reason.fields, f"a picture is named by {_kind(value)}; wanted: a path")
    return value


def _clip(record: Mapping[str, Any], key: str) -> list[Reference]:
    return [Reference(Modality.video, _name(record.get(key)))]


def _first(messages: Sequence[_Message], media: Sequence[Reference]) -> list[_Message]:
    """Pictures before the words of the first question."""
    number = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if number is None:
        return list(messages)  # out of order, or empty: found by `_conversation`
    asked = _Message("user", (*media, *messages[number].said))
    return [*messages[:number], asked, *messages[number + 1 :]]


def _placed(messages: Sequence[_Message], media: Sequence[Reference]) -> list[_Message]:
    """Put pictures where `<image>` and `<video>` stand; without any mark, first.

    Clips take the mark `<image>` too when the record has no picture: some files mark them so.
    """
    marks = [m for x in messages for said in x.said if isinstance(said, str) for m in _marked(said)]
    if media and not marks:
        return _first(messages, media)
    images = [item for item in media if item.modality is Modality.image]
    clips = [item for item in media if item.modality is Modality.video]
    if not images:
        marks = ["<video>" if mark == "<image>" and clips else mark for mark in marks]
    for mark, items in (("<image>", images), ("<video>", clips)):
        if marks.count(mark) != len(items):
            raise Dropped(
                Reason.marks, f"{marks.count(mark)} marks {mark}, {len(items)} named to stand there"
            )
    clip = iter(clips)
    waiting = {"<image>": iter(images) if images else clip, "<video>": clip}
    return [_Message(m.role, tuple(_filled(m.said, waiting))) for m in messages]


def _marked(text: str) -> list[str]:
    return _MARKS.findall(text)


def _filled(said: Said, waiting: Mapping[str, Any]) -> Iterable[str | Reference]:
    for part in said:
        if isinstance(part, Reference):
            yield part
            continue
        for piece in _MARKS.split(part):
            if piece in waiting:
                yield next(waiting[piece])
            elif piece.strip():
                yield piece


# --- fields --------------------------------------------------------------------------------


def _text(table: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """The text under a key, or the default where there is none."""
    value = table.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        found = _kind(value) if key in table else "missing"
        raise Dropped(Reason.fields, f"{key} is {found}; wanted: text")
    return value


def _list(table: Mapping[str, Any], key: str, default: Sequence[Any] | None = None) -> Any:
    value = table.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, list):
        found = _kind(value) if key in table else "missing"
        raise Dropped(Reason.fields, f"{key} is {found}; wanted: a list")
    return value


def _kind(value: Any) -> str:
    names = {dict: "a table", list: "a list", str: "a text", bool: "a truth value"}
    return "nothing" if value is None else names.get(type(value), "a number")
