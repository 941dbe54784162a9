"""K1 on a GPU: bytes per second against a copy, and time against eager torch and torch.compile.

    python kernels/bench/qk_norm_rope.py       # or: make gpu-bench

Writes qk_norm_rope.json and qk_norm_rope.md beside this file. Without a GPU nothing is measured
and nothing is written.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn import functional

from kernels import measure
from mmtrain.ops.extension import load_kernels
from mmtrain.ops.qk_norm_rope import Norm, Pairing, qk_norm_rope
from mmtrain.ops.rotary import rotary_tables

COPY_SHARE = {"forward": 0.88, "backward": 0.85}
OVER_COMPILE, OVER_EAGER, LEAST_MB = 1.1, 4.0, 16.0


@dataclass(frozen=True)
class Shape:
    """One problem; the first two have targets of their own."""

    name: str
    batch: int
    length: int
    heads: int
    key_heads: int
    width: int
    norm: Norm = Norm.RMS

    def model_bytes(self, direction: str) -> float:
        """What must be moved: each tensor once, statistics, tables."""
        rows = self.batch * self.length * (self.heads + self.key_heads)
        passes = 4 if direction == "forward" else 6
        statistics = 8 if self.norm is Norm.LAYER else 4
        table = self.length * (self.width // 2) * 8
        return rows * (passes * self.width + statistics) + table


SHAPES = (
    Shape("LLaMA, grouped", 4, 4096, 40, 8, 128),
    Shape("ViT-g", 256, 257, 16, 16, 88, Norm.LAYER),
    Shape("LLaMA-13B", 4, 4096, 40, 40, 128),
    Shape("24 heads", 16, 2048, 24, 24, 128),
    Shape("ViT-L", 64, 577, 16, 16, 64, Norm.LAYER),
    Shape("cosine", 4, 4096, 40, 8, 128, Norm.L2),
    Shape("16 MB", 1, 1024, 32, 32, 64),
    Shape("small", 1, 256, 16, 16, 64),
)


def chain(q: Tensor, k: Tensor, norm: Norm, parameters: list[Tensor], tables: tuple) -> tuple:
    """The same in torch's operations, as models write it."""

    def one(x: Tensor, parameter: Tensor) -> Tensor:
        if norm is Norm.RMS:
            x = functional.rms_norm(x, (x.shape[-1],), parameter, 1e-6)
        elif norm is Norm.LAYER:
            x = functional.layer_norm(x, (x.shape[-1],), parameter, parameter, 1e-6)
        else:
            x = functional.normalize(x, dim=-1, eps=1e-6) * parameter[:, None]
        a, b = x.chunk(2, -1)
        return x * cosine + torch.cat((-b, a), -1) * sine

    length = tables[0].shape[0]
    repeats = q.shape[0] // length
    cosine, sine = (torch.cat((t, t), -1).to(q.dtype).repeat(repeats, 1)[:, None] for t in tables)
    return one(q, parameters[0]), one(k, parameters[1])


def fused(q: Tensor, k: Tensor, norm: Norm, parameters: list[Tensor], tables: tuple) -> tuple:
    """The op."""
    both = (parameters[0], parameters[1])
    none = (None, None)
    return qk_norm_rope(
        q,
        k,
        norm=norm,
        weights=none if norm is Norm.L2 else both,
        biases=both if norm is Norm.LAYER else none,
        scales=both if norm is Norm.L2 else none,
        pairing=Pairing.HALVES,
        tables=tables,
    )


def times(shape: Shape, function: Callable[..., tuple]) -> dict[str, measure.Time]:
    """Forward and backward alone, on rotating inputs."""
    tokens, tables = (
        shape.batch * shape.length,
        rotary_tables(torch.arange(shape.length, device="cuda"), shape.width, 1e4),
    )
    tables = (tables[0].squeeze(1), tables[1].squeeze(1))
    sets = []
    for _ in range(measure.rotations(shape.model_bytes("forward"))):
        q, k = (
            torch.randn(
                tokens, heads, shape.width, device="cuda", dtype=torch.bfloat16
            ).requires_grad_()
            for heads in (shape.heads, shape.key_heads)
        )
        sizes = (shape.heads, shape.key_heads) if shape.norm is Norm.L2 else (shape.width,) * 2
        parameters = [torch.rand(size, device="cuda").bfloat16().requires_grad_() for size in sizes]
        sets.append((q, k, shape.norm, parameters, tables))
    outputs = [function(*inputs) for inputs in sets]
    upstream = [[torch.randn_like(y) for y in out] for out in outputs]

    def forward(i: int) -> Callable[[], object]:
        return lambda: function(*sets[i])

    def backward(i: int) -> Callable[[], object]:
        leaves = [*sets[i][:2], *sets[i][3]]
        return lambda: torch.autograd.grad(outputs[i], leaves, upstream[i], retain_graph=True)

    with torch.no_grad():
        ahead = measure.time_of([forward(i) for i in range(len(sets))])
    return {
        "forward": ahead,
        "backward": measure.time_of([backward(i) for i in range(len(sets))]),
    }


def rows_of(shape: Shape, limits: measure.Ceilings) -> list[dict[str, object]]:
    """The table's rows of one shape."""
    torch._dynamo.reset()
    ours, eager = times(shape, fused), times(shape, chain)
    compiled = times(shape, torch.compile(chain, fullgraph=True))
    rows = []
    for direction, time in ours.items():
        size = shape.model_bytes(direction)
        rate = size / time.median * 1e6
        rows.append(
            {
                "shape": f"{shape.name}: B{shape.batch} S{shape.length} "
                f"H{shape.heads}/{shape.key_heads} D{shape.width} {shape.norm.name.lower()}",
                "direction": direction,
                "MB": round(size / 1e6, 1),
                "us": f"{time.median:.1f} ({time.low:.1f} to {time.high:.1f})",
                "GB/s": round(rate / 1e9),
                "of copy": round(rate / limits.copy_bytes_per_second, 3),
                "x eager": round(eager[direction].median / time.median, 2),
                "x torch.compile": round(compiled[direction].median / time.median, 2),
            }
        )
    return rows


def targets(rows: list[dict[str, object]]) -> dict[str, bool]:
    """The targets and whether they are reached."""
    found = {}
    for row in rows[:4]:
        share = COPY_SHARE[str(row["direction"])]
        found[f"{row['shape']}, {row['direction']}: {share:.0%} of copy"] = (
            float(str(row["of copy"])) >= share
        )
    large = [row for row in rows if float(str(row["MB"])) >= LEAST_MB]
    for column, least in (("x torch.compile", OVER_COMPILE), ("x eager", OVER_EAGER)):
        found[f"{least}{column} at every size of {LEAST_MB:.0f} MB or more"] = all(
            float(str(row[column])) >= least for row in large
        )
    return found


def main() -> int:
    """Measure and write."""
    if not torch.cuda.is_available():
        print("qk_norm_rope: no CUDA device here, nothing was measured")
        return 0
    loaded = load_kernels()
    if loaded.path is None:
        print(f"qk_norm_rope: {loaded.reason}")
        return 1
    torch._functorch.config.donated_buffer = False  # backward graphs are run many times
    limits = measure.ceilings()
    rows = [row for shape in SHAPES for row in rows_of(shape, limits)]
    measure.write(
        "qk_norm_rope",
        "K1 qk_norm_rope: norm of queries and keys with the rotary embedding, bfloat16",
        limits,
        rows,
        targets(rows),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
