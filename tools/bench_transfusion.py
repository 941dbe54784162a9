"""A training step of Transfusion against the open implementation, `transfusion-pytorch`.

    pip install --target DIR --no-deps transfusion-pytorch axial-positional-embedding beartype \
        einx ema-pytorch frozendict jaxtyping loguru rotary-embedding-torch scipy \
        torch-einops-utils torchdiffeq wadler-lindig
    python tools/bench_transfusion.py --packages DIR [--rounds N] [--threads N] [--width D ...]

The package is no dependency: its folder comes last on the path, and without it our side is measured
alone. Both sides take turns in this one process and thread count; a figure is the median over the
rounds (slowest to fastest), ratios are taken inside each round; with one thread time is that of the
processor.

A step is: noise, forward, backward, clipping, fused AdamW, float32. Equal are width, depth, heads,
width of the MLP, words of the vocabulary, latents of a row, documents of every step. A unit is a
word or a row of latents; what a side puts around them (begin and end tokens, its padding) counts
as computed positions but not as a unit. Not equal, because each side is as it comes: they predict
the flow and condition every layer on the time (adaptive norms, more parameters), mix all layers'
outputs and join lower with upper layers; we answer velocity and add the time once.

Theirs pads the documents of a step to the longest; `in n parts` is the best one can do without
packing: documents sorted by length, n backward passes of equal documents, one step.
"""

import argparse
import itertools
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_cpu import Pace, Side, circumstances, loader_of, race, ratios, spread, table
from torch import Tensor

from mmtrain import feed, log, recipe, run
from mmtrain.data.batch import Batch
from mmtrain.data.document import Document, Modality, Part
from mmtrain.data.images import encode_png
from mmtrain.data.rules import Draw
from mmtrain.data.shapes import write_shapes
from mmtrain.data.shapes_text import remark
from mmtrain.data.shapes_world import alone, choose_kinds, kinds, picture
from mmtrain.data.shards import build_index, write_shards
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.layout.dims import dims_for
from mmtrain.models.spec import Use
from mmtrain.nn.patches import patchify
from mmtrain.parallel.mesh import Mesh, open_mesh
from mmtrain.settings import Recipe

RECIPE = Path(__file__).resolve().parents[1] / "configs/transfusion/shapes.yaml"
PATCH, SIZE = 4, 32  # 64 rows of 48 numbers an image
SHORTEST, LONGEST = 5, 60  # words of a text
IMAGES = (0, 0, 1, 1, 1, 1, 1, 2, 2, 3)  # of a document, one in ten each
PACK = 1024
PARTS = 4
CLIP = 1.0
progress = logging.getLogger("mmtrain.bench_transfusion")


# --- documents -----------------------------------------------------------------------------


def words(draw: Draw, vocabulary: Vocabulary, count: int) -> str:
    """Sentences of the demo's grammar, at least `count` tokens; whole words only."""
    text = remark(draw, kinds())
    while len(vocabulary.encode(text)) < count:
        text = f"{text} . {remark(draw, kinds())}"
    kept: list[str] = []
    for word in text.split():
        if len(vocabulary.encode(" ".join([*kept, word]))) > count:
            break
        kept.append(word)
    return " ".join(kept)


def write_documents(folder: Path, vocabulary: Vocabulary, count: int, *, equal: int = 0) -> None:
    """A source of texts with 0 to 3 images between them.

    Args:
        folder: to make.
        vocabulary: the demo's.
        count: documents.
        equal: tokens of the one text beside one image; 0 draws lengths and images.
    """
    with write_shards(folder) as writer:
        for number in range(count):
            draw = Draw("bench", number)
            images = 1 if equal else IMAGES[draw.below(len(IMAGES))]
            parts = []
            for _ in range(max(images, 1)):
                span = math.log(SHORTEST), math.log(LONGEST)
                length = equal or round(math.exp(draw.uniform(*span)))
                parts.append(Part(modality=Modality.text, text=words(draw, vocabulary, length)))
                if images:
                    objects = alone(draw, choose_kinds(draw, 1, kinds())[0])
                    shown = encode_png(picture(draw, objects))
                    parts.append(Part(modality=Modality.image, media=(shown,)))
            writer.write(Document(sample_id=f"{number:05d}", kind="page", parts=tuple(parts)))
    build_index(folder, vocabulary)


@dataclass(frozen=True)
class Sizes:
    """What both models have in common."""

    width: int
    layers: int
    heads: int
    vocabulary: int = 256

    @property
    def mlp(self) -> int:
        """Inner width of the gated MLP, as theirs computes it."""
        return int(self.width * 4 * 2 / 3)


def recipe_for(sizes: Sizes, data: Path, tokenizer: Path, pack: int, packs: int) -> Recipe:
    """The shapes recipe of these sizes on one source, a step of `packs` packs in one pass."""
    source = f"{{path: {data}, rule: document, max_images: 3, max_tokens: 512}}"
    language = {
        "vocabulary": sizes.vocabulary,
        "layers": sizes.layers,
        "width": sizes.width,
        "heads": sizes.heads,
        "mlp_width": sizes.mlp,
        "context": 512,
    }
    overrides = [
        *(f"model.language.{key}={value}" for key, value in language.items()),
        f"model.image.size={SIZE}",
        f"model.image.patch={PATCH}",
        f"data.tokenizer={tokenizer}",
        f"data.sources={{captions: {source}}}",
        "data.heldout={}",
        f"data.pack_tokens={pack}",
        f"data.pack_images={pack // ((SIZE // PATCH) ** 2 + 2)}",
        f"train.global_batch_packs={packs}",
        f"train.micro_batch_packs={packs}",
        f"optimizer.clip_norm={CLIP}",
        "train.ema=0",
        "validate.every_steps=0",
    ]
    return recipe.load(RECIPE, overrides, world_size=1)


# --- the same documents for both -----------------------------------------------------------


def samples_of(batch: Batch, setting: feed.Setting) -> list[list[Tensor]]:
    """Documents of a packed batch as theirs wants them: words `[n]` and latents `[rows, values]`.

    What only marks a document or an image is left out: theirs puts its own marks.
    """
    layout, fields = setting.layout, batch.inputs.fields
    marks = torch.tensor([layout.bos, layout.eos, layout.image_begin, layout.image_end])
    latents = iter(patchify(batch.inputs.hidden, setting.recipe.model.image.patch))
    real = fields["tokens"] != layout.pad
    starts = torch.nonzero(fields["positions"][real] == 0).flatten()[1:]
    out = []
    for ids in torch.tensor_split(fields["tokens"][real], starts.tolist()):
        kept = ids[~torch.isin(ids, marks)]
        parts: list[Tensor] = []
        for is_image, run_of in itertools.groupby(kept.tolist(), layout.image_slot.__eq__):
            found = list(run_of)
            if is_image:
                count = len(found) // layout.visual_tokens
                parts += itertools.islice(latents, count)
            else:
                parts.append(torch.tensor(found))
        out.append(parts)
    return out


def units_of(samples: Sequence[Sequence[Tensor]]) -> int:
    """Words and rows of latents."""
    return sum(len(part) for sample in samples for part in sample)


def counted(batch: Batch, setting: feed.Setting) -> int:
    """The same, counted in our fields: what is neither padding nor a mark."""
    layout = setting.layout
    marks = [layout.bos, layout.eos, layout.pad, layout.image_begin, layout.image_end]
    return int((~torch.isin(batch.inputs.fields["tokens"], torch.tensor(marks))).sum())


# --- sides ---------------------------------------------------------------------------------


class Theirs:
    """`transfusion-pytorch` with an optimizer; `computed` counts positions of its trunk."""

    def __init__(self, sizes: Sizes) -> None:
        """Build it; ImportError where the package is not installed."""
        from transfusion_pytorch import Transfusion

        rows, values = (SIZE // PATCH) ** 2, 3 * PATCH**2
        self.model: Any = Transfusion(
            num_text_tokens=sizes.vocabulary,
            dim_latent=values,
            modality_default_shape=(rows,),
            transformer={
                "dim": sizes.width,
                "depth": sizes.layers,
                "heads": sizes.heads,
                "dim_head": sizes.width // sizes.heads,
            },
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.computed = 0
        self.model.transformer.register_forward_pre_hook(self._count)

    def _count(self, module: object, inputs: tuple[Tensor, ...]) -> None:
        self.computed += inputs[0].shape[0] * inputs[0].shape[1]

    def step(self, parts: Sequence[list[list[Tensor]]]) -> float:
        """One optimizer step over the passes of `parts`; returns the mean loss."""
        total = 0.0
        for samples in parts:
            loss = self.model(samples) / len(parts)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def in_parts(samples: Sequence[list[Tensor]], parts: int) -> list[list[list[Tensor]]]:
    """Samples sorted by length, in `parts` passes of as many samples each (one more or less)."""
    ordered = sorted(samples, key=lambda sample: units_of([sample]))
    edges = [round(len(ordered) * place / parts) for place in range(parts + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(edges) if a < b]


@dataclass(frozen=True)
class Case:
    """One comparison."""

    told: str
    recipe: Recipe


def compare(case: Case, sizes: Sizes, mesh: Mesh, steps: int, pace: Pace) -> list[list[str]]:
    """Rows of the table: a side each."""
    setting = feed.read_setting(case.recipe)
    engine = run.build_engine(setting, mesh)
    loader = loader_of(setting, workers=0)
    batches = [loader.step(number)[0] for number in range(steps)]
    prepare = setting.spec.prepare(case.recipe.model, setting.layout, mesh.device, Use.training)
    units = [counted(batch, setting) for batch in batches]
    samples = [samples_of(batch, setting) for batch in batches]
    assert units == [units_of(step) for step in samples], "the sides see different documents"
    parameters = sum(math.prod(shape) for shape in setting.shapes.values())
    computed = sum(batch.info.slots for batch in batches)
    sides = [Side("mmtrain", lambda n: engine.train_step([prepare(batches[n])], 1.0), units)]
    facts = [(parameters, computed)]
    for parts in (1, PARTS):
        theirs = _theirs(sizes, [in_parts(step, parts) for step in samples], units, parts)
        if theirs is not None:
            sides.append(theirs[0])
            facts.append(theirs[1])
    rates = race(sides, pace)
    mean = f"{sum(map(len, samples)) / steps:.1f} documents, {sum(units) / steps:,.0f} units"
    rows = []
    for side, own, (count, positions) in zip(sides, rates, facts, strict=True):
        scale = positions / sum(units)
        each = [rate * scale for rate in own]
        ours = [rate * facts[0][1] / sum(units) for rate in rates[0]]
        first = side.name == "mmtrain"
        rows.append(
            [
                f"{case.told}: {mean}",
                side.name,
                f"{count / 1e6:.2f}M",
                f"{1 / scale:.2f}",
                spread(own),
                "" if first else f"**{ratios(rates[0], own)}**",
                spread(each),
                "" if first else ratios(ours, each),
            ]
        )
    return rows


def _theirs(
    sizes: Sizes, steps: list[list[list[list[Tensor]]]], units: list[int], parts: int
) -> tuple[Side, tuple[int, int]] | None:
    """Their side, its parameters and computed positions; None where it is not installed."""
    try:
        theirs = Theirs(sizes)
    except ImportError:
        return None
    for _ in range(2):  # their router times its ways of assembling a batch once
        for step in steps:
            assert math.isfinite(theirs.step(step))
    theirs.computed = 0
    for step in steps:
        theirs.step(step)
    numbers = sum(p.numel() for p in theirs.model.parameters())
    name = "transfusion-pytorch" + (f", in {parts} parts" if parts > 1 else "")
    return Side(name, lambda n: theirs.step(steps[n]), units), (numbers, theirs.computed)


HEAD = (
    "documents of a step", "side", "parameters", "units of computed positions", "units/s",
    "mmtrain over it", "computed positions/s", "mmtrain over it",
)  # fmt: skip


def cases(sizes: Sizes, folder: Path, documents: int, packs: int) -> Iterator[Case]:
    """Unequal documents, then documents of one length that fill every pack."""
    world = write_shapes(folder / "world", 24, seed=0)
    vocabulary = load_vocabulary(world.tokenizer)
    write_documents(folder / "ragged", vocabulary, documents)
    told = f"0 to 3 images, texts of {SHORTEST} to {LONGEST} tokens"
    yield Case(told, recipe_for(sizes, folder / "ragged", world.tokenizer, PACK, packs))
    # marks of a document with an image: <s> [IMG] [/IMG] </s>
    equal = 20
    length = equal + (SIZE // PATCH) ** 2 + 4
    write_documents(folder / "equal", vocabulary, documents, equal=equal)
    pack = length * (PACK // length)
    yield Case(
        f"one image and a text, all {length} tokens",
        recipe_for(sizes, folder / "equal", world.tokenizer, pack, packs),
    )


def main() -> int:
    """Measure everything and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packages", type=Path, help="folder of transfusion-pytorch")
    parser.add_argument("--steps", type=int, default=4, help="different steps of a comparison")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=2.0, help="a turn lasts at least so long")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--documents", type=int, default=400, help="of each source")
    parser.add_argument("--packs", type=int, default=2, help="of a step")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    asked = parser.parse_args()
    if asked.packages is not None:
        sys.path.append(str(asked.packages))
    load_before = os.getloadavg()[0]
    torch.set_num_threads(asked.threads)
    log.start(rank=0)
    logging.getLogger("mmtrain").setLevel(logging.WARNING)
    sizes = Sizes(asked.width, asked.layers, asked.heads)
    dims = dims_for(1, tensor=1, pipeline=1, zero_stage=1, sequence=False)
    # of one thread the processor's time is not disturbed by other work on the machine
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    pace = Pace(asked.rounds, asked.seconds, clock)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_mesh(dims, timeout_seconds=600.0) as mesh,
    ):
        log.quiet_engines()
        print(circumstances(load_before), flush=True)
        rows = []
        for case in cases(sizes, Path(folder), asked.documents, asked.packs):
            rows += compare(case, sizes, mesh, asked.steps, pace)
    print(table(HEAD, rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
