"""What `data look` says of a folder of shards is what is in it."""

import json
from pathlib import Path

import numpy as np
import pytest
from made import document, lengths_source, png
from PIL import Image
from streaming.base.format.mds.writer import MDSWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmtrain.cli import main
from mmtrain.data.document import COLUMNS, Document, to_row
from mmtrain.data.lengths import collect
from mmtrain.data.look import View, look_at_shards
from mmtrain.data.picture import Cut, Note
from mmtrain.data.rules import Draw, Rule, RuleOptions, select
from mmtrain.data.shards import build_index, count, write_shards
from mmtrain.data.sheet import rows_of
from mmtrain.data.statistics import PERCENTILES, measure, per_document, spread
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary

RED, BLUE = (200, 30, 30), (20, 20, 220)
PAGE = document("p", "a red circle then", png(RED), "a blue square", png(BLUE), "last a green ring")


def kept_and_cut(
    page: Document, options: RuleOptions, vocabulary: Vocabulary, layout: SequenceFormat
) -> list[list[object]]:
    chosen = select(count(page, vocabulary), options, layout.group_length, Draw(0))
    rows = rows_of(page, chosen, vocabulary, layout)
    return [
        [x.getpixel((9, 9)) if isinstance(x, Image.Image) else (type(x), str(x)) for x in row]
        for row in rows
    ]


def test_a_document_is_shown_as_the_model_sees_it(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    options = RuleOptions(rule=Rule.document, max_positions=64)
    assert kept_and_cut(PAGE, options, vocabulary, layout) == [
        [(Note, "p (page): 25 rows, 2 images")],
        [
            (str, "a red circle then"),
            *((Note, "[5:10]"), RED),
            (str, "a blue square"),
            *((Note, "[13:18]"), BLUE),
            (str, "last a green ring"),
        ],
    ]


def test_what_the_limits_cut_stands_behind_it(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    options = RuleOptions(rule=Rule.document, max_positions=14, max_images=1)
    heading, kept, cut = kept_and_cut(PAGE, options, vocabulary, layout)
    assert heading == [(Note, "p (page): 14 rows, 1 images")]
    assert kept == [
        (str, "a red circle then"),
        *((Note, "[5:10]"), RED),
        (str, "a blue square"),
    ]
    pale = tuple(round(255 - (255 - channel) / 4) for channel in BLUE)
    assert cut[0] == (Note, "cut:") and cut[2:] == [(Cut, "last a green ring")]
    assert np.allclose(cut[1], pale, atol=1)  # type: ignore[arg-type]


def test_an_image_that_cannot_be_decoded_is_named(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    page = document("x", "a", png(RED)[:-40])
    options = RuleOptions(rule=Rule.document)
    _, kept = kept_and_cut(page, options, vocabulary, layout)
    assert kept[-1] == (Note, "(an image that cannot be used: truncated)")


def test_numbers_are_those_of_the_documents() -> None:
    sizes = [(0, 1), (3, 0), (5, 2), (900, 8), (17, 1)]
    lengths = lengths_source("p", sizes).lengths
    texts, images = per_document(lengths)
    assert texts.tolist() == [0, 3, 5, 900, 17] and images.tolist() == [1, 0, 2, 8, 1]
    found = measure(lengths, group_length=34)
    assert found.documents == 5 and found.kinds == {"page": 5} and not found.left_out
    assert found.text_tokens.total == 925 and found.images.total == 12
    assert found.positions.total == 925 + 12 * 34 + 5 * 2
    assert found.text_tokens.bounds == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert found.text_tokens.counts == [1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1]
    assert found.images.percentiles[50] == 1 and found.images.percentiles[100] == 8
    assert set(found.images.percentiles) == set(PERCENTILES)
    assert "512 to 1,023          1 ####" in found.described()


def test_no_documents_at_all() -> None:
    empty = collect([], fingerprint="f", dataset="d", shard_sizes=[])
    assert measure(empty, 5).documents == 0 and spread(np.array([], np.int64)).total == 0


@pytest.mark.parametrize("source", ["pages", "clips", "chat", "text", "boards"])
def test_the_command_writes_numbers_and_a_sheet(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    command = ["data", "look", str(world / source), "--tokenizer", str(world / "tokenizer")]
    limits = ["--max-tokens", "30", "--visual-tokens", "3", "--image-size", "28"]
    rest = ["--documents", "3", "--out", str(tmp_path / "out")]
    rule = ["--rule", "chat" if source == "chat" else "document"]
    board = ["--tensorboard", str(tmp_path / "board")]
    assert main([*command, *limits, *rule, *rest, *board]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out/statistics.json").read_text())
    assert f"{found['documents']:,} documents in 1 shards" in said and found["documents"] > 2
    assert Image.open(tmp_path / "out/documents.png").width == 900
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["images"] == [f"data/{source}"]
    assert len(events.Tags()["histograms"]) == 2


def test_documents_that_were_left_out_are_counted_and_named(
    tmp_path: Path, vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]
) -> None:
    row = to_row(PAGE)
    with MDSWriter(columns=COLUMNS, out=str(tmp_path / "rows")) as writer:
        writer.write(row)
        writer.write(row | {"id": "q", "parts": "[1]"})
    build_index(tmp_path / "rows", vocabulary)
    view = View(tokenizer=vocabulary.folder, visual_tokens=3, image_size=28)
    assert look_at_shards(tmp_path / "rows", view, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "2 documents in 1 shards: page 1\n1 left out: row is no document" in said


def test_what_is_missing_says_what_to_run(
    tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with write_shards(tmp_path / "new") as writer:
        writer.write(PAGE)
    tokenizer = str(world / "tokenizer")
    out = str(tmp_path / "out")
    command = ["data", "look", str(tmp_path / "new"), "--tokenizer", tokenizer, "--out", out]
    assert main(command) == 66
    assert "run `mmtrain data index" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as left:
        main(["data", "look", str(tmp_path / "new"), "--out", out])
    assert left.value.code == 2 and "needs --tokenizer DIR" in capsys.readouterr().err
