"""Speed of cosine attention on a GPU: K2, K3 and the composed path.

    make gpu-bench          # or: python kernels/bench/cosine_attention.py

Results are checked against float32 formulas before anything is timed. Baselines: eager as
Unified-IO 2 computes it (normalise, float32 logits, softmax, product), and normalised queries and
keys with cuDNN's attention, forced (left to itself torch takes an older kernel). Bytes are those
that must move: inputs read once, outputs written once.

B batches   H heads   T query rows   S keys   K head width
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels.measure import Ceilings, Time, ceilings, rotations, time_of, write
from mmtrain.ops.cosine_attention import EPS, cosine_attention
from mmtrain.ops.extension import load_kernels
from mmtrain.ops.qk_norm_rope import Norm, qk_norm_rope

DEVICE, BASELINE = "cuda", SDPBackend.CUDNN_ATTENTION
LARGEST_ERROR = 1e-2  # of a bf16 result against float32 formulas
LEAST_SHARE_OF_COPY, LEAST_GAIN = 0.80, 1.5  # K2 on perceivers, over normalise + cuDNN
LEAST_COMPOSED, MOST_ERROR = 0.85, 0.6  # of plain cuDNN's speed; of eager bf16's error
LONG = (4, 40, 4096, 4096, 128)


@dataclass(frozen=True)
class Shape:
    """One problem.

    Attributes:
        name: whose it is.
        sizes: B, H, T, S, K.
        biases: number of biases that batches share in turn; 0: none.
    """

    name: str
    sizes: tuple[int, int, int, int, int]
    biases: int = 0

    def bytes_moved(self, *, backward: bool) -> int:
        """What must move at least, in bf16 with float32 logsumexp and bias."""
        b, h, t, s, k = self.sizes
        bias = 4 * self.biases * h * t * s
        if backward:
            return 2 * b * h * k * (4 * t + 4 * s) + 8 * b * h * t + 2 * bias
        return 2 * b * h * k * (2 * t + 2 * s) + 4 * b * h * t + bias


SHAPES = (
    Shape("perceiver 32 x 256", (256, 16, 32, 256, 64)),
    Shape("perceiver 32 x 512", (128, 16, 32, 512, 64)),
    Shape("perceiver 32 x 1024", (96, 16, 32, 1024, 64)),
    Shape("perceiver 32 x 2048", (64, 12, 32, 2048, 64)),
    Shape("windows of 64", (4096, 12, 64, 64, 32), biases=1),
    Shape("windows of 256", (1024, 12, 256, 256, 32), biases=1),
    Shape("ViT-g", (256, 16, 257, 257, 88)),
)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one problem that ask for gradients, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_scale: Tensor
    bias: Tensor | None
    dout: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What is differentiated."""
        return [self.q, self.k, self.v, self.log_scale, *([] if self.bias is None else [self.bias])]


def drawn(shape: Shape, batches: int | None = None) -> Inputs:
    """Random inputs, of fewer batches if asked for."""
    b, h, t, s, k = shape.sizes
    b = batches or b
    made = [torch.randn(b, n, h, k, device=DEVICE).bfloat16() for n in (t, s, s, t)]
    bias = None
    if shape.biases:
        bias = (16.0 * torch.rand(shape.biases, h, t, s, device=DEVICE)).requires_grad_()
    log_scale = torch.full((h,), math.log(10.0), device=DEVICE, requires_grad=True)
    q, k_, v = (x.requires_grad_() for x in made[:3])
    return Inputs(q, k_, v, log_scale, bias, made[3])


def fused(x: Inputs) -> Tensor:
    """K2."""
    return cosine_attention(x.q, x.k, x.v, x.log_scale, bias_PHTS=x.bias)


def eager(x: Inputs) -> Tensor:
    """Chain of torch ops with float32 logits."""
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    logits = (normalize(q, dim=-1, eps=EPS) @ normalize(k, dim=-1, eps=EPS).mT).float()
    logits = logits * x.log_scale.exp()[:, None, None]
    logits = logits if x.bias is None else logits + x.bias
    return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def normalised_cudnn(x: Inputs, *, causal: bool = False) -> Tensor:
    """L2 norm with the scale folded into queries, then cuDNN with scale 1.

    The norm is K1 where queries and keys are of the same tokens (the composed path), else compiled.
    """
    scale = x.log_scale.exp()
    if x.q.shape[1] == x.k.shape[1]:
        flat = (y.flatten(0, 1) for y in (x.q, x.k))
        q, k = qk_norm_rope(*flat, norm=Norm.L2, eps=EPS, scales=(scale, None))
    else:
        q, k = compiled_unit()(x.q, scale), compiled_unit()(x.k, torch.ones_like(scale))
    return cudnn(q.view_as(x.q), k.view_as(x.k), x.v, x.bias, causal=causal, scale=1.0)


def unit(x: Tensor, scale: Tensor) -> Tensor:
    """Rows of length `scale` of their head."""
    return (normalize(x.float(), dim=-1, eps=EPS) * scale[:, None]).to(x.dtype)


@cache
def compiled_unit() -> Callable[[Tensor, Tensor], Tensor]:
    """The same, compiled: one kernel."""
    return torch.compile(unit)


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool, scale: float
) -> Tensor:
    """Attention of cuDNN, forced."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)
    with sdpa_kernel(BASELINE):
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def exact(x: Inputs) -> Tensor:
    """Formulas in float32, without rounding in between."""
    wide = Inputs(
        *(y.detach().float().requires_grad_() for y in (x.q, x.k, x.v)),
        x.log_scale, x.bias, x.dout.float(),
    )  # fmt: skip
    return eager(wide)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative, over all elements."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def forward_and_backward(
    call: Callable[[Inputs], Tensor], inputs: Sequence[Inputs]
) -> tuple[Time, Time]:
    """Times of both passes, in turn over `inputs`."""
    with torch.no_grad():
        forward = time_of([partial(call, x) for x in inputs])
    backward = time_of([backward_of(call(x), x) for x in inputs])
    return forward, backward


def backward_of(out: Tensor, x: Inputs) -> Callable[[], object]:
    """Run the backward pass of `out`, any number of times."""
    return lambda: torch.autograd.grad(out, x.leaves, x.dout, retain_graph=True)


def attempted(
    call: Callable[[Inputs], Tensor], inputs: Sequence[Inputs]
) -> tuple[Time, Time] | None:
    """Times, or None where the baseline does not run."""
    try:
        return forward_and_backward(call, inputs)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"  {call} does not run: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()
        return None


def gain(other: tuple[Time, Time] | None, ours: tuple[Time, Time], direction: int) -> float | str:
    """How many times faster ours is; a dash where the other does not run."""
    return "-" if other is None else round(other[direction].median / ours[direction].median, 2)


def small_rows(top: Ceilings) -> Iterator[dict[str, object]]:
    """K2 and K3 at every shape."""
    for shape in SHAPES:
        few = drawn(shape, 4)
        error = difference(fused(few), exact(few))
        assert error < LARGEST_ERROR, f"{shape.name}: the output is off by {error:.1e}"
        inputs = [drawn(shape) for _ in range(rotations(shape.bytes_moved(backward=False)))]
        ours = forward_and_backward(fused, inputs)
        eagers, cudnns = (attempted(call, inputs) for call in (eager, normalised_cudnn))
        for i, direction in enumerate(("forward", "backward")):
            moved, time = shape.bytes_moved(backward=i == 1), ours[i]
            rate = moved / time.median * 1e6
            yield {
                "shape": shape.name,
                "B, H, T, S, K": ", ".join(map(str, shape.sizes)),
                "pass": direction,
                "MB": round(moved / 1e6),
                "us": round(time.median, 1),
                "p20, p80": f"{time.low:.1f}, {time.high:.1f}",
                "GB/s": round(rate / 1e9),
                "of copy": round(rate / top.copy_bytes_per_second, 3),
                "x eager": gain(eagers, ours, i),
                "x normalise + cuDNN": gain(cudnns, ours, i),
                "error": float(f"{error:.1e}"),
            }


def small_targets(rows: Sequence[dict[str, object]]) -> Iterator[tuple[str, bool]]:
    """Promised for the forward pass of perceivers; no baseline, no promise kept."""
    for row in rows:
        if row["pass"] == "backward" or not str(row["shape"]).startswith("perceiver"):
            continue
        for column, least in (
            ("of copy", LEAST_SHARE_OF_COPY),
            ("x normalise + cuDNN", LEAST_GAIN),
        ):
            value = row[column]
            kept = isinstance(value, float) and value >= least
            yield f"K2, {row['shape']}: {column} {value}, at least {least}", kept


def long_targets() -> Iterator[tuple[str, bool]]:
    """The composed path at 4,096 keys, causal: speed of plain cuDNN's, error of eager bf16's."""
    x = drawn(Shape("long", LONG))
    scale = LONG[-1] ** -0.5
    plain = partial(cudnn, x.q, x.k, x.v, None, causal=True, scale=scale)
    composed = partial(normalised_cudnn, x, causal=True)
    with torch.no_grad():
        times = [time_of([call]).median for call in (plain, composed)]
    text = f"composed at {LONG[2]} keys: {times[1]:.0f} us, plain cuDNN {times[0]:.0f} us"
    yield f"{text}, speed at least {LEAST_COMPOSED} of it", times[0] / times[1] >= LEAST_COMPOSED
    few = drawn(Shape("long", (1, min(4, LONG[1]), *LONG[2:])))
    for factor in (10.0, 30.0, 100.0):
        with torch.no_grad():
            few.log_scale.fill_(math.log(factor))
            wanted = exact(few)
            ours, theirs = (difference(f(few), wanted) for f in (normalised_cudnn, eager_bf16))
        text = f"error of composed at scale {factor:g}: {ours:.1e}, eager bf16 {theirs:.1e}"
        yield f"{text}, at most {MOST_ERROR} of it", ours <= MOST_ERROR * theirs


def eager_bf16(x: Inputs) -> Tensor:
    """Every result rounded to bf16, as under autocast."""
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    scale = x.log_scale.exp()[:, None, None].to(q.dtype)
    logits = normalize(q, dim=-1, eps=EPS) @ normalize(k, dim=-1, eps=EPS).mT * scale
    return (logits.softmax(-1) @ v).transpose(1, 2)


def measure_all() -> None:
    """Ceilings, small problems, long ones."""
    torch.manual_seed(0)
    top = ceilings()
    rows = list(small_rows(top))
    targets = dict([*small_targets(rows), *long_targets()])
    write("cosine_attention", "Cosine attention (K2, K3, composed)", top, rows, targets)


def main() -> int:
    """Measure, print, and leave the results beside this file."""
    if not torch.cuda.is_available():
        print("cosine_attention: no CUDA device here, nothing was measured")
        return 0
    loaded = load_kernels()
    if loaded.path is None:
        print(f"cosine_attention: the kernels are not loaded: {loaded.reason}", file=sys.stderr)
        return 1
    measure_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
