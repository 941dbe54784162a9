"""The tests of cosine attention notice mistakes: each mutant of the source fails a case it names.

A mutant is the source with one text replaced. The cases pass with the source as it is (see
`test_cosine_attention_emulated.py`).
"""

import ctypes
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cosine_emulated
import pytest
from cosine_cases import biased, documents, drawn, opposed, padded, random_intervals
from cosine_emulated import Inputs
from cosine_exact import misses

from kernels.build import SOURCES, find_host_compiler

pytestmark = pytest.mark.skipif(find_host_compiler() is None, reason="the emulator needs g++")

FORWARD, BACKWARD, GRADIENTS, TILE = (
    f"cosine_attention_{part}.cuh" for part in ("forward", "backward", "gradients", "tile")
)
LAUNCHERS = "cosine_attention.cu"


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Attributes:
        file: of the sources.
        old: text that occurs there, the first time.
        new: what stands there instead.
        case: a problem on which it shows.
        orders: of threads that are tried; a missing barrier shows in some.
    """

    file: str
    old: str
    new: str
    case: Callable[[], Inputs]
    orders: int = 1


def few() -> Inputs:
    return drawn(20, 130, heads=1, batch=1)


def many() -> Inputs:
    return drawn(70, 130, heads=1, batch=1)


def packed() -> Inputs:
    return documents(drawn(200, 200, heads=1, batch=1), (70, 3, 100))


MUTANTS = {
    "forward: keys are multiplied before they are measured": Mutant(
        FORWARD, "p.eps);\n        __syncthreads();", "p.eps);",
        lambda: drawn(20, 70, batch=4, heads=8), 3,  # warps seldom get so far apart
    ),
    "forward: slices are added before they are written": Mutant(
        FORWARD, "__syncthreads();\n    if (slice == 1) return;", "if (slice == 1) return;", few, 3
    ),
    "copies are not waited for": Mutant(TILE, "tc::wait<stages - 2>();", "", few),
    "a stage is fetched into while it is read": Mutant(
        TILE, "2>();\n        __syncthreads();", "2>();", many, 3
    ),
    "forward: a row sees one key too many": Mutant(
        FORWARD, "at < seen.end", "at <= seen.end", packed
    ),
    "backward: a row sees one key too many": Mutant(
        GRADIENTS, "at >= seen.end", "at > seen.end", packed
    ),
    "tiles of keys are called whole too early": Mutant(
        TILE, "first_key + tile_keys <= all.end", "first_key <= all.end", packed
    ),
    "columns end too early": Mutant(
        BACKWARD, "max(rows.end, mine.end)", "max(rows.end, mine.end - 1)",
        lambda: documents(drawn(129, 129, heads=1, batch=1), (129,)),
    ),
    "padding is read": Mutant(
        TILE, "            keys_of(p, batch),\n", "            p.keys,\n",
        lambda: padded(drawn(20, 130), (130, 70)),
    ),
    "no second try where the fixed reference loses terms": Mutant(
        FORWARD, "if (memory.lost_terms)", "if (false)",
        lambda: opposed(drawn(20, 70, scale=100.0)),
    ),
    "running reference: sums are not rescaled": Mutant(
        FORWARD, "rows.sum[half] *= factor;", "",
        lambda: opposed(drawn(20, 70, scale=100.0)),
    ),
    "splits are added without their references": Mutant(
        FORWARD, "simt::exp2_approx(partials.reference[from] - top)", "1.0f",
        lambda: replace(opposed(drawn(20, 200, scale=100.0)), splits=2),
    ),
    "backward: delta with the wrong sign": Mutant(
        GRADIENTS, "- memory.delta[local + i])", "+ memory.delta[local + i])", few
    ),
    "backward: dz is read before it is written": Mutant(
        BACKWARD, "__syncthreads();  // all of dz is there", "", few, 3
    ),
    "backward: gradients overwrite keys that are being read": Mutant(
        BACKWARD, "__syncthreads();  // the keys are read", "// the keys are read", few, 3
    ),
    "backward: rows are replaced while they are read": Mutant(
        BACKWARD, "__syncthreads();  // the rows are read", "// the rows are read", packed, 3
    ),
    "backward: dk is not projected": Mutant(
        GRADIENTS, "simt::to_float(x[i % 2]) * along[i / 2]", "0.0f", few
    ),
    "backward: dq is projected with the wrong sign": Mutant(
        GRADIENTS, "direction[i].x - x[i].x * along", "direction[i].x + x[i].x * along", few
    ),
    "the scale has a gradient above its limit": Mutant(
        BACKWARD, "p.log_scale[head] <= p.log_scale_max ? sum : 0.0f", "sum",
        lambda: replace(drawn(20, 70, scale=10.0), log_scale_max=1.0),
    ),
    "unseen keys have no gradient written": Mutant(
        BACKWARD, "store_zeros<T>(p, unit, {tiles.end, share.end});", "",
        lambda: padded(drawn(20, 200), (70, 60)),
    ),
    "dbias keeps the last batch alone": Mutant(
        GRADIENTS, "unit.dbias[entry] += d[i]", "unit.dbias[entry] = d[i]",
        lambda: replace(biased(drawn(20, 70, batch=4)), bias_groups=1),
    ),
    "intervals of the first batch for all": Mutant(
        TILE, "p.interval_batches > 1 ? batch : 0", "0",
        lambda: random_intervals(drawn(20, 130, heads=1), batches=2),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The launchers of every mutant, compiled; all processors compile at once."""
    launchers: dict[str, Path] = {}
    for name, mutant in MUTANTS.items():
        folder = tmp_path_factory.mktemp("mutant")
        for file in (*SOURCES.glob("*.h"), *SOURCES.glob("cosine_attention*")):
            shutil.copyfile(file, folder / file.name)
        text = (folder / mutant.file).read_text()
        assert mutant.old in text, f"{name}: the source has changed; change the mutant with it"
        (folder / mutant.file).write_text(text.replace(mutant.old, mutant.new, 1))
        launchers[name] = folder / LAUNCHERS
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(library, launchers.values()))
    return launchers


def library(source: Path) -> ctypes.CDLL:
    """Half the time of the usual build."""
    return cosine_emulated.library((32,), source, ["-O0"])


def notices(inputs: Inputs, source: Path, orders: int) -> bool:
    """Whether running `source` fails an assertion or misses a result, in some order of threads."""
    try:
        found = [cosine_emulated.run(inputs, library(source), n) for n in range(1, orders + 1)]
    except AssertionError:
        return True
    return any(misses(inputs, results) for results in found)


def test_the_source_itself_fails_none_of_the_cases() -> None:
    for case in {mutant.case for mutant in MUTANTS.values()}:
        assert not notices(case(), SOURCES / LAUNCHERS, 1)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, sources: dict[str, Path]) -> None:
    assert notices(MUTANTS[name].case(), sources[name], MUTANTS[name].orders)
