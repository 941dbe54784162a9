"""How full and how even packs are: strategies of `data.packing` on lengths of documents.

    python tools/bench_packing.py

Plans alone: no media, no model. The lengths are those of `tools/lengths/*.json`, of their mixture
by the weights of `configs/emu/14b_pretrain.yaml`, and of the demo (written to a temporary folder).
Prints one table in Markdown.

- fill: positions in use of all positions of the packs.
- tokens, images: most of any pack, over the mean.
- over padding: positions of the same documents in rows of their own, each batch of 16 as wide as
  its longest, over those of the packs; what a step saves where time is proportional to positions.
- over next-fit: the same against packs filled in order.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time

from mmtrain import supply
from mmtrain.data.choices import Packing
from mmtrain.data.document import Document, DocumentLengths, Modality, PartLength
from mmtrain.data.lengths import collect
from mmtrain.data.mixture import Mixture, Source
from mmtrain.data.pack import PackPlan, Plan
from mmtrain.data.rules import Draw, Rule, RuleOptions
from mmtrain.data.shapes import write_shapes
from mmtrain.data.vocabulary import load_vocabulary
from mmtrain.models.families import spec_of
from mmtrain.recipe import read

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = sorted(Path(__file__).with_name("lengths").glob("*.json"))
WEIGHTS = {"laion captions": 256.0, "mmc4 pages": 64.0, "storyboards": 16.0}
IMAGE = 34  # positions of an image of Emu: 32 and its two marks
IMAGES = 40  # images of a pack at most; seldom reached, as it should be
PADDED = 16  # documents of a batch without packing
HEADINGS = (
    "documents", "look-ahead", "packing", "fill", "tokens, most / mean", "images, most / mean",
    "over padding", "over next-fit", "us a document",
)  # fmt: skip


class Unread:
    """Documents of which nothing but lengths is known."""

    def document(self, number: int) -> Document:
        """Never asked for."""
        raise AssertionError(f"document {number} was opened while planning")


@dataclass(frozen=True)
class Case:
    """Sources and the budgets of a pack."""

    name: str
    sources: Sequence[Source]
    group_length: int
    pack_tokens: int
    pack_images: int


@dataclass(frozen=True)
class Measured:
    """What became of the documents of a case."""

    fill: float
    tokens: float
    images: float
    saved: float
    per_document: float  # positions, padding included
    seconds: float  # of planning, a document


def drawn(counts: Sequence[float], draw: Draw) -> int:
    """Index of a bin, by its count."""
    point = draw.uniform(0.0, sum(counts))
    for index, count in enumerate(counts):
        point -= count
        if point < 0:
            return index
    return len(counts) - 1


def source_of(path: Path, documents: int) -> Source:
    """Documents drawn from a file of `tools/lengths`."""
    shape = json.loads(path.read_text())
    draw = Draw("lengths", shape["name"])
    numbers, weights = list(map(int, shape["images"])), list(shape["images"].values())

    def text() -> int:
        at = drawn(shape["counts"], draw)
        low, high = shape["edges"][at : at + 2]
        return low + draw.below(high - low)

    def parts() -> tuple[PartLength, ...]:
        images = numbers[drawn(weights, draw)]
        whole = text()
        share = whole if shape["text_per"] == "image" else whole / (images + 1)
        out: list[PartLength] = []
        for index in range(images):  # text before every image, and behind the last
            part = round(share * draw.uniform(0.5, 1.5))
            out += [PartLength(Modality.text, part), PartLength(Modality.image, 1, match=2 * index)]
        return (*out, PartLength(Modality.text, max(1, round(share))))

    found = [DocumentLengths(str(n), shape["name"], parts()) for n in range(documents)]
    return Source(
        name=shape["name"],
        lengths=collect(found, fingerprint="", dataset="", shard_sizes=[documents]),
        documents=Unread(),
        options=RuleOptions(
            rule=Rule(shape["rule"]),
            max_images=shape["max_images"],
            max_positions=shape["max_tokens"],
        ),
    )


def cases(documents: int, folder: Path) -> list[Case]:
    """Every histogram, all together, and the demo."""
    sources = [source_of(path, documents) for path in LENGTHS]
    found = [Case(source.name, [source], IMAGE, 2048, IMAGES) for source in sources]
    mixed = [replace(source, weight=WEIGHTS[source.name]) for source in sources]
    found.append(Case("all three, as 14b_pretrain", mixed, IMAGE, 2048, IMAGES))
    write_shapes(folder / "demo_data", max(400, documents // 4), 0)
    here = Path.cwd()
    os.chdir(folder)
    try:
        recipe = read(ROOT / "configs/emu/demo.yaml")
        vocabulary = load_vocabulary(Path(recipe.data.tokenizer))
        group = spec_of("emu", recipe.phase).sequence(recipe.model, vocabulary.ids).group_length
        demo = supply.open_sources(recipe.data, recipe.data.sources, vocabulary)
    finally:
        os.chdir(here)
    found.append(Case("demo", demo, group, recipe.data.pack_tokens, recipe.data.pack_images))
    return found


def measure(case: Case, packing: Packing, look_ahead: int, documents: int) -> Measured:
    """Plan some documents and look at the packs."""
    plan = Plan(
        Mixture(case.sources, seed=0),
        group_length=case.group_length,
        pack_tokens=case.pack_tokens,
        pack_images=case.pack_images,
        window_documents=look_ahead,
        seed=0,
        packing=packing,
    )
    packs: list[PackPlan] = []
    count = 0
    began = process_time()
    while count < documents:
        packs.append(plan.pack(len(packs)))
        count += len(packs[-1].documents)
    seconds = process_time() - began
    tokens, images = [pack.tokens for pack in packs], [pack.images for pack in packs]
    sizes = [item.selection.positions for pack in packs for item in pack.documents]
    rows = [sizes[start : start + PADDED] for start in range(0, count, PADDED)]
    padded = sum(len(row) * max(row) for row in rows)
    packed = len(packs) * case.pack_tokens
    return Measured(
        fill=sum(tokens) / packed,
        tokens=max(tokens) * len(packs) / sum(tokens),
        images=max(images) * len(packs) / sum(images),
        saved=padded / packed,
        per_document=packed / count,
        seconds=seconds / count,
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=6000, help="planned, of every case")
    parser.add_argument("--look-ahead", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    print(f"python tools/bench_packing.py --documents {arguments.documents}")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, 1 used\n")
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments.documents, Path(folder)):
            for look_ahead in arguments.look_ahead:
                in_order = measure(case, Packing.next_fit, look_ahead, arguments.documents)
                fitted = measure(case, Packing.first_fit, look_ahead, arguments.documents)
                padded = measure(case, Packing.pad, look_ahead, arguments.documents)
                for packing, found in (
                    (Packing.first_fit, fitted), (Packing.next_fit, in_order), (Packing.pad, padded)
                ):  # fmt: skip
                    gain = in_order.per_document / found.per_document
                    cells = (
                        case.name, str(look_ahead), packing.value, f"{found.fill:.1%}",
                        f"{found.tokens:.2f}", f"{found.images:.2f}", f"{found.saved:.2f}",
                        f"{gain:.2f}", f"{found.seconds * 1e6:.0f}",
                    )  # fmt: skip
                    print(f"| {' | '.join(cells)} |", flush=True)
                    key = f"{case.name}/{look_ahead}/{packing.value}"
                    figures[key] = {**vars(found), "over_next_fit": gain}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
