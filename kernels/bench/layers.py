"""What the kernels gain inside whole layers: a LLaMA-7B block and layers of a perceiver.

    python kernels/bench/layers.py       # or: make gpu-bench

The layers are those that models train: K1 in `nn.block.TransformerBlock` with RMS norms of queries
and keys and in `encoders.resampler.ResamplerBlock`, K2 and K3 in the latter with cosines
(Unified-IO 2 XXL: width 1024, 16 heads, perceptron 4096, 32 latents). Baselines are the same layer
with `ops.attention: torch`, eager and under torch.compile, which fuses norms and activations of the
whole layer too, while the layer with kernels runs eager. Weights and activations are bfloat16.

Writes layers.json and layers.md beside this file. Without a GPU nothing is measured or written.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from kernels.measure import Time, ceilings, rotations, time_of, write
from mmtrain.encoders.resampler import LatentAttention, ResamplerBlock
from mmtrain.nn.attention import Cosine, DotProduct, PackedAttention
from mmtrain.nn.block import TransformerBlock, keys_of
from mmtrain.nn.flow import Flow
from mmtrain.nn.masks import Intervals
from mmtrain.nn.mlp import GatedMlp
from mmtrain.nn.norm import RMSNorm
from mmtrain.ops import select
from mmtrain.ops.extension import load_kernels
from mmtrain.ops.select import Preference

DEVICE, EPS = "cuda", 1e-6
LARGEST_DIFFERENCE = 3e-2  # of two bf16 layers that round in different places
LLAMA = (2, 4096, 4096, 32, 11008)  # documents, their length, width, heads, perceptron
PERCEIVERS = ((256, 256), (128, 512), (96, 1024), (64, 2048))  # frames, features of each
LATENTS, WIDTH, HEADS, MLP_WIDTH = 32, 1024, 16, 4096

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer and what it reads.

    Attributes:
        name: with its sizes.
        module: the layer.
        run: the layer as a function of its largest input.
        shape: of that input.
    """

    name: str
    module: nn.Module
    run: Run
    shape: tuple[int, ...]


def llama() -> Case:
    """A block of LLaMA-7B with norms of queries and keys, over packed documents."""
    documents, length, width, heads, mlp_width = LLAMA
    q_norm, k_norm = (RMSNorm(width // heads, EPS) for _ in range(2))
    attention = PackedAttention(
        width, heads, kv_heads=heads, q_norm=q_norm, k_norm=k_norm, similarity=DotProduct()
    )
    block = TransformerBlock(
        norm1=RMSNorm(width, EPS),
        attention=attention,
        norm2=RMSNorm(width, EPS),
        mlp=GatedMlp(width, mlp_width),
        rope_theta=1e4,
    ).to(DEVICE, torch.bfloat16)
    rows = torch.arange(documents * length, device=DEVICE)
    seen = Intervals.causal_packed(rows // length)
    fields = {"positions": rows % length, "lo": seen.lo_T, "hi": seen.hi_T}
    flow = Flow(torch.empty(0, device=DEVICE), fields)  # shares tables and plan, as blocks do
    assert keys_of(flow).plan is not None

    def run(x: Tensor) -> Tensor:
        out: Tensor = block(flow.with_hidden(x)).hidden
        return out

    name = f"LLaMA-7B block, QK-norm, {documents} x {length} tokens"
    return Case(name, block, run, (documents * length, width))


def perceiver(kind: str, frames: int, keys: int) -> Case:
    """A layer of the resampler; of kind `cosine` or `QK-norm`."""
    norms: list[nn.Module] = [nn.Identity(), nn.Identity()]
    if kind == "QK-norm":
        norms = [RMSNorm(WIDTH // HEADS, EPS) for _ in range(2)]
    similarity = DotProduct() if kind == "QK-norm" else Cosine(HEADS)
    attention = LatentAttention(
        WIDTH, HEADS, q_norm=norms[0], k_norm=norms[1], similarity=similarity
    )
    block = ResamplerBlock(width=WIDTH, mlp_width=MLP_WIDTH, attention=attention, norm_eps=EPS)
    block.to(DEVICE, torch.bfloat16)
    latents = torch.randn(frames, LATENTS, WIDTH, device=DEVICE, dtype=torch.bfloat16)

    def run(context: Tensor) -> Tensor:
        out: Tensor = block(latents, context, None)
        return out

    name = f"perceiver layer, {kind}, {frames} frames of {LATENTS} x {keys}"
    return Case(name, block, run, (frames, keys, WIDTH))


def cases() -> Iterator[Case]:
    """Every layer, one at a time in memory."""
    yield llama()
    for kind in ("cosine", "QK-norm"):
        for frames, keys in PERCEIVERS:
            yield perceiver(kind, frames, keys)


def compiled(run: Run) -> Run:
    """Under torch.compile, from nothing."""
    torch._dynamo.reset()
    made: Run = torch.compile(run)
    return made


def inputs_of(case: Case) -> list[Tensor]:
    """Random inputs that ask for gradients, more than the cache holds."""
    sets = rotations(2 * torch.Size(case.shape).numel())
    return [
        torch.randn(case.shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for _ in range(sets)
    ]


def step(run: Run, x: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Output and all gradients."""
    out = run(x)
    return (out, *torch.autograd.grad(out, [x, *leaves], torch.ones_like(out)))


def timed(case: Case, run: Run, inputs: Sequence[Tensor]) -> list[Time]:
    """Of the forward pass, and of forward and backward."""
    leaves = list(case.module.parameters())
    with torch.no_grad():
        forward = time_of([partial(run, x) for x in inputs])
    return [forward, time_of([partial(step, run, x, leaves) for x in inputs])]


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative one, of outputs and gradients."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def rows_of(case: Case) -> Iterator[dict[str, object]]:
    """Times with kernels and without; they are compared before anything is timed."""
    inputs, leaves = inputs_of(case), list(case.module.parameters())
    try:
        select.use(Preference.torch)
        wanted = [x.detach() for x in step(case.run, inputs[0], leaves)]
        eager, by_compiler = (timed(case, f, inputs) for f in (case.run, compiled(case.run)))
        select.use(Preference.cuda)
        error = difference([x.detach() for x in step(case.run, inputs[0], leaves)], wanted)
        assert error < LARGEST_DIFFERENCE, f"{case.name}: kernels differ by {error:.1e}"
        ours = timed(case, case.run, inputs)
    finally:
        select.use(Preference.auto)
    for i, direction in enumerate(("forward", "forward and backward")):
        time = ours[i]
        yield {
            "layer": case.name,
            "pass": direction,
            "us": f"{time.median:.0f} ({time.low:.0f} to {time.high:.0f})",
            "x eager": round(eager[i].median / time.median, 3),
            "x torch.compile": round(by_compiler[i].median / time.median, 3),
            "difference": float(f"{error:.1e}"),
        }


def targets(rows: Sequence[dict[str, object]]) -> dict[str, bool]:
    """No layer may lose by its kernels."""
    return {
        f"{row['layer']}, {row['pass']}: {row[column]} {column}, at least 1": float(
            str(row[column])
        )
        >= 1.0
        for row in rows
        for column in ("x eager", "x torch.compile")
    }


def measure_all() -> None:
    """Ceilings, then every layer."""
    torch.manual_seed(0)
    top = ceilings()
    rows = [row for case in cases() for row in rows_of(case)]
    write("layers", "Whole layers with kernels and without, bfloat16", top, rows, targets(rows))


def main() -> int:
    """Measure, print, and leave the results beside this file."""
    if not torch.cuda.is_available():
        print("layers: no CUDA device here, nothing was measured")
        return 0
    loaded = load_kernels()
    if loaded.path is None:
        print(f"layers: the kernels are not loaded: {loaded.reason}", file=sys.stderr)
        return 1
    measure_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
