"""The tests of cosine attention notice mistakes: each mutant of the source fails a case it names.

A mutant is the source with one text replaced. The cases pass with the source as it is (see
`test_cosine_attention.py`).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cosine_emulated
import pytest
from cosine_cases import biased, documents, drawn, opposed, padded, random_intervals
from cosine_emulated import Inputs
from test_cosine_attention import misses

from kernels.build import SOURCES, find_host_compiler

pytestmark = pytest.mark.skipif(find_host_compiler() is None, reason="the emulator needs g++")

SEEDS = 3
FORWARD, BACKWARD, TILE, LAUNCHERS = (
    f"cosine_attention{suffix}" for suffix in ("_forward.cuh", "_backward.cuh", "_tile.cuh", ".cu")
)


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Attributes:
        file: of the sources.
        old: text that occurs there, the first time.
        new: what stands there instead.
        case: a problem on which it shows.
    """

    file: str
    old: str
    new: str
    case: Callable[[], Inputs]


def few() -> Inputs:
    return drawn(20, 130, heads=1, batch=1)


def many() -> Inputs:
    return drawn(70, 130, heads=1, batch=1)


def packed() -> Inputs:
    return documents(drawn(200, 200, heads=1, batch=1), (70, 3, 100))


MUTANTS = {
    "forward: keys are multiplied before they are measured": Mutant(
        FORWARD, "p.eps);\n        __syncthreads();", "p.eps);",
        lambda: drawn(20, 70, batch=4, heads=8),  # warps seldom get so far apart
    ),
    "forward: slices are added before they are written": Mutant(
        FORWARD, "__syncthreads();\n    if (slice == 1) return;", "if (slice == 1) return;", few
    ),
    "copies are not waited for": Mutant(TILE, "tc::wait<stages - 2>();", "", few),
    "a stage is fetched into while it is read": Mutant(
        TILE, "tc::wait<stages - 2>();\n        __syncthreads();", "tc::wait<stages - 2>();", many
    ),
    "forward: a row sees one key too many": Mutant(
        FORWARD, "at < seen.end", "at <= seen.end", packed
    ),
    "backward: a row sees one key too many": Mutant(
        BACKWARD, "at >= seen.end", "at > seen.end", packed
    ),
    "backward: a row sees one key too few": Mutant(
        BACKWARD, "at < seen.begin", "at <= seen.begin", packed
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
        BACKWARD, "- memory.delta[local + i])", "+ memory.delta[local + i])", few
    ),
    "backward: dz is read before it is written": Mutant(
        BACKWARD, "__syncthreads();  // all of dz is there", "", few
    ),
    "backward: gradients overwrite keys that are being read": Mutant(
        BACKWARD, "__syncthreads();  // the keys are read", "// the keys are read", few
    ),
    "backward: rows are replaced while they are read": Mutant(
        BACKWARD, "__syncthreads();  // the rows are read", "// the rows are read", packed
    ),
    "backward: dk is not projected": Mutant(
        BACKWARD, "simt::to_float(x[i % 2]) * along[i / 2]", "0.0f", few
    ),
    "backward: dq is projected with the wrong sign": Mutant(
        BACKWARD, "direction[i].x - x[i].x * along", "direction[i].x + x[i].x * along", few
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
        BACKWARD, "unit.dbias[entry] += d[i]", "unit.dbias[entry] = d[i]",
        lambda: replace(biased(drawn(20, 70, batch=4)), bias_groups=1),
    ),
    "the bias of another window": Mutant(
        TILE, "batch % p.bias_batches", "0", lambda: biased(drawn(20, 70, batch=4), biases=2)
    ),
    "intervals of the first batch for all": Mutant(
        TILE, "p.interval_batches > 1 ? batch : 0", "0",
        lambda: random_intervals(drawn(70, 130), batches=2),
    ),
}  # fmt: skip


def notices(inputs: Inputs, source: Path) -> bool:
    """Whether running `source` fails an assertion or misses a result, in some order of threads."""
    built = cosine_emulated.library((32,), source, ["-O0"])  # compiles in half the time
    try:
        found = [cosine_emulated.run(inputs, built, seed) for seed in range(1, SEEDS + 1)]
    except AssertionError:
        return True
    return any(misses(inputs, results) for results in found)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    for file in (*SOURCES.glob("*.h"), *SOURCES.glob("cosine_attention*")):
        shutil.copy(file, tmp_path)
    text = (tmp_path / mutant.file).read_text()
    assert mutant.old in text, "the source has changed; change the mutant with it"
    assert not notices(mutant.case(), SOURCES / LAUNCHERS)
    (tmp_path / mutant.file).chmod(0o644)
    (tmp_path / mutant.file).write_text(text.replace(mutant.old, mutant.new, 1))
    assert notices(mutant.case(), tmp_path / LAUNCHERS)
