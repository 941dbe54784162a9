"""The emulator notices what a GPU would hide, and its number types are exact."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.build import SOURCES, emulator, find_host_compiler

pytestmark = pytest.mark.skipif(find_host_compiler() is None, reason="the emulator needs g++")

THREADS = 64
SOURCE = r"""
#include "SOURCES/simt.h"
enum Damage {
    none, no_barrier, missing_thread, inactive_lane, other_mask, misaligned, past_shared
};

// y[i] = x[n - 1 - i] by way of both kinds of shared memory and a shuffle
__global__ void reverse(const float* x, float* y, int damage) {
    SIMT_SHARED(float, fixed, 64);
    SIMT_DYNAMIC_SHARED(float, dynamic);
    const int i = threadIdx.x;
    fixed[i] = x[i];
    dynamic[63 - i] = x[i];
    if (damage == missing_thread && i == 3) return;
    if (damage != no_barrier) __syncthreads();
    float value = (fixed[63 - i] + dynamic[i]) / 2;
    if (damage == inactive_lane) __shfl_sync(1u << i % 32, value, i + 1);
    if (damage == other_mask) __shfl_sync(i % 32 < 16 ? 0xffffu : ~0u, value, 0);
    if (damage == misaligned) simt::load16(reinterpret_cast<const char*>(x) + 4 * i + 2);
    if (damage == past_shared) dynamic[64 + i % 2] = value;
    y[i] = __shfl_xor_sync(simt::full_mask, __shfl_xor_sync(simt::full_mask, value, 5), 5);
}
extern "C" int run(const float* x, float* y, int damage, int bytes) {
    return SIMT_LAUNCH(reverse, dim3(3), dim3(64), bytes, nullptr, x, y, damage);
}
extern "C" int run_allowed(const float* x, float* y, int bytes) {
    const int status = SIMT_ALLOW_SHARED(reverse, bytes);
    return status ? status : run(x, y, none, bytes);
}

template <class T>
void round_trip(const float* x, float* y, uint16_t* bits, int n) {
    for (int i = 0; i < n; i++) {
        const T rounded = simt::from_float<T>(x[i]);
        bits[i] = rounded.bits;
        y[i] = simt::to_float(rounded);
    }
}
extern "C" void to_bf16(const float* x, float* y, uint16_t* bits, int n) {
    round_trip<simt::bf16>(x, y, bits, n);
}
extern "C" void to_fp16(const float* x, float* y, uint16_t* bits, int n) {
    round_trip<simt::fp16>(x, y, bits, n);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    source = tmp_path_factory.mktemp("simt") / "reverse.cu"
    source.write_text(SOURCE.replace("SOURCES", str(SOURCES)))
    built = emulator([source])
    built.mmtrain_emulator_error.restype = ctypes.c_char_p
    yield built


def address(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def run(library: ctypes.CDLL, damage: int, bytes_: int = 256) -> tuple[int, bool, str]:
    """Status, whether the output is right, and the error's text."""
    x, y = torch.randn(THREADS), torch.full((THREADS,), float("nan"))
    status = library.run(address(x), address(y), damage, bytes_)
    return status, torch.equal(y, x.flip(0)), library.mmtrain_emulator_error().decode()


@pytest.mark.parametrize("seed", range(5))
def test_a_sound_kernel_runs_in_any_order(library: ctypes.CDLL, seed: int) -> None:
    library.mmtrain_emulator_seed(ctypes.c_uint64(seed))
    assert run(library, 0)[:2] == (0, True)


@pytest.mark.parametrize("seed", range(5))
def test_a_missing_barrier_reads_poison(library: ctypes.CDLL, seed: int) -> None:
    library.mmtrain_emulator_seed(ctypes.c_uint64(seed))
    x, y = torch.randn(THREADS), torch.zeros(THREADS)
    assert library.run(address(x), address(y), 1, 256) == 0
    assert y.isnan().any()


@pytest.mark.parametrize(
    "damage, text",
    [
        (2, "deadlock"),
        (3, "inactive lane"),
        (4, "with masks|deadlock"),
        (5, "16-byte access"),
        (6, "past its 256 bytes"),
    ],
)
def test_what_a_gpu_would_hide_is_an_error(library: ctypes.CDLL, damage: int, text: str) -> None:
    status, _, error = run(library, damage)
    assert status != 0
    assert any(part in error for part in text.split("|"))
    assert run(library, 0)[:2] == (0, True)  # the next launch is not harmed


def test_much_shared_memory_must_be_allowed_first(library: ctypes.CDLL) -> None:
    status, _, error = run(library, 0, 64 * 1024)
    assert status != 0 and "48 KB" in error
    x, y = torch.randn(THREADS), torch.zeros(THREADS)
    assert library.run_allowed(address(x), address(y), 64 * 1024) == 0
    assert library.run_allowed(address(x), address(y), 256 * 1024) != 0  # an SM has less


@pytest.mark.parametrize("name, kind", [("to_bf16", torch.bfloat16), ("to_fp16", torch.float16)])
def test_sixteen_bit_numbers_round_as_torch_rounds(
    library: ctypes.CDLL, name: str, kind: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind).float()
    between = (every + torch.nextafter(every, torch.tensor(torch.inf))) / 2
    middle = (every[:-1] + every[1:]) / 2  # ties
    x = torch.cat([every, between, middle, torch.randn(10000), torch.randn(10000) * 1e-6])
    x = x[~x.isnan()].contiguous()
    y, bits = torch.empty_like(x), torch.empty(len(x), dtype=torch.int16)
    getattr(library, name)(address(x), address(y), address(bits), len(x))
    assert torch.equal(bits, x.to(kind).view(torch.int16))
    assert torch.equal(y, x.to(kind).float())


def test_the_header_stands_alone(tmp_path: Path) -> None:
    source = tmp_path / "empty.cu"
    source.write_text(f'#include "{SOURCES}/simt.h"\nextern "C" int one() {{ return 1; }}\n')
    assert emulator([source]).one() == 1
