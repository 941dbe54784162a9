"""What nvcc makes of cosine attention: no unlisted spills, tensor cores and wide copies in use.

Compiles one of seven head widths; the slow tests compile all. Object files and reports are kept in
the cache of `kernels.build`.
"""

import importlib.util
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from kernels.build import (
    ARCHITECTURES,
    NVCC_FLAGS,
    SOURCES,
    cache_folder,
    content_hash,
    find_nvcc,
)

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")

SOURCE, SECONDS = SOURCES / "cosine_attention.cu", 120
# (kernel, depth, row tiles, pass) -> bytes stored, nvcc 13.0, whichever of bf16 and fp16 has more
SPILLS = {
    ("forward", "112", "4"): 8,
    ("backward", "48", "2", "0"): 28,
    ("backward", "48", "4", "1"): 8,
    ("backward", "96", "4", "1"): 4,
    ("backward", "112", "2", "0"): 8,
    ("backward", "112", "4", "0"): 20,
    ("backward", "128", "4", "0"): 28,
}
QUERIES_PASS = "1"
KERNELS_OF_A_DEPTH = 2 + 4  # forward by rows of a block; backward by rows and pass
ALL_DEPTHS = (32, 48, 64, 80, 96, 112, 128)


@dataclass(frozen=True)
class Compiled:
    """An object file and what ptxas said of it.

    Attributes:
        path: of the object file.
        report: of `ptxas -v`.
        cpu_seconds: that the compiler took.
    """

    path: Path
    report: str
    cpu_seconds: float


@cache
def compiled(depths: tuple[int, ...]) -> Compiled:
    """Object code for sm_90a, from the cache if it is there."""
    cases = " ".join(f"CASE({depth})" for depth in depths)
    flags = [*NVCC_FLAGS, f"-gencode={ARCHITECTURES['sm_90a']}", "-Xptxas=-v"]
    flags.append(f"-DMMTRAIN_COSINE_DEPTHS(CASE)={cases}")
    path = cache_folder() / f"static-{content_hash([SOURCE], flags)}.o"
    report = path.with_suffix(".txt")
    if not report.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [str(find_nvcc()), *flags, "-c", str(SOURCE), "-o", str(path)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        report.write_text(f"{seconds}\n{done.stderr}")
    seconds_line, text = report.read_text().split("\n", 1)
    return Compiled(path, text, float(seconds_line))


def kernel_name(mangled: str) -> tuple[str, ...]:
    """Kernel, depth, row tiles and pass, as far as it has them."""
    found = re.search(r"cosine_attention_([a-z_]+)", mangled)
    assert found is not None, mangled
    return (found[1], *re.findall(r"Li(\d+)E", mangled), *re.findall(r"PassE(\d)", mangled))


def spills(report: str) -> dict[tuple[str, ...], int]:
    """Bytes that each kernel stores of spilled registers, if any."""
    found: dict[tuple[str, ...], int] = {}
    for block in report.split("Compiling entry function ")[1:]:
        name = kernel_name(block.split("'")[1])
        stored = re.search(r"(\d+) bytes spill stores", block)
        assert stored is not None
        found[name] = max(found.get(name, 0), int(stored[1]))
    return {name: count for name, count in found.items() if count}


def unlisted(report: str) -> dict[tuple[str, ...], int]:
    return {k: n for k, n in spills(report).items() if n > SPILLS.get(k, 0)}


def find_cuobjdump() -> str | None:
    """Of the CUDA toolkit, or the one that triton's wheel brings."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else "/"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))


def instructions(path: Path) -> dict[tuple[str, ...], str]:
    """Machine code of each bf16 kernel."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")
    done = subprocess.run([cuobjdump, "-sass", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions = done.stdout.split("Function : ")[1:]
    return {kernel_name(f.split("\n", 1)[0]): f for f in functions if "bf16" in f.split("\n", 1)[0]}


def assert_uses_tensor_cores_and_wide_copies(code: dict[tuple[str, ...], str]) -> None:
    """Of every kernel that attends."""
    for name in code:
        if name[0] not in ("forward", "backward"):
            continue
        for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4"):
            assert instruction in code[name], f"{name} has no {instruction}"
        assert "LDGSTS.E.BYPASS.128" in code[name], f"{name} copies no 16 bytes at once"
        # the pass for queries alone stores dq by pairs, a row at a time
        if name[-1] != QUERIES_PASS or name[0] == "forward":
            assert re.search(r"STG\S*\.128", code[name]), f"{name} stores no 16 bytes at once"
        if name not in SPILLS:
            assert not re.search(r"\b(LDL|STL)\b", code[name]), f"{name} uses local memory"


def test_no_kernel_spills_that_is_not_listed() -> None:
    assert not unlisted(compiled((64,)).report)


def test_kernels_use_tensor_cores_and_copies_of_16_bytes() -> None:
    code = instructions(compiled((64,)).path)
    assert sum(name[0] in ("forward", "backward") for name in code) == KERNELS_OF_A_DEPTH
    assert_uses_tensor_cores_and_wide_copies(code)


@pytest.mark.slow
def test_all_widths_compile_in_two_minutes() -> None:
    assert compiled(ALL_DEPTHS).cpu_seconds < SECONDS


@pytest.mark.slow
def test_no_kernel_of_any_width_spills_that_is_not_listed() -> None:
    assert not unlisted(compiled(ALL_DEPTHS).report)


@pytest.mark.slow
def test_kernels_of_all_widths_use_tensor_cores_and_copies_of_16_bytes() -> None:
    code = instructions(compiled(ALL_DEPTHS).path)
    assert len(code) >= KERNELS_OF_A_DEPTH * len(ALL_DEPTHS)
    assert_uses_tensor_cores_and_wide_copies(code)
