"""Clips and storyboards: films, sheets and subtitles as documents, by the rules of their tools."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import counts, documents, ingest, manifest, shown, write_tar
from made import film, png
from PIL import Image

from mmtrain.data.document import Modality
from mmtrain.errors import ExitCode

CASES = json.loads((Path(__file__).parents[1] / "golden/emu_a/storyboard.json").read_text())[
    "cases"
]
LENIENT = ("--max-failures", "0.95")


def pixels(blob: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(blob)))


# --- WebVid --------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "pages").mkdir(parents=True)
    film(folder / "pages/11.mp4", 22)
    film(folder / "12.mp4", 5)
    (folder / "13.mp4").write_bytes((folder / "12.mp4").read_bytes()[:300])
    (folder / "14.mp4").write_bytes(b"#EXTM3U\n/etc/passwd\n")  # a playlist in a film's name
    return folder


def test_rows_of_webvid_are_clips_of_eight_frames_with_captions(
    tmp_path: Path, clips: Path
) -> None:
    rows = [
        "videoid,contentUrl,duration,page_dir,name",
        '11,https://a/11.mp4,PT2S,pages,"A wall, growing lighter"',
        "12,https://a/12.mp4,PT1S,pages,A short one",
        "13,https://a/13.mp4,PT1S,,A cut one",
        "14,https://a/14.mp4,PT1S,,A playlist",
        "15,https://a/15.mp4,PT1S,,A lost one",
        "../secret,https://a,PT1S,,One that leads out",
        "12,https://a/12.mp4,PT1S,, ",
        "12,too few",
    ]
    (tmp_path / "webvid.csv").write_text("\n".join(rows) + "\n")
    options = ("--images", clips, *LENIENT)
    assert ingest("webvid", tmp_path / "webvid.csv", tmp_path / "out", *options) == 0
    first, second = documents(tmp_path / "out")
    assert shown(first) == "(8)A wall, growing lighter" and shown(second) == "(5)A short one"
    assert first.parts[0].modality is Modality.video and first.meta == {"key": "11"}
    greys = [pixels(blob).mean() for blob in first.parts[0].media]
    assert greys == pytest.approx([24 * number for number in range(8)], abs=6)
    assert counts(tmp_path / "out")["dropped"] == {
        "fields": 1,
        "missing": 1,
        "no_text": 1,
        "outside": 1,
        "undecodable": 2,
    }
    smaller = ("--frames", 3, "--max-side", 32, "--reencode", "webp", *options)
    assert ingest("webvid", tmp_path / "webvid.csv", tmp_path / "small", *smaller) == 0
    frames = documents(tmp_path / "small")[0].parts[0].media
    assert [Image.open(io.BytesIO(b)).size for b in frames] == [(32, 24)] * 3
    assert {Image.open(io.BytesIO(b)).format for b in frames} == {"WEBP"}


def test_a_table_without_the_columns_of_webvid_is_refused(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("id,caption\n11,A wall\n")
    options = ("--images", clips)
    assert ingest("webvid", tmp_path / "a.csv", tmp_path / "out") == ExitCode.MISSING
    assert "webvid needs --images" in capsys.readouterr().err
    assert ingest("webvid", tmp_path / "a.csv", tmp_path / "out", *options) == ExitCode.CONTENT
    assert "has the columns id, caption; wanted: videoid and name" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("videoid,caption,page_dir\n11,A wall,pages\n")
    named = (*options, "--text", "caption")
    assert ingest("webvid", tmp_path / "a.csv", tmp_path / "out", *named) == 0


# --- storyboards ---------------------------------------------------------------------------


def write_sheets(folder: Path, case: dict[str, Any], form: str) -> None:
    """A golden case as a raw video: sheets, and a JSON of sb, duration, subtitle."""
    folder.mkdir(parents=True)
    given, sheets = case["input"], []
    for number, spec in enumerate(given["sheets"]):
        sheet = [0, 0, spec["cols"], spec["rows"], spec["n_frames"]] if spec else [0, 0, 1, 1, 1]
        sheets.append([*sheet, f"image/{form}"])
        if spec is None:
            continue
        rows, columns = spec["rows"], spec["cols"]
        height, width = spec["cell_height"], spec["cell_width"]
        grid = np.zeros((rows * height + spec.get("extra_height", 0), columns * width, 3), np.uint8)
        for y, x in np.ndindex(rows * height, columns * width):
            cell = spec["first_cell_id"] + (y // height) * columns + x // width
            grid[y, x] = cell, y % height, x % width
        path = folder / f"{case['name']}_M{number}.{form}"
        Image.fromarray(grid).save(path, **({"lossless": True} if form == "webp" else {}))
    told: dict[str, Any] = {"id": case["name"], "sb": sheets}
    if given["duration"] is not None:
        told["duration"] = given["duration"]
    if given["subtitles"] is not None:
        told["subtitle"] = given["subtitles"]
    (folder / "metadata.json").write_text(json.dumps(told))


@pytest.mark.parametrize("form", ["png", "webp"])
def test_raw_storyboards_give_exactly_what_the_released_tool_gives(
    tmp_path: Path, form: str
) -> None:
    for case in CASES:
        write_sheets(tmp_path / "raw" / case["name"], case, form)
    assert ingest("storyboard", tmp_path / "raw", tmp_path / "out", "--max-failures", 0) == 0
    found = {document.meta["key"]: document for document in documents(tmp_path / "out")}
    wanted = {case["name"]: case["expected"] for case in CASES if case["expected"] is not None}
    assert list(found) == sorted(wanted)
    skipped = len(CASES) - len(wanted)
    assert counts(tmp_path / "out")["dropped"] == {"untimed": skipped} and skipped == 2
    for name, expected in wanted.items():
        parts, told = list(found[name].parts), []
        while parts:
            text = parts.pop(0).text if parts[0].modality is Modality.text else ""
            frame = parts.pop(0) if parts and parts[0].media else None
            cell = None if frame is None else int(pixels(frame.media[0])[0, 0, 0])
            told.append((text, cell, None if frame is None else frame.time))
        times = [*expected["frame_times"], None]
        assert told == [
            (pair["text"], pair["frame_cell_id"], time)
            for pair, time in zip(expected["pairs"], times, strict=False)
        ]


def test_what_the_released_tool_wrote_is_read_back_with_its_times(tmp_path: Path) -> None:
    for case in CASES:
        expected = case["expected"]
        if expected is None:
            continue
        folder = tmp_path / "cut" / case["name"]
        folder.mkdir(parents=True)
        for pair in expected["pairs"]:
            (folder / f"{pair['index']}.txt").write_text(pair["text"])
            if pair["frame_cell_id"] is not None:
                (folder / f"{pair['index']}.png").write_bytes(png((pair["frame_cell_id"], 0, 0)))
        told = {"duration": case["input"]["duration"], "subtitle": case["input"]["subtitles"]}
        (folder / "final_meta.json").write_text(json.dumps(told))
        write_sheets(tmp_path / "raw" / case["name"], case, "png")
    tar = {
        f"{path.parent.name}.{path.name}": path.read_bytes()
        for path in sorted((tmp_path / "cut").glob("*/*"))
    }
    write_tar(tmp_path / "tars/0.tar", tar)
    for name in ("cut", "raw", "tars"):
        assert ingest("storyboard", tmp_path / name, tmp_path / f"of_{name}") == 0
    of_tars = documents(tmp_path / "of_tars")
    assert [d.parts for d in of_tars] == [d.parts for d in documents(tmp_path / "of_cut")]
    assert [d.meta for d in of_tars] == [d.meta for d in documents(tmp_path / "of_cut")]
    cut, raw = documents(tmp_path / "of_cut"), documents(tmp_path / "of_raw")
    for ours, theirs in zip(cut, raw, strict=True):
        assert [(p.modality, p.time) for p in ours.parts] == [
            (p.modality, p.time) for p in theirs.parts
        ]
        assert [p.text.split() for p in ours.parts] == [p.text.split() for p in theirs.parts]


def test_broken_storyboards_are_left_out_by_reason(tmp_path: Path) -> None:
    good = next(case for case in CASES if case["name"] == "a1_basic")
    videos = tmp_path / "videos"
    for name in ("good", "no_sheet", "cut", "lying", "turned", "link", "no_json", "times"):
        write_sheets(videos / name, good, "png")
    sheet = "a1_basic_M0.png"
    (videos / "no_sheet" / sheet).unlink()
    (videos / "cut" / sheet).write_bytes((videos / "cut" / sheet).read_bytes()[:60])
    told = json.loads((videos / "good/metadata.json").read_text())
    lying = told | {"sb": [[0, 0, 100_000, 100_000, 5, ""]]}
    (videos / "lying/metadata.json").write_text(json.dumps(lying))
    (videos / "turned/metadata.json").write_text(json.dumps(told | {"sb": [[0, 0, 2, 3, 99, ""]]}))
    (videos / "link" / sheet).unlink()
    (videos / "link" / sheet).symlink_to(videos / "good" / sheet)
    (videos / "no_json/metadata.json").write_text("{")
    bad = [{"text": "a", "start": "soon"}]
    (videos / "times/metadata.json").write_text(json.dumps(told | {"subtitle": bad}))
    (videos / "gap").mkdir()
    for member in ("0.png", "2.png", "2.txt"):
        (videos / "gap" / member).write_bytes(png((1, 1, 1)))
    (videos / "elsewhere").symlink_to(tmp_path)
    assert ingest("storyboard", videos, tmp_path / "out", *LENIENT) == 0
    assert [d.meta["key"] for d in documents(tmp_path / "out")] == ["good"]
    assert counts(tmp_path / "out")["dropped"] == {
        "fields": 3,
        "missing": 1,
        "no_image": 1,
        "outside": 2,
        "syntax": 1,
        "undecodable": 1,
    }


def test_frames_of_storyboards_are_made_smaller_and_reencoded(tmp_path: Path) -> None:
    good = next(case for case in CASES if case["name"] == "a1_basic")
    write_sheets(tmp_path / "videos/v", good, "png")
    options = ("--reencode", "jpeg", "--max-side", 2)
    assert ingest("storyboard", tmp_path / "videos", tmp_path / "out", *options) == 0
    frames = [p.media[0] for p in documents(tmp_path / "out")[0].parts if p.media]
    opened = [Image.open(io.BytesIO(blob)) for blob in frames]
    assert {(frame.format, max(frame.size)) for frame in opened} == {("JPEG", 2)}
    assert manifest(tmp_path / "out")["recipe"]["files"][0]["name"] == "videos"
    assert ingest("storyboard", tmp_path / "none", tmp_path / "o") == ExitCode.MISSING
