"""The paper's ablations of Transfusion (arXiv:2408.11039, tables 5, 6 and 8) at small scale.

    python tools/ablate_transfusion.py run runs/ablation --seeds 0 1 2    # an hour; may be stopped
    python tools/ablate_transfusion.py table runs/ablation                # of what is there

The world is made first (`ablation_world`). Each setting is `mmtrain train
configs/transfusion/ablation.yaml` with overrides, for every seed; then its figures
(`ablation_measures`) are written beside the run. A run that has its figures is not done again, one
that was stopped is. All runs see the same documents in the same order, equally many an optimizer
step and equally many steps: an image counts once whatever its patch. (The paper fixes trunk rows
instead, so its larger patches saw more images.) `--overrides` hold for every run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from ablation_table import FIGURES, TRUTH, VARIANTS, Variant, read_figures, table
from ablation_world import write_world

from mmtrain.errors import ContentError, MmtrainError, RecipeError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs/transfusion/ablation.yaml"
WORLD = "world"  # in the campaign's folder
_DOCUMENTS, _HELDOUT = 4000, 640  # of the world

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
            f"{folder}: `{shlex.join(command)}` ended with {done.returncode}; see above, then "
            "start this command again: runs with figures are kept"
        )


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Every run that was asked for, all settings of a seed before the next seed."""
    world = f"{options.out}/{WORLD}"
    data = [
        f"data.tokenizer={world}/tokenizer",
        f"data.sources.captions.path={world}/captions",
        f"data.heldout.captions.path={world}/heldout/captions",
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
    write_world(Path(options.out) / WORLD, _DOCUMENTS, _HELDOUT)
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


# --- commands ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    own = commands.add_parser("run", help="train and measure what is not done yet")
    own.add_argument("out", help="folder of the campaign")
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="KEY")
    own.add_argument("--jobs", type=int, default=1, help="runs at a time")
    own.add_argument("--documents", type=int, default=192, help="held-out captions measured")
    own.add_argument("--pictures", type=int, default=48, help="drawn for each run")
    own.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of every run")
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
