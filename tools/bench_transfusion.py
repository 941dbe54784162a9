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
outputs and join lower with upper layers; we answer velocity and add the time once. So ours also
races with layers enough to have as many parameters as theirs.

Theirs pads the documents of a step to the longest; `in n parts` is the best one can do without
packing: documents sorted by length, n backward passes of equal documents, one step.
"""

import argparse
import contextlib
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_cpu import Pace, Side, circumstances, loader_of, race, ratios, spread, table
from open_transfusion import (
    CLIP,
    PATCH,
    SIZE,
    Sizes,
    Theirs,
    counted,
    in_parts,
    samples_of,
    units_of,
)
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
from mmtrain.parallel.mesh import Mesh, open_mesh
from mmtrain.settings import Recipe

RECIPE = Path(__file__).resolve().parents[1] / "configs/transfusion/tiny.yaml"
SHORTEST, LONGEST = 5, 60  # words of a text
IMAGES = (0, 0, 1, 1, 1, 1, 1, 2, 2, 3)  # of a document, one in ten each
PACK = 1024
_FILLER = "a"  # one token
PARTS = 4
progress = logging.getLogger("mmtrain.bench_transfusion")


# --- documents -----------------------------------------------------------------------------


def words(draw: Draw, vocabulary: Vocabulary, count: int) -> str:
    """Sentences of the demo's grammar, cut between words and filled up to `count` tokens."""
    text = remark(draw, kinds())
    while len(vocabulary.encode(text)) < count:
        text = f"{text} . {remark(draw, kinds())}"
    kept: list[str] = []
    for word in text.split():
        if len(vocabulary.encode(" ".join([*kept, word]))) > count:
            break
        kept.append(word)
    while len(vocabulary.encode(" ".join(kept))) < count:
        kept.append(_FILLER)
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


def recipe_for(
    sizes: Sizes, data: Path, tokenizer: Path, *, pack: int, packs: int, packing: str
) -> Recipe:
    """The tiny recipe at these sizes on one source, a step of `packs` packs in one pass."""
    source = f"{{path: {data}, rule: document, max_images: 3, max_tokens: 512}}"
    language = {
        "vocabulary": sizes.vocabulary,
        "layers": sizes.layers,
        "width": sizes.width,
        "heads": sizes.heads,
        "mlp_width": sizes.mlp,
        "context": 512,
        "qk_norm": "rms",
    }
    overrides = [
        *(f"model.language.{key}={value}" for key, value in language.items()),
        f"model.image.size={SIZE}",
        f"model.image.patch={PATCH}",
        f"data.tokenizer={tokenizer}",
        f"data.sources={{captions: {source}, pages: null, text: null}}",
        "model.noise.answer=velocity",
        f"data.pack_tokens={pack}",
        f"data.packing={packing}",
        f"data.pack_images={pack // ((SIZE // PATCH) ** 2 + 2)}",
        f"train.global_batch_packs={packs}",
        f"train.micro_batch_packs={packs}",
        f"optimizer.clip_norm={CLIP}",
        "train.steps=700",
        "schedule.warmup_steps=50",
        "optimizer.learning_rate=2e-3",
        "optimizer.weight_decay=0.05",
    ]
    return recipe.load(RECIPE, overrides, world_size=1)


# --- sides ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One comparison."""

    told: str
    recipe: Recipe


@dataclass(frozen=True)
class Entrant:
    """A side of the race: what it has, and what its trunk computes in all steps of a lap."""

    side: Side
    parameters: int
    computed: int


def ours(
    name: str, setting: feed.Setting, mesh: Mesh, batches: Sequence[Batch], units: list[int]
) -> Entrant:
    """Our engine over micro-batches of the loader."""
    engine = run.build_engine(setting, mesh)
    prepare = setting.spec.prepare(setting.recipe.model, setting.layout, mesh.device, Use.training)

    def step(number: int) -> object:
        return engine.train_step([prepare(batches[number])], 1.0)

    computed = sum(batch.info.slots for batch in batches)
    return Entrant(Side(name, step, units), _numbers(setting), computed)


def theirs(
    sizes: Sizes, samples: Sequence[list[list[Tensor]]], units: list[int], parts: int
) -> Entrant:
    """Their model over the same documents; ImportError where it is not installed."""
    model = Theirs(sizes)
    steps = [in_parts(step, parts) for step in samples]
    for step in steps:  # their router times its ways of assembling a batch once
        assert math.isfinite(model.step(step)), "their loss is not finite"
    model.computed = 0
    for step in steps:
        model.step(step)
    numbers = sum(p.numel() for p in model.model.parameters())
    name = "transfusion-pytorch" + (f", in {parts} parts" if parts > 1 else "")
    side = Side(name, lambda number: model.step(steps[number]), units)
    return Entrant(side, numbers, model.computed)


def compare(case: Case, sizes: Sizes, mesh: Mesh, steps: int, pace: Pace) -> list[list[str]]:
    """Rows of the table: a side each."""
    setting = feed.read_setting(case.recipe)
    loader = loader_of(setting, workers=0)
    batches = [loader.step(number)[0] for number in range(steps)]
    units = [counted(batch, setting.layout) for batch in batches]
    samples = [samples_of(batch, setting.layout, PATCH) for batch in batches]
    assert units == [units_of(step) for step in samples], "the sides see different documents"
    entrants = [ours("mmtrain", setting, mesh, batches, units)]
    with contextlib.suppress(ImportError):
        others = [theirs(sizes, samples, units, parts) for parts in (1, PARTS)]
        large = as_large(setting, others[0].parameters)
        name = f"mmtrain, {large.recipe.model.language.layers} layers"
        entrants += [ours(name, large, mesh, batches, units), *others]
    rates = race([entrant.side for entrant in entrants], pace)
    told = f"{sum(map(len, samples)) / steps:.1f} documents, {sum(units) / steps:,.0f} units"
    return rows(f"{case.told}: {told}", entrants, rates)


def as_large(setting: feed.Setting, parameters: int) -> feed.Setting:
    """The same model with layers enough to have at least as many parameters."""
    read = setting.recipe
    while _numbers(setting) < parameters:
        language = setting.recipe.model.language
        deeper = replace(read.model, language=replace(language, layers=language.layers + 1))
        setting = feed.read_setting(replace(read, model=deeper))
    return setting


def _numbers(setting: feed.Setting) -> int:
    return sum(math.prod(shape) for shape in setting.shapes.values())


def rows(
    told: str, entrants: Sequence[Entrant], rates: Sequence[Sequence[float]]
) -> list[list[str]]:
    """A row an entrant; of theirs also what ours, of equal sizes and as large, do in its place.

    Args:
        told: of the documents.
        entrants: ours, and where theirs is installed ours as large, then theirs.
        rates: units a second of each, a number a round.
    """
    scales = [entrant.computed / sum(entrant.side.units) for entrant in entrants]
    computed = [[rate * scale for rate in own] for own, scale in zip(rates, scales, strict=True)]
    out = []
    for place, entrant in enumerate(entrants):
        over = ["", "", "", ""]
        if place > 1:
            over = [ratios(each[k], each[place]) for each in (rates, computed) for k in (0, 1)]
        row = [told, entrant.side.name, f"{entrant.parameters / 1e6:.2f}M"]
        row += [f"{1 / scales[place]:.2f}", spread(rates[place]), *over[:2]]
        out.append([*row, spread(computed[place]), *over[2:]])
    return out


HEAD = (
    "documents of a step", "side", "parameters", "units of computed positions", "units/s",
    "mmtrain over it", "as large over it", "computed positions/s", "mmtrain over it",
    "as large over it",
)  # fmt: skip


def cases(sizes: Sizes, folder: Path, documents: int, packs: int) -> Iterator[Case]:
    """Unequal documents, then documents of one length that fill every pack."""
    world = write_shapes(folder / "world", 24, seed=0)
    vocabulary = load_vocabulary(world.tokenizer)
    write_documents(folder / "ragged", vocabulary, documents)
    told = f"0 to 3 images, texts of {SHORTEST} to {LONGEST} tokens"
    yield Case(
        told,
        recipe_for(
            sizes, folder / "ragged", world.tokenizer, pack=PACK, packs=packs, packing="first_fit"
        ),
    )
    # marks of a document with an image: <s> [IMG] [/IMG] </s>
    equal = 20
    length = equal + (SIZE // PATCH) ** 2 + 4
    write_documents(folder / "equal", vocabulary, documents, equal=equal)
    together = PACK // length
    yield Case(
        f"one image and a text, all {length} tokens",
        recipe_for(
            sizes,
            folder / "equal",
            world.tokenizer,
            pack=length * together,
            packs=packs,
            packing="next_fit",  # first_fit keeps some slack
        ),
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
        found = []
        for case in cases(sizes, Path(folder), asked.documents, asked.packs):
            found += compare(case, sizes, mesh, asked.steps, pace)
    print(table(HEAD, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
