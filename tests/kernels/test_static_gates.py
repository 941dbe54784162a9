"""What the CUDA compiler makes of the kernels, without running them: registers, spills, loads."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernels import build

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")

MOST_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor
# kernels with one block a multiprocessor, whose registers would not fit into 128
ROOMY = re.compile(r"backward_kernel<[^,]+, 8, 0, 1, \d>")
SPILLING: frozenset[str] = frozenset()  # kernels that may spill


@dataclass(frozen=True)
class Report:
    """ptxas' words on one kernel."""

    kernel: str
    registers: int
    spilled_bytes: int


@pytest.fixture(scope="module")
def compiled() -> Path:
    """K1 for sm_90a."""
    nvcc = build.find_nvcc()
    assert nvcc is not None
    return build.compile_kernels(build.SOURCES / "qk_norm_rope.cu", ["sm_90a"], nvcc)


@pytest.fixture(scope="module")
def code(compiled: Path) -> dict[str, list[str]]:
    """Its machine code."""
    return disassembled(compiled)


def reports(path: Path) -> Iterator[Report]:
    """The kernels of a compilation."""
    filter_ = shutil.which("c++filt") or shutil.which("cu++filt")
    text = path.with_suffix(".txt").read_text()
    if filter_:
        text = subprocess.run([filter_], input=text, capture_output=True, text=True).stdout
    for part in text.split("Compiling entry function '")[1:]:
        yield Report(
            part.partition("'")[0],
            int(re.search(r"Used (\d+) registers", part)[1]),  # type: ignore[index]
            sum(map(int, re.findall(r"(\d+) bytes spill", part))),
        )


def test_k1_compiles_in_two_minutes(compiled: Path) -> None:
    """Of one processor; a busy machine takes longer by the clock."""
    seconds, _, _ = compiled.with_suffix(".txt").read_text().partition(" s\n")
    assert float(seconds) < 120


def test_k1_spills_nothing_and_leaves_room_for_two_blocks(compiled: Path) -> None:
    found = list(reports(compiled))
    assert len(found) == 145
    assert {report.kernel for report in found if report.spilled_bytes} == SPILLING
    crowded = [r for r in found if r.registers > MOST_REGISTERS and not ROOMY.search(r.kernel)]
    assert crowded == []


@pytest.mark.parametrize("kernel, loads, stores", [("forward", 4, 4), ("backward", 4, 2)])
def test_k1_reads_and_writes_sixteen_bytes_at_a_time(
    code: dict[str, list[str]], kernel: str, loads: int, stores: int
) -> None:
    """Rows of 128 in bfloat16, forward two at once and backward one of x and one of dy."""
    mark = "4bf16ELi8ELi8ELi0ELi1E"  # V = 8, 8 lanes, no mean, halves
    (lines,) = (v for k, v in code.items() if f"{kernel}_kernel" in k and mark in k)
    first_store = next(i for i, line in enumerate(lines) if "STG.E" in line and ".128" in line)
    wide = [i for i, line in enumerate(lines) if "LDG.E" in line and ".128.CONSTANT" in line]
    assert len(wide) == loads
    assert max(wide) < first_store  # all are on their way before the first result
    assert sum("STG.E" in line and ".128" in line for line in lines) == stores
    assert not any(re.search(r"\b(LDL|STL)\b", line) for line in lines)


def disassembled(path: Path) -> dict[str, list[str]]:
    """Lines of code by kernel; skips the test without a disassembler."""
    tool = shutil.which("cuobjdump") or next(
        filter(None, (shutil.which("cuobjdump", path=str(p)) for p in _tool_folders())), None
    )
    if tool is None:
        pytest.skip("no cuobjdump here")
    done = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=False)
    if done.returncode or "Function :" not in done.stdout:
        pytest.skip(f"cuobjdump does not disassemble here: {done.stderr[:200]}")
    code: dict[str, list[str]] = {}
    for part in done.stdout.split("Function : ")[1:]:
        name, *lines = part.splitlines()
        code[name.strip()] = lines
    return code


def _tool_folders() -> Iterator[Path]:
    nvcc = build.find_nvcc()
    if nvcc:
        yield Path(nvcc).resolve().parent
    yield Path("/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")  # its wheel brings one
    if triton and triton.origin:
        yield Path(triton.origin).parent / "backends" / "nvidia" / "bin"
