"""K1 in the emulator agrees with float64 formulas, over the shapes that models have and more.

The same source that nvcc compiles; see kernels/README.md for what the emulator checks besides.
"""

import math
from itertools import product

import emulated
import exact
import pytest
import torch
from emulated import Inputs, Outputs
from torch import Tensor

from kernels.build import find_host_compiler

pytestmark = pytest.mark.skipif(find_host_compiler() is None, reason="the emulator needs g++")

SPECIAL = (64, 72, 80, 88, 96, 128)  # widths with instantiations of their own
GENERAL = (32, 40, 104, 136, 144, 192, 248, 256)
# of ||ours - exact|| / ||exact||: twice the rounding of the element type; sums are float32
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
PARAMETER_LIMIT = 1e-5


def tables(width: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cosines and sines of any angles; row 0 turns nothing, like that of a class token."""
    angle = torch.rand(rows, width // 2, generator=generator) * 2.0 * math.pi
    angle[0] = 0.0
    return angle.cos(), angle.sin()


def packed(
    tokens: int, heads: tuple[int, ...], width: int, kind: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """Views of one tensor that holds queries, keys and, NaN here, values side by side."""
    whole = torch.randn(tokens, sum(heads) + 2, width, generator=generator).to(kind)
    whole[:, sum(heads) :] = float("nan")
    return list(whole.split([*heads, 2], 1))[: len(heads)]


def drawn(
    width: int,
    norm: str,
    pairing: str,
    *,
    kind: torch.dtype = torch.bfloat16,
    tokens: int = 19,
    heads: tuple[int, int] = (5, 3),
    eps: float = 1e-6,
    positions: torch.dtype | None = torch.int32,
    parameter: torch.dtype = torch.float32,
) -> Inputs:
    """Inputs of one case; queries and keys lie packed, positions come in no order."""
    generator = torch.Generator().manual_seed(width * 31 + tokens)

    def vectors(sizes: tuple[int, int], wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        made = [torch.randn(n, generator=generator) * 0.3 + 1.0 for n in sizes]
        a, b = (x.to(parameter) if wanted else None for x in made)
        return a, b

    queries, keys = packed(tokens, heads, width, kind, generator)
    keys *= 3.0
    keys += 1.0
    cosine, sine = tables(width, 23, generator)
    drawn_rows = torch.randint(0, 23, (tokens,), generator=generator)
    return Inputs(
        norm=norm,
        pairing=pairing,
        eps=eps,
        x=(queries, keys),
        dy=tuple(packed(tokens, heads, width, kind, generator)),  # type: ignore[arg-type]
        weight=vectors((width, width), norm in ("rms", "layer")),
        bias=vectors((width, width), norm == "layer"),
        scale=vectors(heads, norm == "l2"),
        cosine=None if pairing == "none" else cosine,
        sine=None if pairing == "none" else sine,
        positions=None if positions is None else drawn_rows.to(positions),
    )


def worst(found: tuple[Outputs, Outputs], wanted: tuple[Outputs, Outputs]) -> dict[str, float]:
    """Largest relative error of each result over queries and keys."""
    errors: dict[str, float] = {}
    for ours, true in zip(found, wanted, strict=True):
        for name, value in true.values.items():
            error = float((ours.values[name].double() - value).norm() / value.norm())
            errors[name] = max(error, errors.get(name, 0.0))
    return errors


def check(inputs: Inputs) -> dict[str, float]:
    """Run both and compare to the limits of the element type."""
    errors = worst(emulated.run(inputs, emulated.library()), exact.run(inputs))
    kind = inputs.x[0].dtype
    for name, error in errors.items():
        assert error <= (PARAMETER_LIMIT if name.startswith("d_") else LIMITS[kind]), (name, error)
    return errors


if __name__ == "__main__":
    import time
    t0 = time.time()
    w = {}
    for width, norm, pairing in product(SPECIAL + GENERAL, emulated.NORMS, emulated.PAIRINGS):
        try:
            for k, v in check(drawn(width, norm, pairing)).items():
                w[k] = max(w.get(k, 0), v)
        except AssertionError as e:
            print(width, norm, pairing, str(e)[:200])
    print(w, time.time() - t0)
    for kind in (torch.float16, torch.float32):
        w = {}
        for width, norm, pairing in product((72, 128), emulated.NORMS, emulated.PAIRINGS):
            for k, v in check(drawn(width, norm, pairing, kind=kind)).items():
                w[k] = max(w.get(k, 0), v)
        print(kind, w, time.time() - t0)
