"""The benchmark of whole layers runs to its end; a GPU is only needed for its numbers."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import measure
from kernels.measure import Ceilings, Time
from mmtrain.ops import select
from mmtrain.ops.select import Preference


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script on the host, with small layers and a clock that is slower without kernels."""
    path = repository / "kernels" / "bench" / "layers.py"
    spec = importlib.util.spec_from_file_location("bench_of_layers", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def time_of(calls: Sequence[Callable[[], object]]) -> Time:
        for call in calls:
            call()
        return Time(30.0 if select._preferences[0] is Preference.torch else 20.0, 19.0, 31.0)

    monkeypatch.setattr(script, "time_of", time_of)
    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script, "LLAMA", (2, 6, 32, 2, 48))
    monkeypatch.setattr(script, "PERCEIVERS", ((3, 9),))
    sizes = {"LATENTS": 4, "WIDTH": 32, "HEADS": 2, "MLP_WIDTH": 48}
    for name, size in sizes.items():
        monkeypatch.setattr(script, name, size)
    monkeypatch.setattr(script, "ceilings", lambda: Ceilings(1e9, 1e12))
    monkeypatch.setattr(script, "compiled", lambda run: run)
    monkeypatch.setattr(select, "no_kernels", lambda: "")  # they are chosen, and do not run
    monkeypatch.setattr(script, "rotations", lambda size: 2)
    monkeypatch.setattr(measure, "circumstances", lambda: {"gpu": "none"})
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return script


def test_every_layer_is_measured_both_ways(bench: ModuleType, tmp_path: Path) -> None:
    bench.measure_all()
    written = json.loads((tmp_path / "layers.json").read_text())
    layers = [row["layer"] for row in written["rows"]]
    assert [name.split(",")[0] for name in layers] == ["LLaMA-7B block"] * 2 + [
        "perceiver layer"
    ] * 4
    assert {row["x eager"] for row in written["rows"]} == {1.5}
    assert {row["difference"] for row in written["rows"]} == {0.0}  # one formula on the host
    assert len(written["targets"]) == 12 and all(written["targets"].values())
    assert select._preferences[0] is Preference.auto
    assert "perceiver layer, cosine, 3 frames of 4 x 9" in (tmp_path / "layers.md").read_text()


def test_a_layer_that_loses_by_its_kernels_is_a_miss(bench: ModuleType) -> None:
    row = {"layer": "a", "pass": "forward", "x eager": 1.2, "x torch.compile": 0.9}
    assert list(bench.targets([row]).values()) == [True, False]


def test_nothing_is_timed_when_the_ways_disagree(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = bench.perceiver("cosine", 3, 9)
    run = case.run

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return run(x) * (1.1 if select._preferences[0] is Preference.cuda else 1.0)

    with pytest.raises(AssertionError, match="kernels differ by"):
        list(bench.rows_of(bench.Case(case.name, case.module, wrong, case.shape)))
    assert select._preferences[0] is Preference.auto


def test_the_shapes_are_those_of_the_models(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "bench_of_layers_as_it_is", repository / "kernels" / "bench" / "layers.py"
    )
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.DEVICE = "meta"
    with torch.device("meta"):
        block = script.perceiver("cosine", 1, 256).module
    weights = sum(parameter.numel() for parameter in block.parameters())
    assert weights == 4 * 1024**2 + 2 * 1024 * 4096 + 2 * 1024 + 16
    assert script.LLAMA[2:] == (4096, 32, 11008)


def test_without_a_gpu_it_says_so_and_writes_nothing(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main() == 0
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())
