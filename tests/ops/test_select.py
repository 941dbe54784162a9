"""Who runs an op: chosen by device, recipe and what is built; said with its reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmtrain.ops import extension, select
from mmtrain.ops.extension import Loaded, covers
from mmtrain.ops.select import Preference, QkBackend, qk_backend, table

GPU, HOST = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No choice of one test reaches another."""
    select._qk_backend.cache_clear()
    yield
    select.use(Preference.auto)
    select._qk_backend.cache_clear()


def built(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    monkeypatch.setattr(select, "load_kernels", lambda: loaded)


@pytest.mark.parametrize(
    "device, preference, loaded, expected",
    [
        (GPU, Preference.auto, Loaded(Path("a.so")), QkBackend.KERNEL),
        (GPU, Preference.cuda, Loaded(Path("a.so")), QkBackend.KERNEL),
        (GPU, Preference.torch, Loaded(Path("a.so")), QkBackend.CHAIN),
        (GPU, Preference.auto, Loaded(None, "not built"), QkBackend.CHAIN),
        (HOST, Preference.auto, Loaded(Path("a.so")), QkBackend.CHAIN),
    ],
)
def test_kernels_run_where_they_can_and_may(
    device: torch.device,
    preference: Preference,
    loaded: Loaded,
    expected: QkBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built(monkeypatch, loaded)
    select.use(preference)
    assert qk_backend(device) is expected


def test_the_table_says_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, Loaded(None, "no library is built; run the build"))
    rows = {row.op: row for row in table(GPU)}
    assert set(rows) == {"qk_norm_rope", "cosine_attention", "interval_attention"}
    assert rows["qk_norm_rope"].implementation == "torch"
    assert "run the build" in rows["qk_norm_rope"].reason
    assert "CUDA device" in next(iter(table(HOST))).reason
    built(monkeypatch, Loaded(Path("kernels.so")))
    select._qk_backend.cache_clear()
    assert "kernels.so" in str(next(iter(table(GPU))))
    select.use(Preference.torch)
    assert "ops.attention: torch" in str(next(iter(table(GPU))))


@pytest.mark.parametrize(
    "names, capability, runs",
    [
        (("sm_90a",), (9, 0), True),
        (("sm_90a",), (8, 0), False),
        (("sm_90a",), (10, 0), False),  # code of an `a` runs nowhere else
        (("sm_80",), (8, 9), True),
        (("sm_80",), (12, 0), True),  # by its PTX
        (("sm_100",), (10, 3), True),
        (("sm_100",), (9, 0), False),
        (("sm_80", "sm_90a"), (7, 5), False),
    ],
)
def test_a_library_serves_the_devices_it_has_code_for(
    names: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    assert covers(names, capability) is runs


def test_without_sources_or_library_the_reason_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = extension.load_kernels.__wrapped__
    monkeypatch.setenv("MMTRAIN_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load().reason == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "no library is built for sm_90" in load().reason
    assert f"run `python {extension.BUILD_SCRIPT}`" in load().reason
    monkeypatch.setattr(extension, "BUILD_SCRIPT", tmp_path / "kernels" / "build.py")
    assert "sources are not there" in load().reason
