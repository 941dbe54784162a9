"""Problems of cosine attention for the emulator: what models have, and what breaks kernels.

Lengths of queries and keys are far from 1, some keys point exactly where a query does, tensors are
strided, and what a kernel may not read is NaN.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from cosine_emulated import Inputs
from torch import Tensor

from mmtrain.ops.intervals import column_intervals

BF16, FP16 = torch.bfloat16, torch.float16


def drawn(
    rows: int,
    keys: int,
    width: int = 32,
    *,
    scale: float = 10.0,
    kind: torch.dtype = BF16,
    batch: int = 2,
    heads: int = 2,
) -> Inputs:
    """Dense attention; the first head has scale 1, the others `scale`."""
    generator = torch.Generator().manual_seed(rows * 1009 + keys * 31 + width)

    def normal(count: int, length: float) -> Tensor:
        x = torch.randn(batch, count, heads, width, generator=generator) * length
        # channels of a wider tensor, as of packed projections; NaN between
        whole = torch.full((batch, count, heads, width + 8), float("nan"), dtype=kind)
        whole[..., :width] = x
        return whole[..., :width]

    q, k = normal(rows, 2.0), normal(keys, 4.0)
    same = min(rows, keys) // 3
    k[:, :same] = q[:, :same] * 0.5
    log_scale = torch.full((heads,), math.log(scale))
    log_scale[0] = 0.0 if heads > 1 else log_scale[0]
    return Inputs(q=q, k=k, v=normal(keys, 1.0), dout=normal(rows, 1.0), log_scale=log_scale)


def documents(inputs: Inputs, lengths: Sequence[int], *, spread: int = 0) -> Inputs:
    """Packed causal documents, the same for all batches; rows after the last see nothing.

    Args:
        inputs: as many queries as keys.
        lengths: of the documents; 0 is an empty one.
        spread: rows see so many keys past themselves, inside their document.
    """
    rows = torch.arange(inputs.q.shape[1])
    lo, hi = torch.zeros_like(rows), torch.zeros_like(rows)
    start = 0
    for length in lengths:
        inside = (start <= rows) & (rows < start + length)
        lo[inside] = start
        hi[inside] = (rows[inside] + 1 + spread).clamp(max=start + length)
        start += length
    return with_intervals(inputs, lo[None], hi[None])


def random_intervals(inputs: Inputs, *, batches: int) -> Inputs:
    """Any intervals; every seventh row sees nothing."""
    generator = torch.Generator().manual_seed(5)
    keys, shape = inputs.k.shape[1], (batches, inputs.q.shape[1])
    lo = torch.randint(0, keys, shape, generator=generator)
    hi = lo + torch.randint(0, keys, shape, generator=generator)
    hi[:, 3::7] = lo[:, 3::7]
    return with_intervals(inputs, lo, hi.clamp(max=keys))


def with_intervals(inputs: Inputs, lo: Tensor, hi: Tensor) -> Inputs:
    """The problem under a mask, given by rows and by columns."""
    lo, hi = lo.int().contiguous(), hi.int().contiguous()
    columns = column_intervals(lo, hi, inputs.k.shape[1])
    return replace(inputs, intervals=(lo, hi), columns=columns)


def padded(inputs: Inputs, lengths: Sequence[int]) -> Inputs:
    """Keys from `lengths` on hold NaN and are not seen."""
    for b, length in enumerate(lengths):
        inputs.k[b, length:] = float("nan")
        inputs.v[b, length:] = float("nan")
    return replace(inputs, key_lengths=torch.tensor(lengths, dtype=torch.int32))


def biased(
    inputs: Inputs, *, biases: int = 1, change: Callable[[Tensor], None] | None = None
) -> Inputs:
    """A bias of Swin's size, 16 sigmoid(normal), changed in place by `change`."""
    generator = torch.Generator().manual_seed(7)
    shape = (biases, inputs.q.shape[2], inputs.q.shape[1], inputs.k.shape[1])
    bias = 16.0 * torch.randn(shape, generator=generator).sigmoid()
    if change is not None:
        change(bias)
    return replace(inputs, bias=bias)


def extreme(bias: Tensor) -> None:
    """Far down, far up, hidden keys, hidden rows."""
    bias[0, 0] -= 1000.0
    bias[0, 1] += 100.0
    bias[1, 0, :, ::2] = -torch.inf
    bias[1, 1, :5] = -torch.inf


def opposed(inputs: Inputs) -> Inputs:
    """All cosines of a head near -0.9: at scale 100 the fixed reference loses every term."""
    generator = torch.Generator().manual_seed(11)
    direction = torch.randn(inputs.q.shape[-1], generator=generator)
    for x, sign in ((inputs.q, 1.0), (inputs.k, -1.0)):
        x.copy_(sign * direction + 0.3 * torch.randn(x.shape, generator=generator))
    return inputs


def with_zero_rows(inputs: Inputs) -> Inputs:
    """Queries and keys of length zero, and some shorter than eps."""
    inputs.q[:, 3] = 0.0
    inputs.k[:, 5:9] = 0.0
    inputs.k[0, 0] *= 1e-7
    inputs.q[0, 0] *= 1e-7
    return replace(inputs, eps=1e-3)


WIDTHS = (8, 32, 40, 64, 72, 80, 88, 96, 128)
ROWS_AND_KEYS = (
    (1, 1), (7, 63), (63, 7), (64, 64), (65, 127), (127, 65), (129, 129), (257, 1), (1, 257),
)  # fmt: skip
SCALES = (1.0, 10.0, 60.0, 68.0, 100.0, 150.0)
CASES: dict[str, Callable[[], Inputs]] = {
    **{f"width {k}": lambda k=k: drawn(33, 100, k, batch=1) for k in WIDTHS},
    **{f"width {k}, two passes": lambda k=k: drawn(70, 129, k, batch=1, heads=1) for k in WIDTHS},
    **{f"width {k}, fp16": lambda k=k: drawn(9, 130, k, kind=FP16, heads=1) for k in WIDTHS},
    **{f"{t} rows, {s} keys": lambda t=t, s=s: drawn(t, s, heads=1) for t, s in ROWS_AND_KEYS},
    **{f"{h} heads": lambda h=h: drawn(5, 9, heads=h) for h in (1, 3, 5, 16, 40)},
    "32 latents, 1000 keys": lambda: drawn(32, 1000, 64, batch=1, heads=1),
    "strided heads": lambda: transposed(drawn(20, 70)),
    "splits": lambda: replace(drawn(20, 400, 64, scale=30.0), splits=4),
    "splits, 64 rows": lambda: replace(drawn(50, 400, scale=30.0), splits=3),
    "splits, fp16": lambda: replace(drawn(20, 400, scale=30.0, kind=FP16), splits=4),
    "splits, some without keys": lambda: replace(padded(drawn(20, 400), (64, 0)), splits=4),
    "key lengths": lambda: padded(drawn(20, 200), (200, 90)),
    "key lengths, two passes": lambda: padded(drawn(70, 200), (130, 0)),
    "documents": lambda: documents(drawn(60, 60), (10, 0, 33, 1, 9)),
    "documents, two passes": lambda: documents(drawn(200, 200), (70, 0, 3, 100), spread=5),
    "documents, fp16": lambda: documents(drawn(130, 130, kind=FP16), (64, 64), spread=9),
    "one long document": lambda: documents(drawn(300, 300, heads=1, batch=1), (300,)),
    "intervals": lambda: random_intervals(drawn(60, 200, scale=20.0), batches=1),
    "intervals by batch, splits": lambda: replace(
        random_intervals(drawn(20, 300, scale=20.0), batches=2), splits=3
    ),
    "intervals by batch, lengths": lambda: padded(
        random_intervals(drawn(150, 200, scale=20.0), batches=2), (200, 90)
    ),
    "intervals without columns": lambda: replace(
        random_intervals(drawn(130, 130), batches=2), columns=None
    ),
    "nothing is seen": lambda: documents(drawn(70, 70), ()),
    "bias": lambda: biased(drawn(20, 100, 64)),
    "bias, windows": lambda: biased(drawn(64, 64, batch=6), biases=2),
    "bias, windows in groups": lambda: replace(
        biased(drawn(49, 49, batch=6), biases=2), bias_groups=2
    ),
    "bias, two passes": lambda: replace(biased(drawn(70, 100, batch=4)), bias_groups=2),
    "bias, intervals": lambda: biased(random_intervals(drawn(70, 130), batches=2)),
    "bias, fp16": lambda: biased(drawn(40, 100, kind=FP16), biases=2),
    "extreme bias": lambda: biased(drawn(20, 130), biases=2, change=extreme),
    "extreme bias, two passes": lambda: biased(drawn(70, 130), biases=2, change=extreme),
    "extreme bias, fp16": lambda: biased(drawn(20, 130, kind=FP16), biases=2, change=extreme),
    "zero rows": lambda: with_zero_rows(drawn(20, 130)),
    "zero rows, two passes": lambda: with_zero_rows(drawn(70, 130)),
    "zero rows, fp16": lambda: with_zero_rows(drawn(20, 130, kind=FP16)),
    "scale above its limit": lambda: replace(drawn(20, 70, scale=10.0), log_scale_max=1.0),
    "gradient of lse": lambda: with_dlse(random_intervals(drawn(40, 130), batches=2)),
    "gradient of lse, two passes": lambda: with_dlse(drawn(70, 130)),
    **{
        f"scale {s:g}, {t} rows, {kind}": lambda s=s, t=t, kind=kind: drawn(
            t, 130, 64, scale=s, kind=kind, batch=1
        )
        for s in SCALES
        for t, kind in ((20, BF16), (70, BF16), (20, FP16))
    },
    **{
        f"cosines near -0.9, {t} rows": lambda t=t: opposed(drawn(t, 200, 64, scale=100.0))
        for t in (20, 70)
    },
    "cosines near -0.9, splits": lambda: replace(
        opposed(drawn(20, 300, 64, scale=100.0)), splits=2
    ),
    "cosines near -0.9, fp16": lambda: opposed(drawn(20, 200, 64, scale=100.0, kind=FP16)),
}  # fmt: skip


def transposed(inputs: Inputs) -> Inputs:
    """Heads before rows in memory."""
    views = {
        name: getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("q", "k", "v", "dout")
    }
    return replace(inputs, **views)


def with_dlse(inputs: Inputs) -> Inputs:
    """A gradient of the logsumexp besides; zero where it is -inf."""
    batch, rows, heads, _ = inputs.q.shape
    dlse = torch.randn(batch, heads, rows, generator=torch.Generator().manual_seed(3))
    return replace(inputs, dlse=dlse)
