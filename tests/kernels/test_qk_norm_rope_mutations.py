"""The checks of K1 can fail: every small damage to its source is noticed.

A mutant is built of a copy of the sources with one text replaced, for one head width.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import emulated
import pytest
from emulated import Inputs
from test_qk_norm_rope_emulated import check, drawn

from kernels.build import SOURCES, find_host_compiler

pytestmark = pytest.mark.skipif(find_host_compiler() is None, reason="the emulator needs g++")

FILES = (
    *(f"qk_norm_rope{rest}" for rest in (".h", "_row.cuh", ".cuh", ".cu")),
    *("simt.h", "simt_host.h", "simt_fibers.h"),
)
WIDTH = 88  # 11 lanes a row, two rows a warp, lanes left over

# what is damaged -> (text, its replacement); each text stands in the sources once
MUTANTS = {
    "no barrier before a block's sums": (
        "    __syncthreads();\n    for (int column",
        "    for (int column",
    ),
    "no barrier before the last sums": (
        "sums[threadIdx.x] = total;\n    __syncthreads();",
        "sums[threadIdx.x] = total;",
    ),
    "scales summed before all warps are there": (
        "float* row) {\n    __syncthreads();",
        "float* row) {",
    ),
    "turned the wrong way back": ("angles.turn(g, -1.f)", "angles.turn(g, 1.f)"),
    "sine with the wrong sign": (
        "b = b * cosine + a * sine;",
        "b = b * cosine - a * sine;",
    ),
    "no weight in the gradient": (
        "g.low[i] *= weight.low[i], g.high[i] *= weight.high[i];",
        "g.low[i] *= weight.low[i];",
    ),
    "no mean in the gradient": (
        "x.low[i] = (x.low[i] - mean) * inverse,",
        "x.low[i] = x.low[i] * inverse,",
    ),
    "no scale in the gradient": (
        "const float factor = inverse * scale;",
        "const float factor = inverse;",
    ),
    "short rows projected": (
        "l2 && inverse >= 1.f / p.eps ? 0.f : along * share",
        "along * share",
    ),
    "one head too many": (
        "if (!active) continue;",
        "if (!lane.active || head > unit.end) continue;",
    ),
    "a lane of the next row in the sum": (
        "if (lane.sub < step && lane.sub + step < lanes) x += other;",
        "if (lane.sub < step) x += other;",
    ),
    "positions ignored": ("!p.positions          ?", "true ?"),
}


def problems() -> list[Inputs]:
    """Few problems that together reach everything that is damaged."""
    short = drawn(WIDTH, "l2", "halves", eps=1e-2)
    for x in short.x:
        x[2:6] *= 1e-4
    return [
        drawn(WIDTH, "layer", "halves", tokens=40),
        replace(drawn(WIDTH, "l2", "none", tokens=40), positions=None),
        short,
    ]


def trimmed(source: str) -> str:
    """The launchers with the instantiations of one width and type alone; they compile in 1 s."""
    cases = re.findall(r"^ +case (?:\d+|MMTRAIN_FLOAT\d+): return .*\n", source, re.MULTILINE)
    assert len(cases) == 8, "the launchers' tables have changed"
    for case in cases:
        if f"case {WIDTH}:" not in case:
            source = source.replace(case, "")
    return source.replace("return any_width<simt::bf16>(p, pass);", "return -1;")


@pytest.fixture
def build(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes sources with a text replaced; gives the launchers' file."""

    def write(text: str, replacement: str) -> Path:
        found = 0
        for name in FILES:
            shutil.copy(SOURCES / name, tmp_path)
            source = (tmp_path / name).read_text()
            found += source.count(text) if text else 0
            source = source.replace(text, replacement) if text else source
            (tmp_path / name).write_text(trimmed(source) if name.endswith(".cu") else source)
        assert found == bool(text), f"{text!r} stands {found} times in the sources"
        return tmp_path / "qk_norm_rope.cu"

    return write


def test_the_sources_as_they_are_pass(build: Callable[[str, str], Path]) -> None:
    library = emulated.library(build("", ""), "-O0")
    for inputs in problems():
        check(inputs, library)


@pytest.mark.parametrize("damage", MUTANTS)
def test_damage_is_noticed(damage: str, build: Callable[[str, str], Path]) -> None:
    library = emulated.library(build(*MUTANTS[damage]), "-O0")
    with pytest.raises(AssertionError):
        for inputs in problems():
            check(inputs, library)
