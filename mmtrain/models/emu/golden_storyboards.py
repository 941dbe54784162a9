"""Storyboards of a golden folder: sheets cut and subtitles merged as the released tool does it.

Sheets are drawn from their description: the first channel of every pixel is its cell, so a frame
says where it was cut from.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmtrain.data.storyboard import Sheet, Subtitle, cut_sheets, frame_times, timeline
from mmtrain.models.emu.golden import Comparison

NAME = "storyboard.json"


def storyboards(folder: Path) -> Iterator[Comparison]:
    """One comparison a case: how many entries differ; none when the folder has no storyboards."""
    path = folder / NAME
    if not path.is_file():
        return
    for case in json.loads(path.read_text())["cases"]:
        yield Comparison(f"storyboard {case['name']}", float(_differences(case)), 0.0)


def _differences(case: Mapping[str, Any]) -> int:
    given, expected = case["input"], case["expected"]
    frames = cut_sheets([draw_sheet(sheet) for sheet in given["sheets"]])
    lines = given["subtitles"]
    subtitles = None if lines is None else [Subtitle(s["text"], s["start"]) for s in lines]
    moments = timeline(len(frames), given["duration"], subtitles)
    if moments is None or expected is None:
        return int((moments is None) != (expected is None))
    found: list[Any] = [len(frames), *frame_times(len(frames), given["duration"])]
    found += [(m.text, None if m.frame is None else _cell(frames[m.frame])) for m in moments]
    wanted: list[Any] = [expected["frame_num"], *expected["frame_times"]]
    wanted += [(pair["text"], pair["frame_cell_id"]) for pair in expected["pairs"]]
    longest = max(len(found), len(wanted))
    return sum(found[i : i + 1] != wanted[i : i + 1] for i in range(longest))


def _cell(frame: Image.Image) -> int:
    """The cell a frame was cut from; -1 when it holds pixels of several."""
    cells = np.unique(np.asarray(frame)[..., 0])
    return int(cells[0]) if len(cells) == 1 else -1


def draw_sheet(spec: Mapping[str, Any] | None) -> Sheet | None:
    """A sheet of a case; None for one that is missing."""
    if spec is None:
        return None
    rows, columns = spec["rows"], spec["cols"]
    height, width = spec["cell_height"], spec["cell_width"]
    pixels = np.zeros((rows * height + spec.get("extra_height", 0), columns * width, 3), np.uint8)
    y, x = np.mgrid[: rows * height, : columns * width]
    cell = spec["first_cell_id"] + (y // height) * columns + x // width
    pixels[: rows * height] = np.stack([cell, y % height, x % width], -1)
    return Sheet(Image.fromarray(pixels), rows, columns, spec["n_frames"])
