#!/usr/bin/env python
"""Measure `mmtrain data ingest` against bare Pillow decoding of the same bytes.

    python tools/bench_ingest.py [--pictures 600] [--rounds 5]

Makes JPEGs of 512 px with captions in tars, in a temporary folder; ingests them through the
command line with one and with two workers, as they are and made smaller, and decodes the same bytes
with Pillow alone. Every figure is the median of the rounds, which take turns. Seconds of a core
count what all processes used, so they depend less on what else the machine does.
"""

import argparse
import contextlib
import io
import os
import platform
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from mmtrain.cli import main as mmtrain

SIDE = 512
TARS = 4


def pictures(count: int) -> list[bytes]:
    """JPEGs of smooth colours with some grain, as large as photographs of that size."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        rough = Image.fromarray(draw.integers(0, 256, (12, 12, 3), np.uint8))
        smooth = np.asarray(rough.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        grain = draw.normal(0, 6, (SIDE, SIDE, 1)).astype(np.float32)
        buffer = io.BytesIO()
        shown = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        shown.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def write_tars(folder: Path, blobs: list[bytes]) -> None:
    """Pairs, dealt out to a few tars."""
    folder.mkdir()
    for number in range(TARS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(number, len(blobs), TARS):
                caption = f"picture {index} of smooth colours with some grain".encode()
                for ending, content in (("jpg", blobs[index]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{index:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def decode(blobs: list[bytes]) -> None:
    """Pillow alone."""
    for blob in blobs:
        with Image.open(io.BytesIO(blob)) as picture:
            picture.convert("RGB")


def ingest(source: Path, out: Path, *options: str) -> None:
    """The command, whose folder goes."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = mmtrain(["data", "ingest", "webdataset", str(source), str(out), *options])
    assert code == 0, code
    shutil.rmtree(out)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        blobs = pictures(given.pictures)
        write_tars(folder / "tars", blobs)
        source, out = folder / "tars", folder / "out"
        ways: dict[str, Callable[[], None]] = {
            "Pillow alone, one process": lambda: decode(blobs),
            "ingest, 1 worker": lambda: ingest(source, out, "--workers", "1"),
            "ingest, 2 workers": lambda: ingest(source, out, "--workers", "2"),
            "ingest, 2 workers, --max-side 256": lambda: ingest(
                source, out, "--workers", "2", "--max-side", "256"
            ),
        }
        walls: dict[str, list[float]] = {name: [] for name in ways}
        cores: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                begun, worked = time.perf_counter(), core_seconds()
                way()
                walls[name].append(len(blobs) / (time.perf_counter() - begun))
                cores[name].append(len(blobs) / (core_seconds() - worked))
    size = sum(map(len, blobs)) / len(blobs)
    bare = statistics.median(cores["Pillow alone, one process"])
    print(
        f"{len(blobs)} JPEGs of {SIDE} px, {size / 1024:.0f} KiB each; {os.cpu_count()} cores, "
        f"load average {load:.2f} before the start; Python {platform.python_version()}, Pillow "
        f"{PIL.__version__}; median of {given.rounds} rounds (slowest to fastest)\n"
    )
    print("| way | pictures/s | pictures a second of a core | of Pillow alone |")
    print("| --- | --- | --- | --- |")
    for name in ways:
        ratio = statistics.median(cores[name]) / bare
        print(f"| {name} | {spread(walls[name])} | {spread(cores[name])} | {ratio:.2f} |")


def core_seconds() -> float:
    """What this process and the workers that have ended used."""
    return sum(os.times()[:4])


def spread(rates: list[float]) -> str:
    """Median, slowest and fastest."""
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


if __name__ == "__main__":
    main()
