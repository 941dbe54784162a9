"""The race against the open implementation: same documents on both sides, right arithmetic."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmtrain import feed
from mmtrain.data.batch import Batch, BatchInfo, Targets
from mmtrain.data.tokens import SequenceFormat
from mmtrain.nn.flow import Flow
from mmtrain.nn.patches import unpatchify

BOS, EOS, PAD, BEGIN, END, SLOT = range(50, 56)
LAYOUT = SequenceFormat(
    bos=BOS,
    eos=EOS,
    pad=PAD,
    image_begin=BEGIN,
    image_end=END,
    image_slot=SLOT,
    visual_tokens=4,
    image_size=8,
)


@pytest.fixture
def tools(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(repository / "tools"))
    return repository / "tools"


@pytest.fixture
def open_transfusion(tools: Path) -> ModuleType:
    return importlib.import_module("open_transfusion")


def packed(documents: list[list[int]], pixels: torch.Tensor, total: int) -> Batch:
    tokens = [token for document in documents for token in document]
    positions = [place for document in documents for place in range(len(document))]
    padding = total - len(tokens)
    fields = {
        "tokens": torch.tensor(tokens + [PAD] * padding),
        "positions": torch.tensor(positions + [0] * padding),
    }
    info = BatchInfo((), (), len(tokens), len(pixels), total)
    return Batch(Flow(pixels, fields), Targets({}, {}), info)


def test_both_sides_see_the_same_words_and_latents_in_the_same_order(
    open_transfusion: ModuleType,
) -> None:
    group = [BEGIN, *[SLOT] * 4, END]
    documents = [
        [BOS, 1, 2, *group, 3, *group, EOS],
        [BOS, 4, 5, 6, EOS],
        [BOS, *group, *group, 7, EOS],  # two images with no word between them
    ]
    latents = torch.randn(5, 4, 48)  # the last stands in for none
    batch = packed(documents, unpatchify(latents, 4), 40)
    samples = open_transfusion.samples_of(batch, LAYOUT, 4)
    words = [[p.tolist() for p in sample if p.dim() == 1] for sample in samples]
    assert words == [[[1, 2], [3]], [[4, 5, 6]], [[7]]]
    shown = [part for sample in samples for part in sample if part.dim() == 2]
    torch.testing.assert_close(torch.stack(shown), latents[:4], rtol=0, atol=0)
    assert [[p.dim() for p in sample] for sample in samples] == [[1, 2, 1, 2], [1], [2, 2, 1]]
    # 7 words and 4 images of 4 rows; neither marks nor padding
    assert open_transfusion.counted(batch, LAYOUT) == open_transfusion.units_of(samples) == 23


def test_parts_hold_every_document_once_the_short_ones_first(open_transfusion: ModuleType) -> None:
    samples = [[torch.zeros(length)] for length in (9, 1, 5, 3, 8, 2, 7)]
    parts = open_transfusion.in_parts(samples, 3)
    assert [[len(s[0]) for s in part] for part in parts] == [[1, 2], [3, 5, 7], [8, 9]]
    assert open_transfusion.in_parts(samples[:2], 4) == [[samples[1]], [samples[0]]]


def test_the_table_compares_round_by_round_and_by_computed_position(tools: Path) -> None:
    bench = importlib.import_module("bench_transfusion")

    def entrant(name: str, parameters: int, computed: int) -> object:
        return bench.Entrant(bench.Side(name, lambda number: None, [60, 40]), parameters, computed)

    entrants = [
        entrant("mmtrain", 5_000_000, 125),
        entrant("mmtrain, 18 layers", 15_000_000, 125),
        entrant("theirs", 15_000_000, 250),
    ]
    found = bench.rows("some", entrants, [[800.0, 400.0], [300.0, 200.0], [100.0, 100.0]])
    assert [len(row) for row in found] == [len(bench.HEAD)] * 3
    assert found[0][2:] == [
        *("5.00M", "0.80", "600 (400 to 800)", "", "", "750 (500 to 1,000)", "", ""),
    ]
    assert found[2][3:] == [
        *("0.40", "100 (100 to 100)", "6.00 (4.00 to 8.00)", "2.50 (2.00 to 3.00)"),
        *("250 (250 to 250)", "3.00 (2.00 to 4.00)", "1.25 (1.00 to 1.50)"),
    ]


def test_both_cases_are_counted_alike_and_equal_documents_fill_their_packs(
    tools: Path, tmp_path: Path
) -> None:
    bench = importlib.import_module("bench_transfusion")
    sizes = bench.Sizes(32, 1, 2)
    found = []
    for case in bench.cases(sizes, tmp_path, 40, 1):
        setting = feed.read_setting(case.recipe)
        (batch,) = bench.loader_of(setting, workers=0).step(0)
        samples = bench.samples_of(batch, setting.layout, bench.PATCH)
        assert bench.counted(batch, setting.layout) == bench.units_of(samples)
        assert len(samples) == len(batch.info.sample_ids)
        found.append((samples, batch.info.slots))
    (ragged, _), (equal, positions) = found
    images = [sum(part.dim() == 2 for part in sample) for sample in ragged]
    assert set(images) <= {0, 1, 2, 3} and len(set(images)) > 1
    lengths = {len(part) for sample in ragged for part in sample if part.dim() == 1}
    assert min(lengths) >= 5 and max(lengths) <= 60
    # all positions but four marks of every document
    assert {bench.units_of([sample]) for sample in equal} == {84}
    assert positions == 88 * len(equal)
    setting = feed.read_setting(case.recipe)
    deeper = bench.as_large(setting, 150_000)
    assert deeper.recipe.model.language.layers > 1 == setting.recipe.model.language.layers
    assert sum(math.prod(shape) for shape in deeper.shapes.values()) >= 150_000


@pytest.mark.slow
def test_without_the_package_our_side_is_measured_alone(repository: Path, tmp_path: Path) -> None:
    few = ["--steps", "1", "--rounds", "1", "--seconds", "0", "--documents", "40", "--packs", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "tools/bench_transfusion.py", *few),
            *("--width", "32", "--layers", "1", "--heads", "2", "--packages", str(tmp_path)),
        ],
        cwd=repository,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[1] for row in rows] == ["mmtrain", "mmtrain"]
    ragged, equal = (row.split(" | ") for row in rows)
    assert ragged[0].startswith("| 0 to 3 images, texts of 5 to 60 tokens: ")
    # packs of documents of one length are full: all positions but four marks of each 88 are units
    assert equal[3] == f"{84 / 88:.2f}" and float(ragged[3]) > 0.8
    assert not list(tmp_path.iterdir())
