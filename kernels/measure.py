"""What every benchmark of a kernel needs: ceilings of the device, times, and where results go.

Rules: the copy and matmul rates are measured first, in the same process; times are those of CUDA
events, medians with the 20th and 80th percentile; inputs are random and rotate through more memory
than the L2 cache holds; results say hardware, versions and date, and losses are kept.
"""

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "bench"
ROTATED_BYTES = 512 * 2**20  # an H200 has 60 MB of L2
BUSY_CYCLES = 200_000_000  # a tenth of a second in which Python queues ahead of the device


@dataclass(frozen=True)
class Time:
    """Microseconds of one call."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile


@dataclass(frozen=True)
class Ceilings:
    """What the device reached before anything else was measured."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float


def time_of(calls: Sequence[Callable[[], object]], repeats: int = 60, warm_up: int = 10) -> Time:
    """Time of one call; `calls` are the same work on different memory, taken in turn."""
    for i in range(warm_up):
        calls[i % len(calls)]()
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in ("start", "stop")
    ]
    torch.cuda._sleep(BUSY_CYCLES)
    for i, (start, stop) in enumerate(zip(*events, strict=True)):
        start.record()
        calls[i % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(1e3 * a.elapsed_time(b) for a, b in zip(*events, strict=True))
    return Time(statistics.median(times), times[len(times) // 5], times[len(times) * 4 // 5])


def rotations(bytes_of_one_call: float) -> int:
    """How many sets of inputs a benchmark rotates through."""
    return max(2, min(64, -(-ROTATED_BYTES // int(bytes_of_one_call))))


def ceilings() -> Ceilings:
    """Bytes per second of a copy (read and write counted) and FLOP/s of a bf16 matmul."""
    x = torch.randn(2**29, device="cuda", dtype=torch.float16)  # 1 GiB
    y = torch.empty_like(x)
    size = 2 * x.numel() * x.element_size()
    copied = size / time_of([partial(y.copy_, x)]).median * 1e6
    del x, y
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192**3 / time_of([partial(torch.matmul, a, b)]).median * 1e6
    return Ceilings(copied, product)


def circumstances() -> dict[str, str]:
    """Hardware, versions and date."""
    query = "driver_version,clocks.max.sm,power.limit"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver, clock, power": done.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }


def write(
    name: str,
    title: str,
    limits: Ceilings,
    rows: Sequence[Mapping[str, object]],
    targets: Mapping[str, bool],
) -> None:
    """`kernels/bench/NAME.json` and a Markdown table beside it; prints the table."""
    facts = circumstances()
    RESULTS.mkdir(exist_ok=True)
    whole = {"circumstances": facts, "ceilings": asdict(limits), "rows": rows, "targets": targets}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    columns = list(rows[0])
    table = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    copy, matmul = limits.copy_bytes_per_second / 1e12, limits.matmul_flops_per_second / 1e12
    text = "\n".join(
        [
            f"# {title}",
            "",
            "; ".join(f"{key}: {value}" for key, value in facts.items()) + ".",
            f"In the same process: copy {copy:.2f} TB/s, bf16 matmul {matmul:.0f} TFLOP/s.",
            "",
            *(f"| {' | '.join(line)} |" for line in table),
            "",
            *(f"- {'reached' if met else 'MISSED'}: {target}" for target, met in targets.items()),
            "",
        ]
    )
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
