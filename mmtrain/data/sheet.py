"""Documents as the model sees them, and what of them it does not see, as rows to be drawn.

The kept parts are read back from the tokens: text is what the ids decode to, pictures are what the
vision tower gets, each with the rows of its group. What a rule or a limit cuts stands behind them,
pale.
"""

from collections.abc import Sequence

from PIL import Image

from mmtrain.data import images
from mmtrain.data.assemble import tokenize
from mmtrain.data.document import Document, Modality
from mmtrain.data.picture import Cut, Note
from mmtrain.data.rules import ImagePiece, Selection, TextPiece
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary

Row = list[str | Image.Image]
_PALE = 0.75  # of what is cut: that much white
_CUT_CHARACTERS, _CUT_IMAGES = 300, 12  # shown of a stretch, and of a document; a book may be cut


def rows_of(
    document: Document, selection: Selection, vocabulary: Vocabulary, layout: SequenceFormat
) -> list[Row]:
    """A heading, what is kept in order of training, and what is cut, if anything is."""
    sequence = tokenize(document, selection, vocabulary, layout)
    counts = f"{selection.positions} rows, {selection.images} images"
    heading: Row = [Note(f"{document.sample_id} ({document.kind}): {counts}")]
    kept: Row = []
    spans = iter(sequence.spans)
    for piece in selection.pieces:
        if isinstance(piece, ImagePiece):
            span = next(spans)
            kept.append(Note(f"[{span.start}:{span.start + span.length}]"))
            kept.append(shown(document.parts[piece.part].media[piece.item], layout))
        else:
            ids = vocabulary.encode_part(document.parts[piece.part])[piece.start : piece.stop]
            kept.append(_one_line(vocabulary.decode(ids)))
    if not selection.pieces:
        kept.append(Note("nothing is kept"))
    cut = _cut(document, selection, vocabulary, layout)
    return [heading, kept, *([[Note("cut:"), *cut]] if cut else [])]


def shown(blob: bytes, layout: SequenceFormat) -> str | Image.Image:
    """A picture as the vision tower gets it, or why it cannot be decoded."""
    try:
        pixels = images.pixels_of(blob, layout)
    except images.DecodeError as error:
        return Note(f"(an image that cannot be used: {error})")
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _cut(
    document: Document, selection: Selection, vocabulary: Vocabulary, layout: SequenceFormat
) -> Row:
    """Images and stretches of text that no piece takes, in stored order."""
    taken = {(p.part, p.item) for p in selection.pieces if isinstance(p, ImagePiece)}
    found: Row = []
    hidden = 0
    for number, part in enumerate(document.parts):
        if part.modality is Modality.text:
            pieces = [p for p in selection.pieces if isinstance(p, TextPiece) and p.part == number]
            ids = vocabulary.encode_part(part)
            for start, stop in _gaps([(p.start, p.stop) for p in pieces], len(ids)):
                text = _one_line(vocabulary.decode(ids[start:stop]))
                found.append(Cut(text[:_CUT_CHARACTERS]))
                if len(text) > _CUT_CHARACTERS:
                    found.append(Note(f"(and {len(text) - _CUT_CHARACTERS:,} characters)"))
            continue
        for item, blob in enumerate(part.media):
            if (number, item) in taken:
                continue
            hidden += 1
            if hidden <= _CUT_IMAGES:
                picture = shown(blob, layout)
                found.append(picture if isinstance(picture, str) else _pale(picture))
    if hidden > _CUT_IMAGES:
        found.append(Note(f"(and {hidden - _CUT_IMAGES} images)"))
    return found


def _gaps(taken: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The stretches of [0, length) that none of some stretches covers."""
    gaps, reached = [], 0
    for start, stop in sorted(taken):
        if start > reached:
            gaps.append((reached, start))
        reached = max(reached, stop)
    return [*gaps, (reached, length)] if reached < length else gaps


def _pale(picture: Image.Image) -> Image.Image:
    return Image.blend(picture, Image.new("RGB", picture.size, (255, 255, 255)), _PALE)


def _one_line(text: str) -> str:
    return " ".join(text.split())
