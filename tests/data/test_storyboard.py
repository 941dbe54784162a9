"""Storyboards are cut and timed exactly as the released tool does it (golden/emu_a)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtrain.data.document import Modality
from mmtrain.data.storyboard import (
    Sheet,
    Subtitle,
    cut_sheets,
    frame_times,
    storyboard_document,
    timeline,
)

CASES = json.loads((Path(__file__).parents[1] / "golden/emu_a/storyboard.json").read_text())[
    "cases"
]


def sheet_of(spec: dict[str, Any] | None) -> Sheet | None:
    if spec is None:
        return None
    rows, columns = spec["rows"], spec["cols"]
    height, width = spec["cell_height"], spec["cell_width"]
    tall = rows * height + spec.get("extra_height", 0)
    pixels = np.zeros((tall, columns * width, 3), np.uint8)
    for y in range(rows * height):
        for x in range(columns * width):
            cell = spec["first_cell_id"] + (y // height) * columns + x // width
            pixels[y, x] = cell, y % height, x % width
    return Sheet(Image.fromarray(pixels), rows, columns, spec["n_frames"])


def inputs(case: dict[str, Any]) -> tuple[list[Image.Image], float | None, list[Subtitle] | None]:
    given = case["input"]
    lines = given["subtitles"]
    subtitles = None if lines is None else [Subtitle(s["text"], s["start"]) for s in lines]
    return cut_sheets([sheet_of(spec) for spec in given["sheets"]]), given["duration"], subtitles


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_frames_and_subtitles_merge_as_in_the_released_tool(case: dict[str, Any]) -> None:
    frames, duration, subtitles = inputs(case)
    moments, expected = timeline(len(frames), duration, subtitles), case["expected"]
    if expected is None:
        assert moments is None
        return
    assert moments is not None and duration is not None
    assert len(frames) == expected["frame_num"]
    assert frame_times(len(frames), duration) == expected["frame_times"]
    found = [
        (moment.text, None if moment.frame is None else frames[moment.frame].getpixel((0, 0))[0])
        for moment in moments
    ]
    assert found == [(pair["text"], pair["frame_cell_id"]) for pair in expected["pairs"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_cells_are_cut_to_the_pixel(case: dict[str, Any]) -> None:
    frames, _, _ = inputs(case)
    for frame in frames:
        pixels = np.asarray(frame)
        assert len(np.unique(pixels[..., 0])) == 1
        assert (pixels[..., 1] == np.arange(frame.height)[:, None]).all()
        assert (pixels[..., 2] == np.arange(frame.width)[None, :]).all()


def test_a_stored_storyboard_sorted_by_its_times_keeps_the_order_of_the_tool() -> None:
    for case in CASES:
        frames, duration, subtitles = inputs(case)
        document = storyboard_document("v", frames, duration, subtitles)
        if case["expected"] is None:
            assert document is None
            continue
        assert document is not None and not document.problems()
        ordered = sorted(
            document.parts,
            key=lambda part: (part.time, part.modality is Modality.text),
        )
        assert ordered == list(document.parts)
        texts = [part.text for part in document.parts if part.modality is Modality.text]
        assert texts == [pair["text"] for pair in case["expected"]["pairs"] if pair["text"]]
