"""The tool behind docs/benchmarks.md runs and says what it promises."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


def test_one_run_measures_steps_packing_and_loader(repository: Path, tmp_path: Path) -> None:
    """It refuses to print a ratio unless both sides agree on loss and gradient norm."""
    few = ["--steps", "1", "--rounds", "1", "--seconds", "0", "--documents", "120"]
    done = subprocess.run(
        [sys.executable, "tools/bench_cpu.py", *few, "--recipes", "tiny", "--threads", "1"],
        cwd=repository,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 threads used" in done.stdout and "python tools/bench_cpu.py" in done.stdout
    sections = done.stdout.split("## ")
    titles = [section.partition("\n")[0] for section in sections[1:]]
    assert titles == ["A training step", "Packing", "The loader"]
    rows = [[line for line in part.splitlines() if line.startswith("| ")] for part in sections[1:]]
    assert [len(found) - 2 for found in rows] == [2, 2, 3]  # without head and rule
    assert not list(tmp_path.iterdir())  # its data are gone


def test_ingesting_is_measured_against_pillow_alone(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tool = str(repository / "tools/bench_ingest.py")
    monkeypatch.setattr(sys, "argv", [tool, "--pictures", "8", "--rounds", "1"])
    runpy.run_path(tool, run_name="__main__")
    out = capfd.readouterr().out
    assert "8 JPEGs of 512 px" in out and len(out.splitlines()) == 8


def test_the_reader_is_measured_against_pillow_and_what_is_installed(
    repository: Path, tmp_path: Path
) -> None:
    few = ["--documents", "6", "--rounds", "1", "--sides", "64"]
    done = subprocess.run(
        [sys.executable, "tools/bench_data.py", *few],
        cwd=repository,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "python tools/bench_data.py --documents 6" in done.stdout
    rows = [line.split(" | ")[1] for line in done.stdout.splitlines() if line.startswith("| 64 px")]
    assert rows[:4] == ["mmtrain", "mmtrain, exact", "Pillow, resized", "Pillow, decoded"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_packs_of_every_length_histogram_are_full_and_even(
    repository: Path, tmp_path: Path
) -> None:
    """The floors of the table in docs/benchmarks.md, at the look-ahead of 256."""
    done = subprocess.run(
        [
            *(sys.executable, "tools/bench_packing.py", "--documents", "1200"),
            *("--look-ahead", "256", "--json", str(tmp_path / "figures.json")),
        ],
        cwd=repository,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len([line for line in done.stdout.splitlines() if "| 256 |" in line]) == len(figures)
    for documents in ("laion captions", "mmc4 pages", "all three, as 14b_pretrain", "demo"):
        found = figures[f"{documents}/256/first_fit"]
        assert found["fill"] >= 0.96 and found["images"] <= 1.25, (documents, found)
        assert found["saved"] > 1.5, (documents, found)
    assert figures["storyboards/256/first_fit"]["fill"] > 0.92  # 8 images each: 5 or 4 a pack
    assert figures["mmc4 pages/256/first_fit"]["over_next_fit"] > 1.1
