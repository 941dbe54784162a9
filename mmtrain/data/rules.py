"""Sequence rules: which parts of a document become a training sequence, in which order.

Pure functions of lengths and a seeded draw (Emu, arXiv:2307.05222, section 3.1 and appendix;
MMC4 sampling after OpenFlamingo), so a plan needs no media. An image or frame takes a whole
group of positions (begin, visual tokens, end) or none; text may be cut between tokens, but for
conversations, which lose whole turns. Every sequence is `<s>` ... `</s>`.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from mmtrain.data.choices import Overlong
from mmtrain.data.document import DocumentLengths, Modality, PartLength

WRAPPER_POSITIONS = 2  # <s> and </s>


class Rule(Enum):
    """How a stored document becomes a training sequence (specs of Emu, section 3.2)."""

    pair = "pair"  # one image, randomly before or after its text
    video = "video"  # frames of a clip as one block, randomly before or after its text
    document = "document"  # the whole interleaved page, cut at a group boundary when too long
    subsequence = "subsequence"  # MMC4 (a): a random window of the page, its first images
    sampled_images = "sampled_images"  # MMC4 (b): random images with their matched sentences
    storyboard = "storyboard"  # frames and subtitles on one time line
    text = "text"  # text only; images of the document are dropped
    chat = "chat"  # a conversation, whole turns from the first on; only answers are learnt


class FrameSampling(Enum):
    """Which frames of a clip are kept when it has too many; always in their order of time."""

    random = "random"  # as published for Emu
    uniform = "uniform"  # evenly spaced, the first and the last included


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """A rule and its limits.

    Attributes:
        rule: what is done.
        max_images: images and frames a sequence keeps.
        max_positions: length limit, image groups, `<s>` and `</s>` included.
        image_first: probability that an image stands before its text.
        frames: which frames of a clip are kept.
        overlong: what becomes of documents beyond `max_positions` (a plan's matter).
    """

    rule: Rule
    max_images: int = 5
    max_positions: int = 1024
    image_first: float = 0.5
    frames: FrameSampling = FrameSampling.random
    overlong: Overlong = Overlong.cut


@dataclass(frozen=True)
class TextPiece:
    """Tokens [start, stop) of a text part."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class ImagePiece:
    """Image `item` of an image part (0) or a frame of a video part."""

    part: int
    item: int


Piece = TextPiece | ImagePiece


@dataclass(frozen=True)
class Selection:
    """What a rule chose: `positions` counts the wrapper; no pieces = nothing to train on.

    `turns_left_out` counts the trailing turns of a conversation that had no room.
    """

    pieces: tuple[Piece, ...]
    positions: int
    images: int
    turns_left_out: int = 0


class Draw:
    """Random choices of one document, the same on every rank, platform and Python.

    Only `random.Random.random` is used, whose sequence Python promises to keep.
    """

    def __init__(self, *key: object) -> None:
        """Seed with (seed, epoch, source, sample id)."""
        digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def chance(self, probability: float) -> bool:
        """True with `probability`."""
        return self._random() < probability

    def below(self, bound: int) -> int:
        """A whole number in [0, bound)."""
        return int(self._random() * bound)

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._random()

    def subset(self, count: int, size: int) -> list[int]:
        """`size` of the numbers [0, count), ascending; all of them when count <= size."""
        if count <= size:
            return list(range(count))
        keys = [(self._random(), number) for number in range(count)]
        return sorted(number for _, number in sorted(keys)[:size])


def select(
    lengths: DocumentLengths, options: RuleOptions, group_length: int, draw: Draw
) -> Selection:
    """Apply a rule to a document of known lengths.

    Args:
        lengths: of the document's parts.
        options: the rule and its limits.
        group_length: positions of one image.
        draw: the document's random choices.
    """
    pieces = _RULES[options.rule](lengths.parts, options, group_length, draw)
    images = sum(isinstance(piece, ImagePiece) for piece in pieces)
    positions = WRAPPER_POSITIONS + _total(pieces, group_length)
    assert images <= options.max_images, (lengths.sample_id, images)
    assert positions <= max(options.max_positions, WRAPPER_POSITIONS), (
        lengths.sample_id,
        positions,
    )
    left_out = 0
    if options.rule is Rule.chat:
        last = pieces[-1].part if pieces else -1
        left_out = sum(turn.start > last for turn in turns(lengths.parts))
    return Selection(tuple(pieces), positions, images, left_out)


def _pair(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    return _block(_images(parts)[:1], parts, options, group_length, draw)


def _video(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    frames = _images(parts)
    # a clip never takes so many frames that no token of text fits beside them
    room = (options.max_positions - WRAPPER_POSITIONS - 1) // group_length
    keep = min(options.max_images, max(room, 1))
    if options.frames is FrameSampling.random:
        chosen = draw.subset(len(frames), keep)
    else:
        chosen = spaced(len(frames), keep)
    return _block([frames[index] for index in chosen], parts, options, group_length, draw)


def spaced(count: int, keep: int) -> list[int]:
    """At most `keep` of the numbers [0, count), evenly spaced with both ends."""
    if count <= keep:
        return list(range(count))
    if keep == 1:
        return [count // 2]
    return [(2 * index * (count - 1) + keep - 1) // (2 * (keep - 1)) for index in range(keep)]


def _block(
    images: Sequence[ImagePiece],
    parts: Sequence[PartLength],
    options: RuleOptions,
    group_length: int,
    draw: Draw,
) -> list[Piece]:
    """All images as one block before or after all text; the text gives way."""
    first = draw.chance(options.image_first)
    room = options.max_positions - WRAPPER_POSITIONS
    block = list(images[: min(options.max_images, max(room, 0) // group_length)])
    text = _fill(_texts(parts), room - len(block) * group_length, 0, group_length)
    return [*block, *text] if first else [*text, *block]


def _document(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    return _fill(
        _in_order(parts),
        options.max_positions - WRAPPER_POSITIONS,
        options.max_images,
        group_length,
    )


def _text(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    return _window(_texts(parts), options, group_length, draw)


def _subsequence(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    return _window(
        _beside_sentences(parts, _images(parts), options, draw), options, group_length, draw
    )


def _sampled_images(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    images = _images(parts)
    chosen = [images[index] for index in draw.subset(len(images), options.max_images)]
    matched = {sentence_of(parts, image.part) for image in chosen}
    ordered = [
        piece
        for piece in _beside_sentences(parts, chosen, options, draw)
        if isinstance(piece, ImagePiece) or piece.part in matched
    ]
    room = options.max_positions - WRAPPER_POSITIONS
    return _fill(ordered, room, options.max_images, group_length)


def _storyboard(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    pieces = [piece for piece in _in_order(parts) if _size(piece, group_length)]

    def when(piece: Piece) -> tuple[float, bool]:
        time = parts[piece.part].time
        assert time is not None
        return time, isinstance(piece, TextPiece)  # a frame precedes a subtitle of its second

    if all(parts[piece.part].time is not None for piece in pieces):
        pieces.sort(key=when)
    frames = [index for index, piece in enumerate(pieces) if isinstance(piece, ImagePiece)]
    if len(frames) > options.max_images:
        # a run of consecutive frames: from the text before its first one to the next frame
        begin = draw.below(len(frames) - options.max_images + 1)
        start = frames[begin - 1] + 1 if begin else 0
        end = begin + options.max_images
        stop = frames[end] if end < len(frames) else len(pieces)
        pieces = pieces[start:stop]
    return _window(pieces, options, group_length, draw)


def _chat(
    parts: Sequence[PartLength], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    """Turns in order while they fit; never a part of one, so no answer and no image is cut."""
    room = options.max_positions - WRAPPER_POSITIONS
    taken: list[Piece] = []
    images = 0
    for turn in turns(parts):
        own = _in_order(parts, turn)
        images += sum(isinstance(piece, ImagePiece) for piece in own)
        if images > options.max_images or _total(_unclosed(own, parts), group_length) > room:
            break
        room -= _total(own, group_length)
        taken += own
    return _unclosed(taken, parts)


def turns(parts: Sequence[PartLength]) -> list[range]:
    """The parts of each turn of a conversation: everything up to the end of an answer."""
    ends = [
        index + 1
        for index, part in enumerate(parts)
        if part.answer and not (index + 1 < len(parts) and parts[index + 1].answer)
    ]
    return [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _unclosed(pieces: Sequence[Piece], parts: Sequence[PartLength]) -> list[Piece]:
    """Without the mark that closes the last answer: the sequence's own `</s>` closes it."""
    end = len(pieces)
    while end and parts[pieces[end - 1].part].answer and parts[pieces[end - 1].part].markup:
        end -= 1
    return list(pieces[:end])


def _total(pieces: Sequence[Piece], group_length: int) -> int:
    return sum(_size(piece, group_length) for piece in pieces)


_RULES: dict[Rule, Callable[[Sequence[PartLength], RuleOptions, int, Draw], list[Piece]]] = {
    Rule.pair: _pair,
    Rule.video: _video,
    Rule.document: _document,
    Rule.subsequence: _subsequence,
    Rule.sampled_images: _sampled_images,
    Rule.storyboard: _storyboard,
    Rule.text: _text,
    Rule.chat: _chat,
}


def sentence_of(parts: Sequence[PartLength], image: int) -> int | None:
    """The text part that image part `image` belongs to: its match, else the next, else the last."""
    match = parts[image].match
    if match is not None:
        return match
    texts = [index for index, part in enumerate(parts) if part.modality is Modality.text]
    return next((index for index in texts if index > image), texts[-1] if texts else None)


def _beside_sentences(
    parts: Sequence[PartLength], images: Sequence[ImagePiece], options: RuleOptions, draw: Draw
) -> list[Piece]:
    """Sentences in order, each image randomly before or after the one it belongs to."""
    before: dict[int | None, list[Piece]] = {}
    after: dict[int | None, list[Piece]] = {}
    for image in images:
        side = before if draw.chance(options.image_first) else after
        side.setdefault(sentence_of(parts, image.part), []).append(image)
    pieces: list[Piece] = [*before.get(None, ()), *after.get(None, ())]
    for text in _texts(parts):
        pieces += [*before.get(text.part, ()), text, *after.get(text.part, ())]
    return pieces


def _window(
    pieces: Sequence[Piece], options: RuleOptions, group_length: int, draw: Draw
) -> list[Piece]:
    """A random run of pieces that fills the limit, or all of them when they fit."""
    room = options.max_positions - WRAPPER_POSITIONS
    total = sum(_size(piece, group_length) for piece in pieces)
    skip = draw.below(total - room + 1) if total > room > 0 else 0
    rest: list[Piece] = []
    for piece in pieces:
        size = _size(piece, group_length)
        if skip >= size:
            skip -= size
            continue
        if isinstance(piece, TextPiece):
            rest.append(TextPiece(piece.part, piece.start + skip, piece.stop))
        elif skip == 0:
            rest.append(piece)  # an image the window would cut is left out
        skip = 0
    return _fill(rest, room, options.max_images, group_length)


def _fill(pieces: Sequence[Piece], room: int, max_images: int, group_length: int) -> list[Piece]:
    """Take pieces in order up to the limits; stops where one does not fit, text is cut."""
    taken: list[Piece] = []
    images = 0
    for piece in pieces:
        if isinstance(piece, ImagePiece):
            if images == max_images:
                continue  # the first images are kept, the text goes on
            if room < group_length:
                break
            images += 1
            taken.append(piece)
        elif piece.stop > piece.start:
            cut = min(piece.stop, piece.start + max(room, 0))
            if cut == piece.start:
                break
            taken.append(TextPiece(piece.part, piece.start, cut))
        room -= _size(piece, group_length)
        if room <= 0:
            break
    return taken


def _in_order(parts: Sequence[PartLength], which: range | None = None) -> list[Piece]:
    pieces: list[Piece] = []
    for index in range(len(parts)) if which is None else which:
        if parts[index].modality is Modality.text:
            pieces.append(TextPiece(index, 0, parts[index].size))
        else:
            pieces += [ImagePiece(index, item) for item in range(parts[index].size)]
    return pieces


def _images(parts: Sequence[PartLength]) -> list[ImagePiece]:
    return [piece for piece in _in_order(parts) if isinstance(piece, ImagePiece)]


def _texts(parts: Sequence[PartLength]) -> list[TextPiece]:
    return [piece for piece in _in_order(parts) if isinstance(piece, TextPiece)]


def _size(piece: Piece, group_length: int) -> int:
    return group_length if isinstance(piece, ImagePiece) else piece.stop - piece.start
