"""Bytes that were changed at random cost their sample, their shard or the run; never a crash.

Every mutation ends in one of: the sample as it is, a fault that is counted, one of mmtrain's
errors. The whole is 2,000 mutations (`-m slow`); every tenth runs by default.
"""

import io
import json
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made import document, kept_source, png
from PIL import Image
from streaming.base.format.mds.writer import MDSWriter

from mmtrain.data import images
from mmtrain.data.assemble import Assembler
from mmtrain.data.document import COLUMNS, Document, SampleError, from_row, to_row
from mmtrain.data.loader import Loader
from mmtrain.data.mixture import Mixture, OnePass
from mmtrain.data.pack import Plan
from mmtrain.data.rules import Rule, RuleOptions
from mmtrain.data.shards import build_index, load_lengths, open_shards, write_shards
from mmtrain.data.sources import open_source
from mmtrain.data.tokens import SequenceFormat
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError, MissingError, MmtrainError

pytestmark = pytest.mark.filterwarnings("ignore")
SHARES = [
    pytest.param(10, id="a tenth"),
    pytest.param(1, id="all", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that goes on for five minutes hangs."""

    def end(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to four random changes; never the same bytes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.randrange(len(changed) + 1), draw.choice((1, 4, 64))
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at : at + length] = draw.randbytes(length)
        elif kind == 3:
            changed[at:at] = draw.randbytes(length)
        elif kind == 4:
            changed[at : at + length] = draw.choice((b"\0", b"\xff")) * length
        else:
            start = draw.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + 64]
    return bytes(changed) if changed != content else content[:-1] + bytes([content[-1] ^ 1])


def pictures() -> list[bytes]:
    """Small pictures of every kind a document may hold."""
    colours = np.random.default_rng(0).integers(0, 256, (24, 32, 4), np.uint8)
    smooth = Image.radial_gradient("L").resize((32, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb, rgba = Image.fromarray(colours[..., :3]), Image.fromarray(colours)
    wide = Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
    cases = [
        (rgb, "PNG", {}),
        (rgba, "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (wide, "PNG", {}),
        (smooth.convert("1"), "PNG", {}),
        (rgb, "PNG", {"save_all": True, "append_images": [smooth.convert("RGB")]}),
        (rgb, "JPEG", {"exif": exif}),
        (smooth, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "WEBP", {"exif": exif}),
        (rgba, "WEBP", {"lossless": True}),
        (rgb, "WEBP", {"save_all": True, "append_images": [smooth.convert("RGB")]}),
    ]
    found = []
    for picture, kind, options in cases:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


@pytest.mark.parametrize("every", SHARES)
def test_a_mutated_picture_is_a_picture_or_a_counted_fault(
    every: int, layout: SequenceFormat
) -> None:
    originals, faults = pictures(), 0
    for number in range(0, 900, every):
        blob = mutated(originals[number % len(originals)], random.Random(number))
        try:
            pixels = images.decode(blob, layout)
        except images.DecodeError as error:
            faults += 1
            assert str(error) in {
                *("empty", "damaged", "truncated", "no PNG, JPEG or WebP"),
                *(images.TOO_LARGE, images.LYING),
            }
        else:
            assert pixels.shape == (3, layout.image_size, layout.image_size)
            assert pixels.isfinite().all()
    assert 0.2 < faults * every / 900 < 0.95


def page(number: int) -> Document:
    return document(f"d{number}", f"page {number} é", png((number, 9, 200), 12), "and text")


@pytest.mark.parametrize("every", SHARES)
def test_a_mutated_row_is_a_document_or_a_fault_of_its_own(
    every: int, vocabulary: Vocabulary
) -> None:
    row = to_row(page(3)) | {"meta": '{"a": [1, {"b": null}]}'}
    faults = 0
    for number in range(0, 400, every):
        draw = random.Random(number)
        column = draw.choice(("parts", "parts", "meta", "media"))
        old = row[column] if isinstance(row[column], bytes) else row[column].encode()
        new = mutated(old, draw)
        try:
            text = new if column == "media" else new.decode()
            found = from_row(row | {column: text})
        except (SampleError, UnicodeDecodeError) as error:
            faults += 1
            assert not isinstance(error, SampleError) or error.reason
        else:
            assert not found.problems()
            for part in found.parts:
                vocabulary.encode_part(part)
    assert faults * every > 200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "pages"
    with write_shards(path, shard_bytes=2000) as writer:
        for number in range(12):
            writer.write(page(number))
    build_index(path, vocabulary)
    return path


def _spoilt(dataset: Path, target: Path, name: str, draw: random.Random) -> Path:
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(dataset, target)
    file = target / name
    file.write_bytes(mutated(file.read_bytes(), draw))
    return target


@pytest.mark.parametrize("every", SHARES)
def test_a_mutated_shard_is_found_before_it_is_used(
    every: int, dataset: Path, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """All of it by hash: not one mutation gets through."""
    names = sorted(path.name for path in dataset.glob("*.mds"))
    arrays = [f"{path.parent.name}/{path.name}" for path in dataset.glob("lengths-*/*.npy")]
    for number in range(0, 400, every):
        draw = random.Random(number)
        is_shard = bool(number % 4)
        name = draw.choice(names if is_shard else arrays)
        path = _spoilt(dataset, tmp_path / "spoilt", name, draw)
        with pytest.raises(ContentError, match=name.rpartition("/")[2].replace(".", r"\.")):
            shards = open_shards(path)
            load_lengths(shards, vocabulary)
            for document_number in range(len(shards)):
                shards.document(document_number)


@pytest.mark.parametrize("every", SHARES)
def test_a_mutated_index_is_read_or_refused(
    every: int, dataset: Path, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    refused = 0
    for number in range(0, 150, every):
        name = ("index.json", f"{next(dataset.glob('lengths-*')).name}/manifest.json")[number % 2]
        path = _spoilt(dataset, tmp_path / "spoilt", name, random.Random(number))
        try:
            shards = open_shards(path)
            load_lengths(shards, vocabulary)
            found = [shards.document(n) for n in range(len(shards))]
        except (ContentError, MissingError):
            refused += 1
        else:
            assert all(item in map(page, range(12)) for item in found)
    assert refused * every > 75


@pytest.mark.parametrize("every", SHARES)
def test_of_shards_without_hashes_every_loss_is_counted(
    every: int, dataset: Path, tmp_path: Path, vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    """Planned documents are those in the batches and those counted as failures, none between."""
    lost = 0
    for number in range(0, 150, every):
        draw = random.Random(number)
        path = tmp_path / "bare"
        if path.exists():
            shutil.rmtree(path)
        rows = [to_row(page(n)) for n in range(12)]
        with MDSWriter(columns=COLUMNS, out=str(path), size_limit=4000) as writer:
            for row in rows:
                writer.write(row)
        build_index(path, vocabulary)
        shard = path / "shard.00000.mds"
        content = shard.read_bytes()
        table = 4 * (2 + int.from_bytes(content[:4], "little"))
        body = mutated(content[table:], draw)[: len(content) - table]
        shard.write_bytes(content[:table] + body.ljust(len(content) - table, b"\0"))
        source = open_source("bare", path, vocabulary, RuleOptions(rule=Rule.document))
        plan = Plan(
            OnePass(source),
            group_length=layout.group_length,
            pack_tokens=64,
            pack_images=8,
            window_documents=12,
            seed=0,
        )
        loader = Loader(
            plan,
            Assembler(sources=[source], vocabulary=vocabulary, layout=layout, pack_tokens=64),
            global_batch_packs=plan.packs(),
            micro_batch_packs=1,
            decode_failures=1.0,
        )
        try:
            batches = loader.step(0)
        except MmtrainError as error:  # text of another length than was counted
            assert "the length index is stale" in str(error)
            continue
        used = [name for batch in batches for name in batch.info.sample_ids]
        assert len(used) + loader.failures.total() == loader.documents["bare"] == 12
        lost += loader.failures.total()
    assert lost > 0


def test_bad_rows_are_left_out_when_lengths_are_counted(
    tmp_path: Path, vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    def text(content: str) -> str:
        return json.dumps([{"modality": "text", "text": content}])

    good = to_row(page(0))
    rows = [
        good,
        good | {"id": "nul", "parts": text("a\0b"), "media": b""},
        good | {"id": "nul again", "parts": text("\0"), "media": b""},
        good | {"id": "half", "parts": '[{"modality": "text", "text": "\\ud83d"}]', "media": b""},
        good | {"id": "long", "parts": text("x" * ((1 << 22) + 1)), "media": b""},
        good | {"id": "json", "parts": "[{"},
        good | {"id": "list", "parts": "[1]"},
        good | {"id": "sizes", "media": b"x"},
        good | {"id": "good"},
    ]
    with MDSWriter(columns=COLUMNS, out=str(tmp_path / "rows"), hashes=["sha1"]) as writer:
        for row in rows:
            writer.write(row)
    report = build_index(tmp_path / "rows", vocabulary)
    expected = {
        "text holds NUL": 2,
        "text is no Unicode": 1,
        "text of more than 4,194,304 characters": 1,
        "row is no document": 3,
    }
    assert report.left_out == expected and report.documents == 9 and report.images == 2
    assert len(caplog.records) == 4 and "'nul'" in caplog.text
    assert build_index(tmp_path / "rows", vocabulary).left_out == expected  # from the index
    source = open_source("rows", tmp_path / "rows", vocabulary, RuleOptions(rule=Rule.document))
    plan = Plan(
        OnePass(source),
        group_length=5,
        pack_tokens=64,
        pack_images=8,
        window_documents=12,
        seed=0,
    )
    planned = [d.sample_id for n in range(plan.packs()) for d in plan.pack(n).documents]
    assert sorted(planned) == ["d0", "good"]


def test_text_that_is_no_utf_8_is_a_fault_of_its_row(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    with MDSWriter(columns=COLUMNS, out=str(tmp_path / "rows")) as writer:
        for number in range(3):
            writer.write(to_row(page(number)))
    shard = tmp_path / "rows/shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"page 1 \xc3\xa9", b"page 1 \xc3\xc3"))
    report = build_index(tmp_path / "rows", vocabulary)
    assert report.left_out == {"text is no UTF-8": 1}


def test_a_source_of_bad_rows_stops_the_run_and_the_others_do_not_pay_for_it(
    vocabulary: Vocabulary, layout: SequenceFormat
) -> None:
    class Spoilt:
        def document(self, number: int) -> Document:
            raise SampleError(f"document {number}: the row is not a document", "row is no document")

    options = RuleOptions(rule=Rule.document, max_positions=64)
    pages = [page(number) for number in range(12)]
    good = kept_source("good", pages, vocabulary, options)
    bad = replace(kept_source("bad", pages, vocabulary, options), documents=Spoilt(), weight=0.1)
    plan = Plan(
        Mixture([good, bad], seed=0),
        group_length=layout.group_length,
        pack_tokens=64,
        pack_images=8,
        window_documents=64,
        seed=0,
    )
    loader = Loader(
        plan,
        Assembler(sources=[good, bad], vocabulary=vocabulary, layout=layout, pack_tokens=64),
        global_batch_packs=8,
        micro_batch_packs=8,
        decode_failures={"good": 0.0, "bad": 0.005},
    )
    with pytest.raises(
        ContentError,
        match=r"source bad: 6 of \d+ documents cannot be used \(row is no document 6; .* "
        r"allowed is a share of 0\.005.* raise data\.sources\.bad\.decode_failures",
    ):
        for step in range(100):
            loader.step(step)
    assert loader.documents["good"] > 5 * loader.documents["bad"]
