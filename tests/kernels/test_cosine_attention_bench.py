"""The benchmark of cosine attention runs to its end; a GPU is only needed for its numbers."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from torch.nn.attention import SDPBackend

from kernels import measure
from kernels.measure import Ceilings, Time


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, on the host with small problems and a clock that always says 10 microseconds."""
    path = repository / "kernels" / "bench" / "cosine_attention.py"
    spec = importlib.util.spec_from_file_location("bench_of_cosine_attention", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def time_of(calls: Sequence[Callable[[], object]]) -> Time:
        for call in calls:
            call()
        return Time(10.0, 9.0, 11.0)

    monkeypatch.setattr(script, "time_of", time_of)
    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script, "BASELINE", SDPBackend.MATH)
    monkeypatch.setattr(script, "LONG", (1, 2, 64, 64, 32))
    shapes = (("perceiver 4 x 32", (4, 2, 4, 32, 16), 0), ("windows of 8", (4, 2, 8, 8, 16), 1))
    monkeypatch.setattr(script, "SHAPES", tuple(script.Shape(*shape) for shape in shapes))
    monkeypatch.setattr(script, "ceilings", lambda: Ceilings(1e9, 1e12))
    monkeypatch.setattr(script, "compiled_unit", lambda: script.unit)
    monkeypatch.setattr(script, "rotations", lambda size: 2)
    monkeypatch.setattr(measure, "circumstances", lambda: {"gpu": "none"})
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return script


def test_it_measures_every_shape_in_both_directions(bench: ModuleType, tmp_path: Path) -> None:
    bench.measure_all()
    written = json.loads((tmp_path / "cosine_attention.json").read_text())
    assert [row["pass"] for row in written["rows"]] == ["forward", "backward"] * 2
    moved = bench.SHAPES[0].bytes_moved(backward=False)
    assert written["rows"][0]["of copy"] == pytest.approx(moved / 10e-6 / 1e9, abs=1e-3)
    table = (tmp_path / "cosine_attention.md").read_text()
    assert "perceiver 4 x 32" in table and "x normalise + cuDNN" in table
    assert "composed at 64 keys" in table and "scale 100" in table
    assert len(written["targets"]) == 2 + 1 + 3  # of the perceiver; speed and errors of composed


def test_a_baseline_that_does_not_run_leaves_a_gap(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def normalised_cudnn(*_: object, **__: object) -> None:
        raise RuntimeError("no plan for this head width")

    monkeypatch.setattr(bench, "normalised_cudnn", normalised_cudnn)
    rows = list(bench.small_rows(Ceilings(1e9, 1e12)))
    assert [row["x normalise + cuDNN"] for row in rows] == ["-"] * 4
    kept = dict(bench.small_targets(rows))
    assert [met for target, met in kept.items() if "cuDNN" in target] == [False]


def test_without_a_gpu_it_says_so_and_writes_nothing(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main() == 0
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())
