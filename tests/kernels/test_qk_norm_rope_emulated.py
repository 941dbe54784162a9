"""K1 in the emulator agrees with float64 formulas, over the shapes that models have and more.

The same source that nvcc compiles; see kernels/README.md for what the emulator checks besides.
"""

import ctypes
import math
from dataclasses import replace
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


def check(inputs: Inputs, built: ctypes.CDLL | None = None) -> None:
    """Run both and compare to the limits of the types."""
    found = emulated.run(inputs, built or emulated.library())
    for name, error in worst(found, exact.run(inputs)).items():
        limit = LIMITS[inputs.x[0].dtype]
        if name.startswith("d_"):
            parameters = (x for x in (*inputs.weight, *inputs.scale) if x is not None)
            kind = next(parameters).dtype
            limit = PARAMETER_LIMIT if kind == torch.float32 else LIMITS[kind]
        assert error <= limit, f"{name}: {error:.1e} above {limit:.0e}"


@pytest.mark.parametrize("width", SPECIAL + GENERAL)
def test_every_norm_and_pairing_agrees_with_float64(width: int) -> None:
    for norm, pairing in product(emulated.NORMS, emulated.PAIRINGS):
        check(drawn(width, norm, pairing))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [72, 128])
def test_other_element_types_agree_too(width: int, kind: torch.dtype) -> None:
    for norm, pairing in product(emulated.NORMS, emulated.PAIRINGS):
        check(drawn(width, norm, pairing, kind=kind))


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 127, 129, 257, 1000])
def test_any_number_of_tokens(tokens: int) -> None:
    check(drawn(80, "layer", "neighbours", tokens=tokens, heads=(3, 1)))
    check(drawn(64, "l2", "halves", tokens=tokens, heads=(2, 2)))


@pytest.mark.parametrize("heads", [(1, 1), (3, 5), (16, 16), (40, 8), (40, 1)])
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_any_number_of_heads_and_groups_of_queries(heads: tuple[int, int], norm: str) -> None:
    check(drawn(88, norm, "halves", tokens=11, heads=heads))
    check(drawn(128, norm, "neighbours", tokens=2, heads=heads))


@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
def test_positions_come_in_either_width_or_from_the_token(positions: torch.dtype | None) -> None:
    """Without positions token t reads row t modulo the table's rows: batches share one table."""
    check(drawn(72, "rms", "halves", tokens=60, positions=positions))


@pytest.mark.parametrize("parameter", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["rms", "layer", "l2"])
def test_weights_and_their_gradients_keep_their_own_type(norm: str, parameter: torch.dtype) -> None:
    check(drawn(96, norm, "halves", parameter=parameter))


def test_a_norm_without_weights_needs_none() -> None:
    for norm in ("rms", "layer", "l2"):
        bare = replace(
            drawn(64, norm, "halves"), weight=(None, None), bias=(None, None), scale=(None, None)
        )
        check(bare)


def test_one_side_alone_may_have_a_scale() -> None:
    inputs = drawn(128, "l2", "halves", heads=(4, 4))
    check(replace(inputs, scale=(inputs.scale[0], None)))


@pytest.mark.parametrize("norm", emulated.NORMS)
def test_zero_rows_stay_finite_and_get_the_gradient_of_the_formula(norm: str) -> None:
    inputs = drawn(64, norm, "halves", eps=1e-3)
    for x in inputs.x:
        x[3:9] = 0.0
        x[11, 1] *= 1e-5  # shorter than eps, not zero
    check(inputs)


def test_rows_of_the_table_that_turn_nothing_are_the_norm_alone() -> None:
    """Row 0 of the table is that of a class token."""
    inputs = drawn(88, "layer", "neighbours")
    still = replace(inputs, positions=torch.zeros(19, dtype=torch.int32))
    plain = replace(inputs, pairing="none", cosine=None, sine=None, positions=None)
    (turned, _), (normed, _) = (emulated.run(x, emulated.library()) for x in (still, plain))
    assert torch.equal(turned.values["y"], normed.values["y"])
    assert torch.equal(turned.values["dx"], normed.values["dx"])


def test_results_repeat_to_the_last_bit_in_any_order_of_threads() -> None:
    for norm in ("rms", "layer", "l2"):
        inputs = drawn(64, norm, "halves", tokens=300)
        first, *others = (emulated.run(inputs, emulated.library(), seed) for seed in (1, 2, 3))
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert all(torch.equal(a.values[name], b.values[name]) for name in a.values)


@pytest.mark.parametrize("resident", [2, 12])
def test_the_number_of_blocks_changes_no_row_and_sums_in_rounding_only(resident: int) -> None:
    built = emulated.library()
    try:
        built.mmtrain_emulator_resident_blocks(resident)
        for norm in ("layer", "l2"):
            check(drawn(64, norm, "halves", tokens=150, heads=(9, 2)))
    finally:
        built.mmtrain_emulator_resident_blocks(2)


@pytest.mark.parametrize("width", [24, 60, 264])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(AssertionError, match="-1"):
        emulated.run(drawn(width, "rms", "halves"), emulated.library())


def test_no_tokens_are_no_work() -> None:
    found = emulated.run(drawn(64, "none", "halves", tokens=0), emulated.library())
    assert found[0].values["y"].shape == (0, 5, 64)
