"""Looking at a folder of shards: numbers of all its documents, pictures of some of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor

from mmtrain.data.document import SampleError
from mmtrain.data.folders import storage_errors
from mmtrain.data.picture import Note, draw_rows
from mmtrain.data.rules import Draw, Rule, RuleOptions, select
from mmtrain.data.shards import load_lengths, open_shards
from mmtrain.data.sheet import rows_of
from mmtrain.data.statistics import Statistics, measure, per_document
from mmtrain.data.tokens import SPECIAL_TOKENS, SequenceFormat
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.errors import ExitCode


@dataclass(frozen=True, kw_only=True)
class View:
    """How a folder of shards is looked at.

    Attributes:
        tokenizer: a Hugging Face folder; its lengths must have been counted.
        rule: how documents become sequences.
        max_tokens: positions of a sequence at most.
        max_images: images of a sequence at most.
        image_first: probability that an image stands before its text.
        visual_tokens: rows of an image.
        image_size: pixels a side that the vision tower gets.
        documents: how many are drawn.
        seed: of the rule's random choices.
    """

    tokenizer: Path
    rule: Rule = Rule.document
    max_tokens: int = 1024
    max_images: int = 5
    image_first: float = 0.5
    visual_tokens: int = 32
    image_size: int = 224
    documents: int = 16
    seed: int = 0


def look_at_shards(shards: Path, view: View, out: Path, board: Path | None = None) -> int:
    """Tell what a folder of shards holds, and draw some of its documents as the model sees them.

    Writes `statistics.json` and `documents.png` into `out`, and both for TensorBoard.

    Raises:
        MissingError: there are no shards, or no lengths for this tokenizer; says what to run.
        ContentError: they are damaged.
        StorageError: `out` cannot be written.
    """
    vocabulary = load_vocabulary(view.tokenizer)
    reader = open_shards(shards)
    lengths = load_lengths(reader, vocabulary)
    layout = SequenceFormat.of(
        vocabulary.require(SPECIAL_TOKENS),
        visual_tokens=view.visual_tokens,
        image_size=view.image_size,
    )
    found = measure(lengths, layout.group_length)
    make_folder(out)
    with storage_errors(out):
        (out / "statistics.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    print(found.described(), end="\n\n")
    options = RuleOptions(
        rule=view.rule,
        max_images=view.max_images,
        max_positions=view.max_tokens,
        image_first=view.image_first,
    )
    rows = []
    for number in _spread_out(len(lengths), view.documents):
        known = lengths.document(number)
        draw = Draw(view.seed, 0, shards.name, known.sample_id)
        selection = select(known, options, layout.group_length, draw)
        try:
            rows += rows_of(reader.document(number), selection, vocabulary, layout)
        except SampleError as error:
            rows.append([Note(f"{known.sample_id}: left out, {error.reason}")])
    page = draw_rows(rows, thumbnail=96)
    with storage_errors(out):
        page.save(out / "documents.png")
    with open_board(board) as writer:
        show(writer, f"data/{shards.name}", page, 0)
        _histograms(writer, shards.name, found, *per_document(lengths))
    print(f"{out / 'documents.png'}: {min(view.documents, len(lengths))} documents")
    print(f"{out / 'statistics.json'}")
    return ExitCode.DONE


def _spread_out(count: int, wanted: int) -> list[int]:
    """`wanted` numbers below `count`, evenly spaced, so that every shard has its chance."""
    return sorted({index * count // wanted for index in range(wanted)}) if count else []


def make_folder(out: Path) -> None:
    """Make a folder for what is drawn, if need be."""
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_board(folder: Path | None) -> Iterator[SummaryWriter | None]:
    """A TensorBoard folder to write to, or None where none is wanted."""
    if folder is None:
        yield None
        return
    with storage_errors(folder):
        writer = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def show(writer: SummaryWriter | None, name: str, page: Image, step: int) -> None:
    """Show a picture in TensorBoard, if that is wanted."""
    if writer is not None:
        writer.add_image(name, pil_to_tensor(page), step)


def _histograms(
    writer: SummaryWriter | None, name: str, found: Statistics, *values: object
) -> None:
    if writer is None:
        return
    for what, numbers in zip(("text_tokens", "images"), values, strict=True):
        writer.add_histogram(f"data/{name}/{what}", numbers)
    described = "    " + found.described().replace("\n", "\n    ")  # Markdown: as it is
    writer.add_text(f"data/{name}", described)
