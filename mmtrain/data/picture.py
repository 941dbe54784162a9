"""A pack as a picture: each document a row of its images and words, in the order of training.

For TensorBoard and for looking at data before training on it. What is drawn is read back from
the batch, so a wrong slot, a lost image or a cut in the wrong place is seen. Where only some words
of a document are learnt (the answers of a conversation), those are green and underlined.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from mmtrain.data.batch import Batch
from mmtrain.data.images import to_picture
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import MARKUP, Vocabulary

_TEXT_SIZE = 13
_GAP = 6
_PAPER, _INK, _RULE = (255, 255, 255), (20, 20, 20), (190, 190, 190)
_LEARNT = (10, 110, 40)
_NOTE, _CUT = (150, 80, 20), (160, 160, 160)


class Learnt(str):
    """Words that are learnt, in a document of which other words are only read."""


class Note(str):
    """What is said about a document and does not stand in it."""


class Cut(str):
    """Words that the model does not see."""


@dataclass(frozen=True)
class _Word:
    token: int
    learnt: bool


def draw_pack(
    batch: Batch,
    vocabulary: Vocabulary,
    layout: SequenceFormat,
    *,
    width: int = 900,
    thumbnail: int = 64,
    documents: int = 24,
) -> Image.Image:
    """Draw the first documents of a micro-batch.

    Args:
        batch: as made by `Assembler`, with pixels.
        vocabulary: decodes the text.
        layout: special ids and normalisation of the pixels.
        width: of the picture, pixels.
        thumbnail: side of an image, pixels.
        documents: how many are drawn at most.

    Returns:
        An RGB picture; its height follows from what is drawn.
    """
    drawn = list(contents(batch, vocabulary, layout))[:documents]
    return draw_rows(drawn, width=width, thumbnail=thumbnail)


def draw_rows(
    contents: Sequence[Sequence[str | Image.Image]], *, width: int = 900, thumbnail: int = 64
) -> Image.Image:
    """Draw rows of words and pictures below each other.

    Args:
        contents: texts and pictures of each row, in order.
        width: of the picture, pixels.
        thumbnail: side of an image, pixels.
    """
    font = ImageFont.load_default(_TEXT_SIZE)
    rows = [_draw_document(row, font, width - 2 * _GAP, thumbnail) for row in contents]
    height = sum(row.height + 2 * _GAP for row in rows) + _GAP
    page = Image.new("RGB", (width, max(height, _TEXT_SIZE)), _PAPER)
    pen, top = ImageDraw.Draw(page), _GAP
    for row in rows:
        page.paste(row, (_GAP, top))
        top += row.height + _GAP
        pen.line((0, top, width, top), fill=_RULE)
        top += _GAP
    return page


def contents(
    batch: Batch, vocabulary: Vocabulary, layout: SequenceFormat
) -> Iterator[list[str | Image.Image]]:
    """Text and images of every document of a batch, in order.

    Of a document that is only learnt in parts, as a conversation is, those come as `Learnt`.
    """
    fields = {name: field.tolist() for name, field in batch.inputs.fields.items()}
    weights, tokens = batch.targets.weights["text"].tolist(), fields["tokens"]
    pixels = batch.inputs.hidden if batch.pixels is None else batch.pixels
    first_slots = fields["slots"][:: layout.visual_tokens]
    image_at = {row - 1: index for index, row in enumerate(first_slots) if row < len(tokens)}
    starts = [row for row, token in enumerate(tokens) if token == layout.bos]
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        while tokens[stop - 1] == layout.pad:
            stop -= 1
        row = start + 1
        pieces: list[_Word | Image.Image] = []
        while row < stop - 1:  # the last one is </s>
            if row in image_at:
                pieces.append(to_picture(pixels[image_at[row]], layout))
                row += layout.group_length
            else:
                pieces.append(_Word(tokens[row], weights[row - 1] > 0))
                row += 1
        yield list(_runs(pieces, vocabulary))


def _runs(
    pieces: Sequence[_Word | Image.Image], vocabulary: Vocabulary
) -> Iterator[str | Image.Image]:
    """Words joined to texts; special tokens of markup and changes of what is learnt part them."""
    marks = {vocabulary.ids[mark]: mark for mark in MARKUP if mark in vocabulary.ids}
    in_parts = not all(piece.learnt for piece in pieces if isinstance(piece, _Word))

    def kind(piece: _Word | Image.Image) -> object:
        if isinstance(piece, Image.Image) or piece.token in marks:
            return id(piece)  # stands alone
        return piece.learnt

    for _, group in groupby(pieces, kind):
        run = list(group)
        first = run[0]
        if isinstance(first, Image.Image):
            yield first
            continue
        words = [piece.token for piece in run if isinstance(piece, _Word)]
        text = marks.get(words[0]) or vocabulary.decode(words)
        yield Learnt(text) if in_parts and first.learnt else text


def _draw_document(
    content: Sequence[str | Image.Image],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    width: int,
    thumbnail: int,
) -> Image.Image:
    """Flow words and thumbnails from left to right, line by line."""
    line = thumbnail + _GAP
    places: list[tuple[float, int, str | Image.Image]] = []
    left, top, tall = 0.0, 0, False
    for item in content:
        for piece in map(type(item), item.split(" ")) if isinstance(item, str) else [item]:
            size = font.getlength(piece + " ") if isinstance(piece, str) else thumbnail + _GAP
            if left + size > width and left:
                left, top, tall = 0.0, top + (line if tall else _TEXT_SIZE + 4), False
            places.append((left, top, piece))
            left += size
            tall = tall or not isinstance(piece, str)
    row = Image.new("RGB", (width, top + (thumbnail if tall else _TEXT_SIZE + 4)), _PAPER)
    pen = ImageDraw.Draw(row)
    for left, top, piece in places:
        if isinstance(piece, Learnt):
            pen.text((left, top), piece, fill=_LEARNT, font=font)
            line_y = top + _TEXT_SIZE + 2
            pen.line((left, line_y, left + font.getlength(piece), line_y), fill=_LEARNT)
        elif isinstance(piece, str):
            ink = {Note: _NOTE, Cut: _CUT}.get(type(piece), _INK)
            pen.text((left, top), piece, fill=ink, font=font)
        else:
            row.paste(piece.resize((thumbnail, thumbnail)), (int(left), top))
    return row
