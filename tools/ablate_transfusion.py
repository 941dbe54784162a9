"""The ablations of Transfusion (arXiv:2408.11039, tables 5, 6 and 8) at small scale, in one table.

    mmtrain data shapes demo_data --documents 12000
    python tools/ablate_transfusion.py run runs/ablation --seeds 0 1 2      # hours; may be stopped
    python tools/ablate_transfusion.py table runs/ablation                  # of what is there

Each setting is `mmtrain train configs/transfusion/ablation.yaml` with overrides, for every seed; then
its figures (`ablation_measures`) are written beside the run. A run that has its figures is not done
again, one that was stopped is. All runs see the same documents in the same order, as many an
optimizer step and as many steps: an image counts once whatever its patch. (The paper fixes trunk
rows instead, so its larger patches saw more images.) Overrides after `--` hold for every run.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from mmtrain import log
from mmtrain.errors import ContentError, MissingError, MmtrainError, RecipeError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs/transfusion/ablation.yaml"
FIGURES = "ablation.json"  # in a run's folder
TRUTH = "truth.json"  # in the campaign's folder
_DOCUMENTS_A_STEP = 8
_WORDS = 32  # positions a document has beside its image, on average at most

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One setting of the paper, and what the paper says of it (0.76B, tables 5, 6 and 8).

    Attributes:
        key: names its runs.
        told: names it in the table.
        overrides: of the recipe.
        fid: of the paper; None if it gives none.
        cider: of the paper.
    """

    key: str
    told: str
    overrides: tuple[str, ...]
    fid: float
    cider: float


def _variant(
    key: str, told: str, paper: tuple[float, float], patch: int, *overrides: str
) -> Variant:
    rows = (32 // patch) ** 2
    sizes = (
        f"model.image.patch={patch}",
        f"data.pack_tokens={_DOCUMENTS_A_STEP * (rows + _WORDS)}",
        f"data.pack_images={_DOCUMENTS_A_STEP}",
        *(f"data.{group}.captions.max_tokens={rows + 48}" for group in ("sources", "heldout")),
    )
    return Variant(key, told, (*sizes, *overrides), *paper)


def _unet(*channels: int) -> tuple[str, str]:
    return "model.image.edge=unet", f"model.image.unet_channels=[{','.join(map(str, channels))}]"


_CAUSAL = "model.image.attention=causal"
VARIANTS = {
    variant.key: variant
    for variant in (
        _variant("linear_causal", "linear, k = 2, causal", (61.3, 12.7), 2, _CAUSAL),
        _variant("linear_2", "linear, k = 2", (20.3, 16.0), 2),
        _variant("linear_4", "linear, k = 4", (25.6, 14.3), 4),
        _variant("linear_8", "linear, k = 8", (43.5, 11.3), 8),
        _variant("unet_causal", "U-Net, k = 2, causal", (16.8, 23.3), 2, *_unet(16, 32), _CAUSAL),
        _variant("unet_2", "U-Net, k = 2", (16.7, 25.4), 2, *_unet(16, 32)),
        _variant("unet_4", "U-Net, k = 4", (16.0, 29.9), 4, *_unet(16, 32, 32)),
        _variant("unet_8", "U-Net, k = 8", (16.1, 29.5), 8, *_unet(16, 32, 32, 32)),
        _variant(
            "unet_limit",
            "U-Net, k = 2, t <= 500 before text",
            (16.5, 29.4),
            2,
            *_unet(16, 32),
            "model.noise.limit=500",
        ),
    )
}


@dataclass(frozen=True)
class Metric:
    """A column of the table: how it is written, and whether less is better."""

    key: str
    told: str
    digits: int
    less_is_better: bool = False
    percent: bool = False

    def write(self, values: Sequence[float]) -> str:
        """Mean (least to greatest)."""
        scaled = [value * (100 if self.percent else 1) for value in values]
        parts = (statistics.mean(scaled), min(scaled), max(scaled))
        mean, low, high = (f"{part:.{self.digits}f}" for part in parts)
        return mean if len(values) == 1 else f"{mean} ({low} to {high})"


METRICS = (
    Metric("image_loss", "image loss", 4, less_is_better=True),
    Metric("frechet", "Frechet", 2, less_is_better=True),
    Metric("accepted", "accepted %", 0, percent=True),
    Metric("colours", "colours %", 0, percent=True),
    Metric("number", "number %", 0, percent=True),
    Metric("caption_loss", "caption loss", 3, less_is_better=True),
    Metric("captions_true", "captions true %", 0, percent=True),
    Metric("cider", "CIDEr-D", 0),
)
_BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Comparison:
    """Two settings, a figure of the paper and those of ours that stand for it."""

    told: str
    first: str
    second: str
    paper: str  # "fid" or "cider"
    ours: tuple[str, ...]


_PICTURES = ("image_loss", "frechet")
COMPARISONS = (
    Comparison("linear: causal to bidirectional", "linear_causal", "linear_2", "fid", _PICTURES),
    Comparison("U-Net: causal to bidirectional", "unet_causal", "unet_2", "fid", _PICTURES),
    Comparison("linear to U-Net, k = 2", "linear_2", "unet_2", "fid", _PICTURES),
    Comparison(
        "all times to t <= 500", "unet_2", "unet_limit", "cider", ("caption_loss", "cider")
    ),
    Comparison("linear: k = 2 to 4", "linear_2", "linear_4", "fid", _PICTURES),
    Comparison("linear: k = 4 to 8", "linear_4", "linear_8", "fid", _PICTURES),
    Comparison("U-Net: k = 2 to 4", "unet_2", "unet_4", "fid", _PICTURES),
    Comparison("U-Net: k = 4 to 8", "unet_4", "unet_8", "fid", _PICTURES),
)


# --- running -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training and its figures."""

    variant: Variant
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    documents: int
    pictures: int

    @property
    def asked(self) -> dict[str, Any]:
        """What its figures are of."""
        recipe = RECIPE.read_text(encoding="utf-8").splitlines()
        return {
            "overrides": list(self.overrides),
            "recipe": [line for line in recipe if not line.startswith("#")],
            "documents": self.documents,
            "pictures": self.pictures,
        }

    def is_done(self) -> bool:
        """Whether its figures are there.

        Raises:
            ContentError: they are of other settings.
        """
        if not (self.folder / FIGURES).is_file():
            return False
        found = read_figures(self.folder)
        if found["asked"] != json.loads(json.dumps(self.asked)):
            raise ContentError(
                f"{self.folder / FIGURES}: its figures are of other settings than those asked "
                "for now; name another folder for the campaign, or remove that run"
            )
        return True

    def do(self) -> None:
        """Train, measure in a process of its own, keep the figures.

        Raises:
            MmtrainError: training or measuring failed; what it said stands above.
        """
        started = monotonic()
        train = [sys.executable, "-m", "mmtrain", "train", str(RECIPE), *self.overrides]
        _call(train, self.folder)
        trained = monotonic()
        counts = [str(self.documents), str(self.pictures)]
        _call([sys.executable, __file__, "measure", str(self.folder), *counts], self.folder)
        part = self.folder / f"{FIGURES}.partial"
        found = json.loads(part.read_text(encoding="utf-8"))
        seconds = {"train": trained - started, "measure": monotonic() - trained}
        text = json.dumps({"asked": self.asked, "seconds": seconds, "figures": found}, indent=1)
        part.write_text(text, encoding="utf-8")
        part.replace(self.folder / FIGURES)


def _call(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise MmtrainError(
            f"{folder}: `{shlex.join(command)}` ended with {done.returncode}; see above, then start "
            "this command again: runs with figures are kept"
        )


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Every run that was asked for, all settings of a seed before the next seed."""
    data = [
        f"data.tokenizer={options.data}/tokenizer",
        f"data.sources.captions.path={options.data}/captions",
        f"data.heldout.captions.path={options.data}/heldout/captions",
    ]
    out = []
    for seed in options.seeds:
        for variant in (VARIANTS[key] for key in options.only):
            name = f"{variant.key}_{seed}"
            own = [f"output={options.out}", f"name={name}", f"seed={seed}"]
            every = (*variant.overrides, *data, *own, *options.overrides)
            counts = (options.documents, options.pictures)
            out.append(Run(variant, seed, Path(options.out) / name, every, *counts))
    return out


def run(options: argparse.Namespace) -> None:
    """Do what is not done yet, `--jobs` at a time, and print the table."""
    # looked at before the first run starts: an old result of other settings stops nothing half-way
    waiting = [one for one in runs_of(options) if not one.is_done()]
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, _ in enumerate(pool.map(Run.do, waiting), 1):
            print(f"{number} of {len(waiting)} runs done", flush=True)
    truth = Path(options.out) / TRUTH
    if not truth.is_file():
        from ablation_measures import truth as measure_truth  # torch, which no other command needs

        first = next(iter(runs_of(options))).folder
        truth.write_text(json.dumps(measure_truth(first, pictures=options.pictures)))
    print(table(Path(options.out)))


def measure(options: argparse.Namespace) -> None:
    """Write the figures of one run; `Run.do` starts this."""
    from ablation_measures import measure as measure_run

    found = measure_run(options.run, documents=options.documents, pictures=options.pictures)
    (options.run / f"{FIGURES}.partial").write_text(json.dumps(found), encoding="utf-8")


# --- the table -----------------------------------------------------------------------------


def read_figures(folder: Path) -> Figures:
    """What `Run.do` wrote."""
    found: Figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    return found


def collect(out: Path) -> dict[str, dict[int, Figures]]:
    """Figures by setting and seed.

    Raises:
        MissingError: there are none.
        ContentError: runs were measured on different documents.
    """
    found: dict[str, dict[int, Figures]] = {}
    for key in VARIANTS:
        for path in sorted(out.glob(f"{key}_*/{FIGURES}")):
            seed = path.parent.name.removeprefix(f"{key}_")
            if seed.isdecimal():
                found.setdefault(key, {})[int(seed)] = read_figures(path.parent)["figures"]
    if not found:
        raise MissingError(
            f"{out}: no run has figures ({FIGURES}); make some by "
            f"`python tools/ablate_transfusion.py run {out}`"
        )
    seen = {figures["documents"] for seeds in found.values() for figures in seeds.values()}
    if len(seen) > 1:
        raise ContentError(
            f"{out}: its runs were measured on {len(seen)} different sets of documents, which no "
            "table can compare; run the campaign again in another folder, on one set of data"
        )
    return found


def table(out: Path) -> str:
    """Settings, then comparisons, as Markdown; the same into `out`/table.md."""
    found = collect(out)
    truth = json.loads((out / TRUTH).read_text()) if (out / TRUTH).is_file() else None
    text = f"{settings_table(found, truth)}\n{comparison_table(found)}"
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def settings_table(
    found: Mapping[str, Mapping[int, Figures]], truth: Mapping[str, float] | None = None
) -> str:
    """One row a setting: mean (least to greatest) over seeds, beside the paper's figures."""
    rows = []
    for key, seeds in found.items():
        own = [metric.write([f[metric.key] for f in seeds.values()]) for metric in METRICS]
        variant = VARIANTS[key]
        numbers = next(iter(seeds.values()))["parameters"]
        told = [variant.told, f"{numbers / 1e6:.2f}M", str(len(seeds))]
        rows.append([*told, *own, f"{variant.fid}", f"{variant.cider}"])
    if truth is not None:
        own = [m.write([truth[m.key]]) if m.key in truth else "" for m in METRICS]
        rows.append(["true pictures", "", "", *own, "", ""])
    head = ["", "parameters", "seeds", *(metric.told for metric in METRICS)]
    return _markdown([*head, "paper FID", "paper CIDEr"], rows)


def comparison_table(found: Mapping[str, Mapping[int, Figures]]) -> str:
    """One row a comparison: both figures, and in how many seeds the sign is the paper's."""
    rows = []
    for one in COMPARISONS:
        if one.first not in found or one.second not in found:
            continue
        before, after = (
            getattr(VARIANTS[key], one.paper) for key in (one.first, one.second)
        )
        better = after < before if one.paper == "fid" else after > before
        row = [one.told, f"{one.paper.upper()} {before} to {after}"]
        for key in one.ours:
            row.append(_compared(_BY_KEY[key], found[one.first], found[one.second], better))
        rows.append(row)
    return _markdown(["", "paper", "ours", "ours"], rows)


def _compared(
    metric: Metric, first: Mapping[int, Figures], second: Mapping[int, Figures], better: bool
) -> str:
    both = sorted(first.keys() & second.keys())
    if not both:
        return ""
    pairs = [(first[seed][metric.key], second[seed][metric.key]) for seed in both]
    same = sum((after < before if metric.less_is_better else after > before) == better
               for before, after in pairs)
    means = [statistics.mean(side) for side in zip(*pairs, strict=True)]
    told = " to ".join(f"{mean:.{metric.digits}f}" for mean in means)
    return f"{metric.told} {told}; the paper's sign in {same} of {len(both)}"


# --- commands ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    own = commands.add_parser("run", help="train and measure what is not done yet")
    own.add_argument("out", help="folder of the campaign")
    own.add_argument("overrides", nargs="*", help="of every run, behind --")
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="KEY")
    own.add_argument("--jobs", type=int, default=1, help="runs at a time")
    own.add_argument("--data", default="demo_data", help="of `mmtrain data shapes`")
    own.add_argument("--documents", type=int, default=256, help="held-out captions measured")
    own.add_argument("--pictures", type=int, default=64, help="drawn for each run")
    own.set_defaults(command=run)
    one = commands.add_parser("measure", help="the figures of one run")
    one.add_argument("run", type=Path)
    one.add_argument("documents", type=int)
    one.add_argument("pictures", type=int)
    one.set_defaults(command=measure)
    last = commands.add_parser("table", help="print the table of the runs that are done")
    last.add_argument("out", type=Path)
    last.set_defaults(command=lambda options: print(table(options.out)))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error is one line."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except RecipeError as error:
        print(*(f"mmtrain: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return int(error.exit_code)
    except MmtrainError as error:
        print(f"mmtrain: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
