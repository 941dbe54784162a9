"""Pictures and their words from tars, tables and pages: what is kept, and what is left out why."""

import base64
import gzip
import io
import itertools
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import Json, counts, documents, files, ingest, shown, stopped, write_tar
from made import png
from PIL import Image

from mmtrain.data.document import Modality
from mmtrain.data.ingest.assignment import assign
from mmtrain.errors import ExitCode

RED, GREEN, BLUE = png((200, 30, 30)), png((30, 200, 30)), png((20, 20, 220))
LENIENT = ("--max-failures", "0.9")


def encoded(form: str, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 90).save(buffer, form)
    return buffer.getvalue()


def opened(blob: bytes) -> Image.Image:
    return Image.open(io.BytesIO(blob))


# --- WebDataset ----------------------------------------------------------------------------


def test_tars_of_laion_are_pictures_with_captions(tmp_path: Path) -> None:
    jpeg, webp = encoded("JPEG"), encoded("WEBP")
    told = json.dumps({"caption": "from json", "url": "http://a/b.jpg", "other": [1]}).encode()
    coco = json.dumps({"TEXT": "alt text", "top_caption": "a grey wall"}).encode()
    source = write_tar(
        tmp_path / "0.tar",
        {
            "0/0001.jpg": jpeg,
            "0/0001.txt": b" a grey wall \n",
            "0/0001.json": told,
            "0/0002.webp": webp,
            "0/0002.json": told,
            "0/0003.png": RED,
            "0/0003.json": coco,
            "0/readme.md": b"no part of a sample",
        },
    )
    assert ingest("webdataset", source, tmp_path / "out") == 0
    first, second, third = documents(tmp_path / "out")
    assert [shown(d) for d in (first, second, third)] == [
        "(1)a grey wall",
        "(1)from json",
        "(1)alt text",
    ]
    assert first.parts[0].media == (jpeg,) and second.parts[0].media == (webp,)  # as they were
    assert first.meta == {"key": "0/0001", "url": "http://a/b.jpg"} and first.kind == "caption"
    assert ingest("webdataset", source, tmp_path / "two", "--text", "top_caption", *LENIENT) == 0
    assert [shown(d) for d in documents(tmp_path / "two")] == ["(1)a grey wall"]


def test_broken_samples_of_a_tar_are_left_out_by_reason(tmp_path: Path, huge_png: bytes) -> None:
    broken = {
        "undecodable": {"jpg": RED[:-30], "txt": b"a"},
        "no_image": {"txt": b"a", "json": b"{}"},
        "no_text": {"png": RED, "txt": b" \n"},
        "text": {"png": RED, "txt": b"\xff\xfe"},
        "syntax": {"png": RED, "json": b"{"},
        "fields": {"png": RED, "json": b"[1]"},
    }
    members = {f"{name}.{end}": blob for name, own in broken.items() for end, blob in own.items()}
    members |= {"nul.png": RED, "nul.txt": b"a\0b", "bomb.png": huge_png, "bomb.txt": b"a"}
    members |= {"none.png": RED, "none.json": b'{"caption": null}', "good.png": RED}
    source = write_tar(tmp_path / "0.tar", members | {"good.txt": b"a wall"})
    assert ingest("webdataset", source, tmp_path / "out", *LENIENT) == 0
    expected = dict.fromkeys(broken, 1) | {"undecodable": 2, "text": 2, "no_text": 2}
    assert counts(tmp_path / "out")["dropped"] == expected
    (document,) = documents(tmp_path / "out")
    assert document.meta["key"] == "good"


@pytest.mark.parametrize("damage", ["cut", "header", "gzip", "none"])
def test_a_tar_that_breaks_off_is_counted_and_the_next_one_read(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {f"{n}.{end}": blob for n in range(6) for end, blob in (("png", RED), ("txt", b"a"))}
    path = write_tar(tmp_path / "src/0.tar", whole)
    write_tar(tmp_path / "src/1.tar", whole)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: 1024 * 7 + 600])  # in the text of the fourth
    elif damage == "header":
        content[1024 * 6 : 1024 * 6 + 100] = b"\xee" * 100  # the fourth's first
        path.write_bytes(content)
    elif damage == "gzip":
        path.unlink()
        (tmp_path / "src/0.tar.gz").write_bytes(gzip.compress(bytes(content))[:-200])
    else:
        path.write_bytes(b"no tar at all" * 100)
    assert ingest("webdataset", tmp_path / "src", tmp_path / "out", *LENIENT) == 0
    found = counts(tmp_path / "out")
    assert found["dropped"] == {"cut": 1}
    kept = [d.sample_id for d in documents(tmp_path / "out")]
    assert [name for name in kept if name[:2] == "1-"] == [f"1-{n:08d}" for n in range(1, 7)]
    assert len(kept) - 6 == {"cut": 3, "header": 2, "none": 0}.get(damage, len(kept) - 6)
    assert "the tar breaks off" in capsys.readouterr().err


def test_links_and_devices_of_a_tar_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.REGTYPE), ("a.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            info.size = len(RED) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(RED))
        pipe = tarfile.TarInfo("a.json")
        pipe.type = tarfile.FIFOTYPE
        tar.addfile(pipe)
    assert ingest("webdataset", tmp_path / "0.tar", tmp_path / "out") == ExitCode.CONTENT


# --- sizes and formats ---------------------------------------------------------------------


def test_pictures_are_made_smaller_and_reencoded_as_asked(tmp_path: Path) -> None:
    pictures = {
        "a.jpg": encoded("JPEG", (60, 40)),
        "b.png": encoded("PNG", (20, 80), "L"),
        "c.webp": encoded("WEBP", (30, 30)),
        "d.png": encoded("GIF", (50, 10)),
    }
    members = {
        name: blob
        for path, picture in pictures.items()
        for name, blob in ((path, picture), (f"{path[0]}.txt", b"a wall"))
    }
    source = write_tar(tmp_path / "0.tar", members)

    def stored(*options: object) -> list[bytes]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert ingest("webdataset", source, out, *options) == 0
        return [document.parts[0].media[0] for document in documents(out)]

    blobs = list(pictures.values())
    assert stored()[:3] == blobs[:3] and opened(stored()[3]).format == "PNG"
    smaller = stored("--max-side", 40)
    assert [opened(b).size for b in smaller] == [(40, 27), (10, 40), (30, 30), (40, 8)]
    assert [opened(b).format for b in smaller] == ["JPEG", "PNG", "WEBP", "PNG"]
    assert smaller[2] == blobs[2]  # not larger: as it was
    for form in ("jpeg", "png", "webp"):
        again = stored("--reencode", form)
        assert {opened(b).format for b in again} == {form.upper()}
        assert [opened(b).size for b in again] == [(60, 40), (20, 80), (30, 30), (50, 10)]
    assert stored("--reencode", "jpeg")[0] == blobs[0]  # is one
    assert opened(stored("--reencode", "webp", "--max-side", 10)[0]).size == (10, 7)


# --- parquet -------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, Any], rows: int = 3) -> Path:
    pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def test_parquet_of_img2dataset_is_pictures_with_captions(tmp_path: Path) -> None:
    many = 150
    source = write_parquet(
        tmp_path / "src/00000.parquet",
        {
            "jpg": [RED, None, GREEN[:40], *[BLUE] * many],
            "caption": ["a red wall", "lost", "cut", *[f"wall {n}" for n in range(many)]],
            "url": ["http://a", *[None] * (many + 2)],
            "key": [f"{n:09d}" for n in range(many + 3)],
        },
    )
    assert ingest("parquet", source.parent, tmp_path / "out") == 0
    found = documents(tmp_path / "out")
    assert [shown(d) for d in found] == ["(1)a red wall", *[f"(1)wall {n}" for n in range(many)]]
    assert found[0].meta == {"key": "000000000", "url": "http://a"}
    assert counts(tmp_path / "out")["dropped"] == {"no_image": 1, "undecodable": 1}
    assert found[1].sample_id == "00000-00000004"  # by its row


def test_obelics_is_pages_with_pictures_by_bytes_or_by_name(tmp_path: Path) -> None:
    pages: Json = {
        "texts": [["Dogs.", None, "Cats."], [None, "End"], ["no", None], ["a"], ["only words"]],
        "images": [[None, "a.png", None], ["b.png", None], [None, "c.png"], [None] * 2, [None]],
    }
    source = write_parquet(tmp_path / "names.parquet", pages)
    for name, blob in (("a", RED), ("b", BLUE)):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / f"pictures/{name}.png").write_bytes(blob)
    options = ("--images", tmp_path / "pictures", *LENIENT)
    assert ingest("parquet", source, tmp_path / "out", *options) == 0
    assert [shown(d) for d in documents(tmp_path / "out")] == ["Dogs.(1)Cats.", "(1)End"]
    assert documents(tmp_path / "out")[1].parts[0].media == (BLUE,)
    assert counts(tmp_path / "out")["dropped"] == {"missing": 1, "fields": 1, "no_image": 1}
    as_bytes = [[name and {"bytes": RED, "path": name} for name in own] for own in pages["images"]]
    source = write_parquet(tmp_path / "bytes.parquet", pages | {"images": as_bytes})
    assert ingest("parquet", source, tmp_path / "two", *LENIENT) == 0
    assert [shown(d) for d in documents(tmp_path / "two")] == ["Dogs.(1)Cats.", "(1)End", "no(1)"]


def test_columns_are_named_and_files_that_have_none_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_parquet(tmp_path / "0.parquet", {"photo": [RED], "words": ["a wall"]})
    assert ingest("parquet", source, tmp_path / "out") == ExitCode.CONTENT
    error = capsys.readouterr().err
    assert "holds the columns photo, words; wanted: texts and images, or one of caption" in error
    assert "name others by --text and --image" in error
    named = ("--text", "words", "--image", "photo")
    assert ingest("parquet", source, tmp_path / "out", *named) == 0
    assert shown(documents(tmp_path / "out")[0]) == "(1)a wall"
    assert ingest("parquet", source, tmp_path / "text", "--text", "words") == 0
    assert documents(tmp_path / "text")[0].kind == "text"


def test_a_damaged_parquet_file_is_one_broken_record(tmp_path: Path) -> None:
    columns = {"image": [RED] * 40, "text": [f"wall {n}" for n in range(40)]}
    for name in ("0", "1", "2"):
        write_parquet(tmp_path / f"src/{name}.parquet", columns)
    cut = tmp_path / "src/1.parquet"
    cut.write_bytes(cut.read_bytes()[:-50])
    turned = bytearray((tmp_path / "src/2.parquet").read_bytes())
    turned[len(turned) // 3 : len(turned) // 3 + 40] = b"\xff" * 40
    (tmp_path / "src/2.parquet").write_bytes(turned)
    assert ingest("parquet", tmp_path / "src", tmp_path / "out") == 0
    found = counts(tmp_path / "out")
    assert found["dropped"].get("cut") in (1, 2) and 40 < found["documents"] < 120


@pytest.mark.parametrize("large", [False, True])
def test_a_row_whose_text_is_no_unicode_is_left_out_alone(tmp_path: Path, large: bool) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    kind, raw = (pa.large_string, pa.large_binary) if large else (pa.string, pa.binary)
    words = pa.array([b"one", b"\xff\xfe", b"three"], raw()).view(kind())
    write_parquet(tmp_path / "0.parquet", {"image": [RED] * 3, "text": words})
    assert ingest("parquet", tmp_path / "0.parquet", tmp_path / "out", *LENIENT) == 0
    assert [shown(d) for d in documents(tmp_path / "out")] == ["(1)one", "(1)three"]
    assert counts(tmp_path / "out")["dropped"] == {"text": 1}


def test_without_pyarrow_the_way_to_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmtrain.data.ingest import tables

    monkeypatch.setattr(tables, "pa", None)
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    assert ingest("parquet", tmp_path, tmp_path / "out") == ExitCode.MISSING
    assert "pip install 'mmtrain[parquet]'" in capsys.readouterr().err


# --- Hugging Face --------------------------------------------------------------------------


def saved_to_disk(folder: Path, columns: list[dict[str, list[Any]]], **state: Any) -> Path:
    """What `save_to_disk` of datasets writes: Arrow streams, named in order by state.json."""
    pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(columns):05d}.arrow" for n in range(len(columns))]
    for name, own in zip(names, columns, strict=True):
        table = pa.table(own)
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as w,
        ):
            for batch in table.to_batches(2):
                w.write_batch(batch)
    listing = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(listing | state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_dataset_saved_to_disk_is_read_without_its_library(tmp_path: Path) -> None:
    pictures = [{"bytes": RED, "path": None}, {"bytes": None, "path": "b.png"}, None]
    columns = {"image": pictures, "text": ["red", "blue", "none"], "label": [1, 2, 3]}
    source = saved_to_disk(tmp_path / "set", [columns, columns])
    (source / "b.png").write_bytes(BLUE)
    options = ("--images", source, *LENIENT)
    assert ingest("huggingface", source, tmp_path / "out", *options) == 0
    assert [shown(d) for d in documents(tmp_path / "out")] == ["(1)red", "(1)blue"] * 2
    assert documents(tmp_path / "out")[1].parts[0].media == (BLUE,)
    assert counts(tmp_path / "out")["dropped"] == {"no_image": 2}
    texts = saved_to_disk(tmp_path / "texts", [{"text": ["one", "two", ""]}])
    assert ingest("huggingface", texts, tmp_path / "plain", *LENIENT) == 0
    assert [shown(d) for d in documents(tmp_path / "plain")] == ["one", "two"]


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_tables_go_on_in_the_middle_of_row_groups_and_batches(tmp_path: Path, kind: str) -> None:
    rows = {
        "image": [RED[:40] if n % 4 == 3 else png((10 * n, 0, 0)) for n in range(20)],
        "text": [f"wall {n}" for n in range(20)],
    }
    if kind == "parquet":
        for name in ("0", "1"):
            write_parquet(tmp_path / f"src/{name}.parquet", rows, rows=3)
    else:
        saved_to_disk(tmp_path / "src", [rows, rows])
    options = ("--max-failures", "0.3", "--shard-mb", "0.0001")
    assert ingest(kind, tmp_path / "src", tmp_path / "whole", *options) == 0
    assert len(documents(tmp_path / "whole")) == 30
    for shards in range(1, 30, 4):
        stopped(tmp_path / "src", tmp_path / "out", shards, kind, options)
    assert ingest(kind, tmp_path / "src", tmp_path / "out", *options) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_dataset_that_is_not_one_is_refused_by_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = [{"text": ["a"]}]
    splits = tmp_path / "splits"
    saved_to_disk(splits / "train", row)
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    picked = saved_to_disk(tmp_path / "picked", row, _indices_data_files=[{"filename": "i"}])
    escaping = saved_to_disk(tmp_path / "up", row, _data_files=[{"filename": "../x.arrow"}])
    lost = saved_to_disk(tmp_path / "lost", row, _data_files=[{"filename": "gone.arrow"}])
    torn = saved_to_disk(tmp_path / "torn", row)
    (torn / "state.json").write_text("{")
    cases = [
        (splits, ExitCode.CONTENT, "holds the splits train, test; name one of them"),
        (picked, ExitCode.CONTENT, "flatten_indices"),
        (escaping, ExitCode.CONTENT, "the index is forged"),
        (lost, ExitCode.MISSING, "gone.arrow is not there"),
        (torn, ExitCode.CONTENT, "is no JSON"),
        (tmp_path / "nowhere", ExitCode.MISSING, "is not there"),
    ]
    for source, code, said in cases:
        assert ingest("huggingface", source, tmp_path / "out") == code
        assert said in capsys.readouterr().err
    assert ingest("huggingface", splits / "train", tmp_path / "out") == 0


# --- MMC4 ----------------------------------------------------------------------------------


def page(similarity: list[list[float]] | None, names: list[str], sentences: int = 3) -> Json:
    """A page of sentences S0, S1, ..., with its own matches in order."""
    infos = [
        {"image_name": name, "matched_text_index": n % sentences, "matched_sim": 0.4 - 0.1 * n}
        for n, name in enumerate(names)
    ]
    record: Json = {
        "url": "http://a",
        "text_list": [f"S{n}." for n in range(sentences)],
        "image_info": infos,
    }
    return record if similarity is None else record | {"similarity_matrix": similarity}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, blob in (("a", RED), ("b", GREEN), ("c", BLUE)):
        (folder / f"{name}.png").write_bytes(blob)
    (folder / "cut.png").write_bytes(RED[:-30])
    return folder


def mmc4(folder: Path, records: list[Any], images: Path, *options: object) -> int:
    text = "\n".join(json.dumps(record) for record in records)
    (folder / "docs.jsonl").write_text(text)
    return ingest("mmc4", folder / "docs.jsonl", folder / "out", "--images", images, *options)


def test_pictures_of_mmc4_are_assigned_anew_among_those_that_are_there(
    tmp_path: Path, pictures: Path
) -> None:
    """The best sum, one to one: a and b both like S0 best, but b has another good one."""
    similarity = [[0.50, 0.10, 0.10], [0.60, 0.10, 0.55], [0.90, 0.0, 0.0], [0.0, 0.2, 0.0]]
    records = [page(similarity, ["a.png", "b.png", "gone.png", "c.png"])]
    assert mmc4(tmp_path, records, pictures) == 0
    (document,) = documents(tmp_path / "out")
    assert shown(document) == "(1)S0.S1.(1)S2." and document.kind == "page"
    assert [part.media for part in document.parts if part.media] == [(RED,), (GREEN,)]
    matched = [document.parts[part.match].text for part in document.parts if part.match is not None]
    assert matched == ["S0.", "S2."] and document.meta == {"url": "http://a"}
    assert counts(tmp_path / "out")["noted"] == {
        "pictures below the CLIP threshold, or without a sentence": 1,
        "pictures of kept pages: picture or clip not there": 1,
    }


def test_without_a_matrix_the_records_own_matches_are_taken(tmp_path: Path, pictures: Path) -> None:
    records = [page(None, ["a.png", "b.png", "c.png"]), page(None, ["a.png"], 1)]
    assert mmc4(tmp_path, records, pictures, "--clip-threshold", "0.25") == 0
    assert [shown(d) for d in documents(tmp_path / "out")] == ["(1)S0.(1)S1.S2.", "(1)S0."]


def test_pages_below_the_threshold_are_left_out_by_rule_and_broken_ones_by_reason(
    tmp_path: Path, pictures: Path
) -> None:
    low = [page([[0.1, 0.31, 0.2]], ["a.png"])] * 8
    broken: list[tuple[Any, str]] = [
        (page([[0.5, 0.1, 0.1]], ["gone.png"]), "missing"),
        (page([[0.5, 0.1, 0.1]], ["cut.png"]), "undecodable"),
        (page([[0.5, 0.1, 0.1]], ["../secret.png"]), "outside"),
        (page([[0.5, 0.1, 0.1]], ["/etc/passwd"]), "outside"),
        (page([[0.5, 0.1, 0.1]], ["link.png"]), "outside"),
        (page([[0.5, 0.1]], ["a.png"]), "fields"),
        (page([[0.5, 0.1, "x"]], ["a.png"]), "fields"),
        (page([[0.5, 0.1, float("nan")]], ["a.png"]), "fields"),
        (page([], []), "no_image"),
        ({"text_list": ["a"]}, "fields"),
        (7, "fields"),
    ]
    (tmp_path / "secret.png").write_bytes(RED)
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    records = [*low, *[record for record, _ in broken], page([[0.5, 0.1, 0.1]], ["a.png"])]
    assert mmc4(tmp_path, records, pictures, "--max-failures", "0.6") == 0
    expected = {"threshold": 8}
    for _, reason in broken:
        expected[reason] = expected.get(reason, 0) + 1
    assert counts(tmp_path / "out")["dropped"] == expected
    assert len(documents(tmp_path / "out")) == 1
    # what a rule leaves out is no failure
    (tmp_path / "again").mkdir()
    kept = [*low, page([[0.5, 0.1, 0.1]], ["a.png"])]
    assert mmc4(tmp_path / "again", kept, pictures, "--max-failures", "0") == 0


def test_pages_come_zipped_and_pictures_in_tars_or_in_the_record(
    tmp_path: Path, pictures: Path
) -> None:
    records = [page([[0.5, 0.1, 0.1], [0.1, 0.5, 0.1]], ["a.png", "b.png"])] * 2
    assert mmc4(tmp_path, records, pictures) == 0
    plain = [(d.parts, d.meta) for d in documents(tmp_path / "out")]
    members = {f"x/{path.name}": path.read_bytes() for path in sorted(pictures.iterdir())}
    write_tar(tmp_path / "tars/0.tar", members)
    lines = "\n".join(json.dumps(record) for record in records)
    with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w") as archive:
        archive.writestr("docs_shard_0_v2.jsonl", lines)
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for number, name in enumerate(("docs_shard_0_v2.jsonl.zip", "docs.jsonl.gz")):
        options = ("--images", tmp_path / "tars")
        assert ingest("mmc4", tmp_path / name, tmp_path / f"o{number}", *options) == 0
        assert [(d.parts, d.meta) for d in documents(tmp_path / f"o{number}")] == plain
    for info, blob in zip(records[0]["image_info"], (RED, GREEN), strict=True):
        info |= {"image_name": "lost.png", "image_base64": base64.b64encode(blob).decode()}
    (tmp_path / "own").mkdir()
    assert mmc4(tmp_path / "own", records, pictures) == 0
    assert [(d.parts, d.meta) for d in documents(tmp_path / "own/out")] == plain


def test_archives_that_break_off_lose_their_rest_alone(tmp_path: Path, pictures: Path) -> None:
    noise = random.Random(0)
    record = page([[0.5, 0.1, 0.1]], ["a.png"])
    records = [record | {"noise": noise.randbytes(300).hex()} for _ in range(40)]
    lines = "\n".join(json.dumps(entry) for entry in records).encode()
    (tmp_path / "src").mkdir()
    (tmp_path / "src/0.jsonl.gz").write_bytes(gzip.compress(lines)[:-4000])
    (tmp_path / "src/1.jsonl.zip").write_bytes(b"PK no zip")
    (tmp_path / "src/2.jsonl").write_bytes(lines)
    assert ingest("mmc4", tmp_path / "src", tmp_path / "out", "--images", pictures) == 0
    found = counts(tmp_path / "out")
    assert found["dropped"]["syntax"] in (2, 3) and 60 < found["documents"] < 80


def test_a_folder_of_pictures_that_is_not_there_is_missing(tmp_path: Path) -> None:
    assert mmc4(tmp_path, [page([[0.5] * 3], ["a.png"])], tmp_path / "no") == ExitCode.MISSING
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/0.tar").write_bytes(b"no tar")
    assert mmc4(tmp_path, [page([[0.5] * 3], ["a.png"])], tmp_path / "tars") == ExitCode.CONTENT


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 4), (4, 1), (3, 3), (3, 5), (5, 3), (0, 3)])
def test_an_assignment_is_the_best_of_all(rows: int, columns: int) -> None:
    draw = np.random.default_rng(rows * 10 + columns)
    for _ in range(20):
        gain = draw.normal(size=(rows, columns)).round(1)
        pairs = assign(gain)
        assert len({row for row, _ in pairs}) == len({c for _, c in pairs}) == min(rows, columns)
        best = max(
            sum(gain[row, column] for row, column in zip(chosen, order, strict=True))
            for chosen in itertools.combinations(range(rows), min(rows, columns))
            for order in itertools.permutations(range(columns), min(rows, columns))
        )
        assert sum(gain[pair] for pair in pairs) == pytest.approx(best)


# --- plain text ----------------------------------------------------------------------------


def test_lines_of_text_are_documents_and_broken_ones_are_counted(tmp_path: Path) -> None:
    lines = [
        '{"text": " one "}',
        '{"text": "two", "id": "b"}',
        '{"text": ""}',
        '{"text": 3}',
        '{"body": "x"}',
        '{"text": "half \\ud83d"}',
        '{"text": "nul \\u0000"}',
        "{",
        "[1]",
        '{"text": "[IMG] stays text"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert ingest("text", tmp_path / "a.jsonl", tmp_path / "out", *LENIENT) == 0
    found = documents(tmp_path / "out")
    assert [shown(d) for d in found] == ["one", "two", "[IMG] stays text"]
    assert all(part.modality is Modality.text and not part.markup for part in found[2].parts)
    assert found[1].meta == {"id": "b"}
    assert counts(tmp_path / "out")["dropped"] == {
        "fields": 3,
        "no_text": 1,
        "syntax": 1,
        "text": 2,
    }
    assert ingest("text", tmp_path / "a.jsonl", tmp_path / "b", "--text", "body", *LENIENT) == 0
    assert [shown(d) for d in documents(tmp_path / "b")] == ["x"]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A few runs of bytes taken out or replaced."""
    turned = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(turned))
        turned[at : at + draw.randrange(20)] = draw.randbytes(draw.randrange(20))
    return bytes(turned)


@pytest.mark.parametrize("kind", ["webdataset", "mmc4", "parquet", "huggingface"])
@pytest.mark.parametrize("mutations", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_nothing_of_a_mutated_source_is_a_crash(
    tmp_path: Path, kind: str, mutations: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes of archives, tables and JSON lines turned: a folder, or one clear refusal."""
    source, options = tmp_path / "source", list[object]()
    if kind == "webdataset":
        pairs = {f"{n}.{end}": b for n in range(4) for end, b in (("png", RED), ("txt", b"a"))}
        write_tar(source, pairs)
    elif kind == "mmc4":
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures/a.png").write_bytes(RED)
        options += ["--images", tmp_path / "pictures"]
        record = json.dumps(page([[0.5, 0.1, 0.1]], ["a.png"]))
        source.write_text("\n".join([record] * 4))
    else:
        rows = {"image": [RED] * 8, "text": [f"wall {n}" for n in range(8)]}
        made = {"parquet": write_parquet, "huggingface": saved_to_disk}[kind]
        made(tmp_path / "whole", rows if kind == "parquet" else [rows])
        found = tmp_path / "whole"
        source = found if kind == "parquet" else found / "data-00000-of-00001.arrow"
    whole, draw, codes = source.read_bytes(), random.Random(0), set[int]()
    for number in range(mutations):
        given = tmp_path / f"{number}.arrow"
        given.write_bytes(mutated(whole, draw))
        out = tmp_path / f"o{number}"
        code = ingest(kind, given, out, *options, "--max-failures", 1)
        assert code in (0, ExitCode.CONTENT, ExitCode.MISSING), capfd.readouterr().err
        codes.add(code)
        if not code:
            told = counts(out)
            assert told["records"] == told["documents"] + sum(told["dropped"].values())
            assert told["documents"] == len(documents(out))
    assert 0 in codes
