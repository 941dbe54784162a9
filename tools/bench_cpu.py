"""Speed on a CPU: a step against a bare loop, packing against padding, documents of the loader.

    python tools/bench_cpu.py [--steps N] [--rounds N] [--recipes tiny 25m] [--threads N]

Prints the tables of docs/benchmarks.md. All sides of a comparison run in this one process and take
turns (A B, B A, A B, ...), so that a busy machine slows all of them; a figure is the median over
the rounds, in brackets the slowest and the fastest. A ratio is taken inside each round.

Step: `run.build_engine` on one rank (DeepSpeed, with vision tower and one dummy image) against a
loop of a dozen lines over transformers' LLaMA of the trunk's size: same documents, same initial
trunk weights, fused AdamW, clipping, float32, threads. Before the clock starts, loss and gradient
norm of both must agree. Only real tokens count, padding never does. The ratio without the encoders
takes off what tower and causal transformer need for the dummy image, measured in the same rounds.
"""

import argparse
import contextlib
import gc
import logging
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked

import torch
from bare_loop import BareLoop, Rows, documents_in

from mmtrain import feed, log, recipe, run, supply
from mmtrain.data.assemble import Assembler
from mmtrain.data.batch import Batch
from mmtrain.data.document import Document, Modality, Part
from mmtrain.data.loader import Loader, Workers
from mmtrain.data.pack import PackPlan, Plan
from mmtrain.data.rules import Draw, Rule
from mmtrain.data.shapes import write_shapes
from mmtrain.data.shapes_text import remark
from mmtrain.data.shapes_world import kinds
from mmtrain.data.shards import build_index, write_shards
from mmtrain.data.vocabulary import Vocabulary, load_vocabulary
from mmtrain.errors import MmtrainError
from mmtrain.layout.dims import dims_for
from mmtrain.parallel.build import canonical_parameters
from mmtrain.parallel.mesh import Mesh, open_mesh
from mmtrain.settings import Recipe, SourceConfig
from mmtrain.train.engine import Engine

CONFIGS = Path(__file__).resolve().parents[1] / "configs/emu"
PACKS_COUNTED = 200  # of the demo mixture, for fill and balance
LOSS_AGREEMENT = 1e-5  # relative; float32 sums in another order
NORM_AGREEMENT = (
    3e-4  # torch's clipping adds millions of squares in float32: 8e-5 off on 4M numbers
)
PROSE_SHORTEST = 16  # the shortest text document is the context divided by this
progress = logging.getLogger("mmtrain.bench_cpu")


# --- taking turns --------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One side of a comparison: `step(n)` handles `units[n]` units (tokens, documents)."""

    name: str
    step: Callable[[int], object]
    units: Sequence[int]


@dataclass(frozen=True)
class Pace:
    """How much is measured: rounds of at least `seconds` for each side, by `clock`."""

    rounds: int
    seconds: float
    clock: Callable[[], float] = time.perf_counter


def race(sides: Sequence[Side], pace: Pace) -> list[list[float]]:
    """Units per second of each side in each round; the sides' order turns every round."""
    laps = [max(1, math.ceil(pace.seconds / _seconds(side, 1, pace.clock))) for side in sides]
    rates: list[list[float]] = [[] for _ in sides]
    for number in range(pace.rounds):
        turned = [(place + number) % len(sides) for place in range(len(sides))]
        for place in turned:
            side = sides[place]
            seconds = _seconds(side, laps[place], pace.clock)
            rates[place].append(laps[place] * sum(side.units) / seconds)
    return rates


def _seconds(side: Side, laps: int, clock: Callable[[], float]) -> float:
    gc.collect()  # nobody pays for the other side's garbage
    started = clock()
    for _ in range(laps):
        for number in range(len(side.units)):
            side.step(number)
    return clock() - started


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (smallest to largest)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Ratio of two sides, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], 2)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# --- data ----------------------------------------------------------------------------------


def write_prose(
    folder: Path, vocabulary: Vocabulary, documents: int, shortest: int, longest: int
) -> None:
    """A source of text documents whose lengths in tokens are spread evenly on a log scale.

    Args:
        folder: to make.
        vocabulary: the demo's.
        documents: how many.
        shortest: tokens at least.
        longest: tokens from which on a document gets no further sentence.
    """
    with write_shards(folder) as writer:
        for number in range(documents):
            draw = Draw("prose", number)
            wanted = math.exp(draw.uniform(math.log(shortest), math.log(longest)))
            sentences = [remark(draw, kinds())]
            tokens = len(vocabulary.encode(sentences[0]))
            while tokens < wanted:
                sentences.append(remark(draw, kinds()))
                tokens += len(vocabulary.encode(f". {sentences[-1]}"))
            text = Part(modality=Modality.text, text=" . ".join(sentences))
            writer.write(Document(sample_id=f"prose-{number:05d}", kind="text", parts=(text,)))
    build_index(folder, vocabulary)


def load(name: str) -> Recipe:
    """A recipe for one rank, each step one micro-batch (a bare loop does it like that)."""
    read = recipe.load(CONFIGS / f"{name}.yaml", ["parallel.tensor=1"], world_size=1)
    return replace(read, train=replace(read.train, micro_batch_packs=read.train.global_batch_packs))


def with_text_alone(read: Recipe, path: Path, max_tokens: int) -> Recipe:
    """The recipe on one text source, documents cut to `max_tokens`."""
    source = SourceConfig(path=str(path), rule=Rule.text, max_images=0, max_tokens=max_tokens)
    return replace(read, data=replace(read.data, sources={"prose": source}, heldout={}))


def equal_length(read: Recipe) -> int:
    """Longest document, at most half the context, of which a pack holds a whole number."""
    pack, half = read.data.pack_tokens, read.model.language.context // 2
    return next(length for length in range(half, 0, -1) if pack % length == 0)


def plan_of(setting: feed.Setting) -> Plan:
    """The packs of a recipe's training sources, as a run would plan them."""
    read = setting.recipe
    sources = feed.open_sources(setting, read.data.sources)
    return feed.make_plan(setting, supply.mixture_of(read, sources))


def assembler_of(setting: feed.Setting, plan: Plan, pack_tokens: int) -> Assembler:
    """What reads and lays out the packs of `plan`."""
    return Assembler(
        sources=plan.draws.sources,
        vocabulary=setting.vocabulary,
        layout=setting.layout,
        pack_tokens=pack_tokens,
    )


def loader_of(setting: feed.Setting, workers: int) -> Loader:
    """The loader of a run on one data rank, at its first step."""
    read, plan = setting.recipe, plan_of(setting)
    return Loader(
        plan,
        assembler_of(setting, plan, read.data.pack_tokens),
        global_batch_packs=read.train.global_batch_packs,
        micro_batch_packs=read.train.micro_batch_packs,
        workers=Workers(count=workers),
    )


# --- 1: a training step --------------------------------------------------------------------


@dataclass(frozen=True)
class StepCase:
    """One comparison of a step: a recipe on equal or unequal documents."""

    recipe: Recipe
    documents: str  # what the table says of them


def step_cases(names: Sequence[str], vocabulary: Vocabulary, documents: int) -> Iterator[StepCase]:
    """Each recipe on documents of unequal lengths, then of one length."""
    for name in names:
        read = load(name)
        context, length = read.model.language.context, equal_length(read)
        unequal, equal = Path(f"prose-{name}"), Path(f"prose-{name}-equal")
        write_prose(unequal, vocabulary, documents, context // PROSE_SHORTEST, context)
        write_prose(equal, vocabulary, documents, length, length)
        told = f"{context // PROSE_SHORTEST} to {context} tokens"
        yield StepCase(with_text_alone(read, unequal, context), told)
        yield StepCase(with_text_alone(read, equal, length), f"all {length} tokens")


def compare_step(case: StepCase, mesh: Mesh, steps: int, pace: Pace) -> list[str]:
    """One row of the table of steps."""
    setting = feed.read_setting(case.recipe)
    engine = run.build_engine(setting, mesh)
    trunk = dict(canonical_parameters(engine.named_layers()))
    bare = BareLoop(case.recipe.model.language, case.recipe.optimizer, trunk)
    loader, started = loader_of(setting, workers=0), time.perf_counter()
    batches = [loader.step(number) for number in range(steps)]
    reading = (time.perf_counter() - started) / steps
    pad = setting.layout.pad
    rows = [Rows.pad(documents_in(batch, pad), pad) for (batch,) in batches]
    tokens = [batch.info.tokens for (batch,) in batches]
    assert tokens == [int((r.ids != pad).sum()) for r in rows], "the sides see different tokens"
    check_agreement(engine, bare, batches[0], rows[0])
    ours, theirs, dummy = race(
        [
            training(engine, "mmtrain", batches),
            Side("bare", lambda number: bare.step(rows[number]), tokens),
            Side("dummy", lambda number: run_encoders(engine, batches[number]), tokens),
        ],
        pace,
    )
    mean = sum(tokens) / steps
    with_data = [mean / (mean / rate + reading) for rate in ours]
    trunk_alone = [1 / (1 / a - 1 / b) for a, b in zip(ours, dummy, strict=True)]
    return [
        case.recipe.name,
        case.documents,
        f"{mean:,.0f}",
        spread(ours),
        spread(theirs),
        f"**{ratios(ours, theirs)}**",
        ratios(trunk_alone, theirs),
        ratios(with_data, theirs),
        f"{sum(tokens) / sum(r.ids.numel() for r in rows):.2f}",
    ]


def training(engine: Engine, name: str, batches: Sequence[list[Batch]]) -> Side:
    """An engine over the micro-batches of some steps."""
    tokens = [sum(batch.info.tokens for batch in step) for step in batches]
    return Side(name, lambda number: engine.train_step(batches[number], 1.0), tokens)


def run_encoders(engine: Engine, batches: Sequence[Batch]) -> None:
    """What stands before the trunk, forward and backward: the work that the bare loop has not."""
    for batch in batches:
        flow, parameters = batch.inputs, list[torch.nn.Parameter]()
        for _, layer in takewhile(lambda named: named[0] != "embed", engine.named_layers()):
            flow = layer(flow)
            parameters += layer.parameters()
        torch.autograd.grad(flow.hidden.sum(), parameters)


def check_agreement(engine: Engine, bare: BareLoop, batches: list[Batch], rows: Rows) -> None:
    """Both sides must do the same work: first step, loss and gradient norm.

    Raises:
        MmtrainError: they differ; a comparison of speed would mean nothing.
    """
    report = engine.train_step(batches, 1.0)
    loss, norm = bare.step(rows)
    found = [
        ("loss", report.parts["text"], loss, LOSS_AGREEMENT),
        ("gradient norm", report.grad_norm, norm, NORM_AGREEMENT),
    ]
    for name, ours, theirs, limit in found:
        if not abs(ours - theirs) <= limit * abs(theirs):
            raise MmtrainError(f"first step: {name} {ours} here, {theirs} in the bare loop")


def step_table(rows: Iterable[Sequence[str]]) -> str:
    """The section about steps."""
    head = ["trunk of", "documents", "tokens a step", "mmtrain, tokens/s", "bare loop, tokens/s"]
    head += ["ratio", "ratio without the encoders", "ratio with reading and packing"]
    head += ["fill of the bare loop"]
    return f"## A training step\n\n{table(head, rows)}"


# --- 2: packing ----------------------------------------------------------------------------


def padded_plan(setting: feed.Setting, documents: int) -> Plan:
    """The same draws, `documents` at a time as they come, with no budget to fill."""
    read = setting.recipe
    room = replace(
        read.data,
        pack_tokens=documents * read.model.language.context,
        pack_images=documents * max(s.max_images for s in read.data.sources.values()),
        window_documents=documents,
    )
    return plan_of(replace(setting, recipe=replace(read, data=room)))


def pad_documents(setting: feed.Setting, plan: Plan, number: int) -> Batch:
    """Batch `number` of a padded plan: each document a row as long as the longest."""
    documents = plan.pack(number).documents
    longest = max(document.selection.positions for document in documents)
    rows = [PackPlan(place, (document,)) for place, document in enumerate(documents)]
    return assembler_of(setting, plan, longest).batch(rows)[0]


def filled(packs: Sequence[PackPlan], positions: int) -> tuple[str, str]:
    """Share of positions with tokens, and the most images of a pack over the mean."""
    images = [pack.images for pack in packs]
    fill = sum(pack.tokens for pack in packs) / positions
    return f"{fill:.3f}", f"{max(images) / statistics.mean(images):.2f}"


def compare_packing(mesh: Mesh, steps: int, pace: Pace) -> str:
    """The section about packing: the demo's mixture and model."""
    setting = feed.read_setting(load("demo"))
    engine, plan = run.build_engine(setting, mesh), plan_of(setting)
    size, step_packs = plan.pack_tokens, setting.recipe.train.global_batch_packs
    packs = [plan.pack(number) for number in range(PACKS_COUNTED)]
    together = round(step_packs * statistics.mean(len(pack.documents) for pack in packs))
    drawn = padded_plan(setting, together)
    batches = [drawn.pack(number) for number in range(max(1, PACKS_COUNTED // step_packs))]
    areas = [together * max(d.selection.positions for d in b.documents) for b in batches]
    loader = loader_of(setting, workers=0)
    packed = [loader.step(number) for number in range(steps)]
    padded = [[pad_documents(setting, drawn, number)] for number in range(steps)]
    rates = race([training(engine, "packed", packed), training(engine, "padded", padded)], pace)
    area, told = size * len(packs), f"{together} documents, padded to the longest"
    rows = [
        [f"packs of {size:,} positions", *filled(packs, area), spread(rates[0]), ratios(*rates)],
        [told, *filled(batches, sum(areas)), spread(rates[1]), "1"],
    ]
    head = ["the demo's mixture", "fill", "images, largest over mean", "tokens/s", "speed-up"]
    return f"## Packing\n\n{table(head, rows)}"


# --- 3: the loader -------------------------------------------------------------------------


def compare_workers(steps: int, rounds: int) -> str:
    """The section about the loader: documents of the demo, read, decoded, planned, packed."""
    setting = feed.read_setting(load("demo"))
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for number in range(rounds):
        for workers in list(rates)[number % 3 :] + list(rates)[: number % 3]:
            rates[workers].append(documents_per_second(setting, workers, steps))
    rows = [[str(workers), spread(found)] for workers, found in rates.items()]
    return f"## The loader\n\n{table(['workers', 'documents/s'], rows)}"


def documents_per_second(setting: feed.Setting, workers: int, steps: int) -> float:
    """Speed of a fresh loader that nobody else holds up, after its first batch."""
    loader = loader_of(setting, workers)
    loader.step(0)  # starts the workers
    started, documents = time.perf_counter(), 0
    for number in range(1, steps + 1):
        documents += sum(len(batch.info.sample_ids) for batch in loader.step(number))
    seconds = time.perf_counter() - started
    loader.close()
    return documents / seconds


# --- all of it -----------------------------------------------------------------------------


def circumstances(load_before: float) -> str:
    """When, where and with what."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpu = next(names, platform.processor() or platform.machine())
    packages = ("torch", "deepspeed", "transformers", "mosaicml-streaming")
    found = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{date.today()}; {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, "
        f"load average {load_before:.2f} before the start; Python {platform.python_version()}, "
        f"{found}; attention of transformers: sdpa; float32.\n\n"
        f"    python {shlex.join([f'tools/{Path(sys.argv[0]).name}', *sys.argv[1:]])}\n"
    )


def main() -> int:
    """Measure everything and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="different batches of a comparison")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=2.0, help="a turn lasts at least so long")
    parser.add_argument("--recipes", nargs="+", default=["tiny", "25m"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--documents", type=int, default=4000, help="of the demo data")
    asked = parser.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(asked.threads)
    log.start(rank=0)
    logging.getLogger("mmtrain").setLevel(logging.WARNING)
    progress.setLevel(logging.INFO)
    pace = Pace(asked.rounds, asked.seconds)
    dims = dims_for(1, tensor=1, pipeline=1, zero_stage=1, sequence=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        open_mesh(dims, timeout_seconds=600.0) as mesh,
    ):
        log.quiet_engines()
        progress.info("writing data")
        world = write_shapes(Path("demo_data"), asked.documents, seed=0)
        vocabulary = load_vocabulary(world.tokenizer)
        print(circumstances(load_before), flush=True)
        rows = []
        for case in step_cases(asked.recipes, vocabulary, max(64, asked.documents // 4)):
            rows.append(compare_step(case, mesh, asked.steps, pace))
            progress.info("step: %s", " | ".join(rows[-1]))
        print(step_table(rows), flush=True)
        print(compare_packing(mesh, asked.steps, pace), flush=True)
        print(compare_workers(4 * asked.steps, asked.rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
