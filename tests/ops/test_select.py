"""Who runs an op: chosen by device, recipe and what is built; said with its reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from mmtrain.errors import MissingError
from mmtrain.ops import extension, select
from mmtrain.ops.extension import Loaded, covers
from mmtrain.ops.select import Preference, QkBackend, Shapes, dense_backends, qk_backend, table

GPU, HOST = torch.device("cuda"), torch.device("cpu")
BF16 = torch.bfloat16
SHORT = (BF16, torch.float16)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No choice of one test reaches another."""
    select._qk_backend.cache_clear()
    select._dense_backends.cache_clear()
    yield
    select.use(Preference.auto)
    select._qk_backend.cache_clear()
    select._dense_backends.cache_clear()


def built(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    monkeypatch.setattr(select, "load_kernels", lambda: loaded)


def gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: int | None = 92400
) -> None:
    """A GPU whose backends say what torch 2.14 says of a plain call's type and head width."""
    takes = {
        "cudnn": lambda dtype, width: dtype in SHORT and width <= 128 and width % 8 == 0,
        "flash": lambda dtype, width: dtype in SHORT and width <= 256,
        "efficient": lambda dtype, width: dtype in (*SHORT, torch.float32) and width % 8 == 0,
    }
    for name, test in takes.items():
        monkeypatch.setattr(cuda, f"can_use_{name}_attention", lambda call, t=test: t(*call))
    monkeypatch.setattr(select, "_plain_call", lambda device, dtype, width: (dtype, width))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)


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


def test_kernels_that_are_insisted_on_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, Loaded(None, "no library is built; run the build"))
    with pytest.raises(MissingError, match=r"ops.attention: cuda, but .* run the build; or say"):
        select.use(Preference.cuda)


def test_the_table_says_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, Loaded(None, "no library is built; run the build"))
    gpu(monkeypatch, (9, 0))
    rows = {row.op: row for row in table(GPU, BF16)}
    ops = {"qk_norm_rope", "cosine_attention", "interval_attention", "dense_attention"}
    assert set(rows) == ops
    assert rows["qk_norm_rope"].implementation == "torch"
    assert "run the build" in rows["qk_norm_rope"].reason
    assert rows["dense_attention"].implementation == "cuDNN"
    assert rows["dense_attention"].reason == (
        "forced for bfloat16 on sm_90, then FlashAttention, efficient, math where it cannot"
    )
    host = {row.op: row for row in table(HOST, BF16)}
    assert "CUDA device" in host["qk_norm_rope"].reason
    assert "torch chooses on a cpu" in str(host["dense_attention"])
    built(monkeypatch, Loaded(Path("kernels.so")))
    select._qk_backend.cache_clear()
    assert "kernels.so" in str(next(iter(table(GPU, BF16))))
    select.use(Preference.torch)
    assert "ops.attention: torch" in str(next(iter(table(GPU, BF16))))


@pytest.mark.parametrize(
    "capability, version, dtype, width, shapes, expected",
    [
        ((9, 0), 92400, BF16, 128, Shapes.REPEATED, "cuDNN FlashAttention efficient math"),
        ((10, 0), 92400, torch.float16, 88, Shapes.REPEATED, "cuDNN FlashAttention efficient math"),
        ((9, 0), 92400, BF16, 128, Shapes.CHANGING, "FlashAttention efficient math"),
        ((9, 0), 91500, BF16, 128, Shapes.REPEATED, "FlashAttention efficient math"),
        ((9, 0), None, BF16, 128, Shapes.REPEATED, "FlashAttention efficient math"),
        ((8, 0), 92400, BF16, 128, Shapes.REPEATED, "FlashAttention efficient math"),
        ((12, 0), 92400, BF16, 128, Shapes.REPEATED, "FlashAttention efficient math"),
        ((9, 0), 92400, BF16, 192, Shapes.REPEATED, "FlashAttention efficient math"),
        ((9, 0), 92400, torch.float32, 64, Shapes.REPEATED, "efficient math"),
        ((9, 0), 92400, torch.float64, 64, Shapes.REPEATED, "math"),
    ],
)
def test_the_fastest_dense_attention_that_takes_the_calls_is_tried_first(
    capability: tuple[int, int],
    version: int | None,
    dtype: torch.dtype,
    width: int,
    shapes: Shapes,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, capability, version)
    found = dense_backends(GPU, dtype, width, shapes)
    assert " ".join(select._NAMES[backend] for backend in found) == expected


def test_a_backend_that_takes_no_call_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(cuda, "can_use_flash_attention", lambda call: False)
    assert SDPBackend.FLASH_ATTENTION not in dense_backends(GPU, BF16, 64)


def test_nothing_is_forced_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_plain_call", lambda *_: pytest.fail("a GPU is asked"))
    assert dense_backends(HOST, BF16, 64) == ()


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
