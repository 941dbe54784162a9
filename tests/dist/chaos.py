#!/usr/bin/env python
"""Kill ranks at random moments until a run is through, and look at what is left.

    make chaos                                   200 kills over three layouts
    python tests/dist/chaos.py --kills 20 --layout pp2 --seed 3

Each round trains the tiny recipe, saving every second step, on ranks forked from this process. At a
random moment a random rank gets SIGKILL; the others must end by themselves, unless not all had met
yet: then they wait for the dead one and are ended, as a launcher would. The same command starts
again until the last step is there. Then the stitched loss curve must equal that of a run that was
left alone, to the last bit. After every kill: the newest committed checkpoint is sound and no older
than before, and no process is left. Any other outcome ends with exit code 1.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge import become_rank, free_port

from mmtrain.checkpoint import store
from mmtrain.data.shapes import write_shapes

TINY = Path(__file__).parents[2] / "configs/emu/tiny.yaml"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ("data.workers=1",)),
    "pp2": (2, ("parallel.pipeline=2",)),
    "tp2-dp2": (4, ("parallel.tensor=2",)),
}
WEIGHTS = {
    "one": 5,
    "pp2": 3,
    "tp2-dp2": 2,
}  # shares of the kills: a start of four ranks takes long
RUN = (
    "train.steps=24",
    "save.every_steps=2",
    "save.keep=2",
    "schedule.warmup_steps=2",
    "validate.every_steps=0",
    "log.images_every_steps=0",
    "log.modules_every_steps=0",
)
MEASURED = (
    "tokens_per_second", "images_per_second", "step_seconds", "data_seconds", "mfu", "peak_tflops",
)  # fmt: skip
PEER_SECONDS = 15.0  # ranks that outlive a killed one by more are a fault, once they have met


@dataclass
class Tally:
    """What the kills of one layout did."""

    kills: int = 0
    inside: int = 0  # of them while a save was being written
    rounds: int = 0
    starts: int = 0
    unmet: int = 0  # a rank died before all had met, and the others were ended as by a launcher
    repeated: int = 0  # steps made again
    faults: list[str] = field(default_factory=list)
    left_seconds: list[float] = field(default_factory=list)  # until the other ranks ended


class World:
    """The ranks of one start, in a process group of their own."""

    def __init__(self, folder: Path, ranks: int, argv: Sequence[str]) -> None:
        """Fork them."""
        request = {
            "folder": str(folder),
            "world": ranks,
            "argv": list(argv),
            "env": {"OMP_NUM_THREADS": "1"},
            "log": str(folder / "rank"),
        }
        port = free_port()
        self.running: dict[int, int] = {}  # process -> rank
        self.group = 0
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                os.setpgid(0, self.group)
                become_rank(rank, request, port)
            self.group = self.group or child
            os.setpgid(child, self.group)
            self.running[child] = rank
        self.codes: dict[int, int] = {}

    def wait(self, seconds: float) -> bool:
        """Collect ranks that end within a time; whether all have."""
        until = time.monotonic() + seconds
        while self.running:
            for process in list(self.running):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.codes[self.running.pop(process)] = os.waitstatus_to_exitcode(status)
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
        return not self.running

    def kill(self, process: int) -> None:
        """SIGKILL for one rank."""
        os.kill(process, signal.SIGKILL)

    def orphans(self) -> list[int]:
        """Processes of the group that are still there 8 seconds after its ranks."""
        until = time.monotonic() + 8  # a data worker looks for its parent every 5
        while (found := _members(self.group)) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def end(self) -> None:
        """Kill what is left."""
        for process in [*self.running, *_members(self.group)]:
            os.kill(process, signal.SIGKILL)
        self.wait(10)


def _members(group: int) -> list[int]:
    """Live processes of a process group."""
    out = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            out.append(int(path.parent.name))
    return out


def curve(run: Path) -> list[dict[str, Any]]:
    """Every line of `metrics.jsonl` without what a clock measured."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def newest(run: Path) -> int:
    """Step of the newest committed checkpoint; 0 without one."""
    found = store.committed(run / "checkpoints")
    return store.step_of(found[-1]) if found else 0


class Campaign:
    """Kills on one layout."""

    def __init__(self, folder: Path, layout: str, chance: random.Random) -> None:
        """Train once without a kill, for comparison and to know how long it takes."""
        self.folder, self.layout, self.chance = folder, layout, chance
        self.ranks, self.overrides = LAYOUTS[layout]
        self.tally = Tally()
        began = time.monotonic()
        world = self._start(f"{layout}-whole")
        if not world.wait(600) or any(world.codes.values()):
            world.end()
            raise SystemExit(
                f"{layout}: the run without kills ended with {world.codes}\n{self._log()}"
            )
        self.seconds = time.monotonic() - began
        self.whole = curve(folder / "runs" / f"{layout}-whole")

    def _log(self) -> str:
        return "\n".join(
            (self.folder / f"rank.{rank}").read_text()[-2000:] for rank in range(self.ranks)
        )

    def _start(self, name: str) -> World:
        # who kills on purpose is not stuck after three times
        (self.folder / "runs" / name / "attempts.jsonl").unlink(missing_ok=True)
        argv = ("train", str(TINY), f"name={name}", *RUN, *self.overrides)
        return World(self.folder, self.ranks, argv)

    def round(self, kills: int) -> None:
        """One run from its first to its last step, with at most `kills` kills."""
        name = f"{self.layout}-{self.tally.rounds}"
        run = self.folder / "runs" / name
        self.tally.rounds += 1
        for _ in range(kills):
            if self._ends_before_its_kill(name, run):
                break
        else:
            world = self._start(name)
            if not world.wait(600) or any(world.codes.values()):
                self._fault(f"{name}: left alone, it ended with {world.codes}\n{self._log()}")
                world.end()
        if not self.tally.faults and (difference := self._difference(curve(run))):
            self._fault(f"{name}: not the curve of the run without kills: {difference}")
        shutil.rmtree(run, ignore_errors=True)

    def _difference(self, found: list[dict[str, Any]]) -> str:
        """Where a curve first leaves that of the run without kills; empty when it does not."""
        for line, wanted in zip(found, self.whole, strict=False):
            for key in line.keys() | wanted.keys():
                if line.get(key) != wanted.get(key):
                    step = wanted["step"]
                    return f"step {step}: {key} is {line.get(key)}, not {wanted.get(key)}"
        return "" if len(found) == len(self.whole) else f"it has {len(found)} lines"

    def _ends_before_its_kill(self, name: str, run: Path) -> bool:
        tally, before = self.tally, newest(run)
        tally.starts += 1
        world = self._start(name)
        if world.wait(self.chance.uniform(0.02, 1.1) * self.seconds):
            if any(world.codes.values()):
                self._fault(f"{name}: nobody killed it, it ended with {world.codes}\n{self._log()}")
            return True
        victim = self.chance.choice(sorted(world.running))
        lines = run / "metrics.jsonl"
        made = len(lines.read_text().splitlines()) if lines.exists() else 0
        world.kill(victim)
        tally.kills += 1
        killed = time.monotonic()
        if world.wait(PEER_SECONDS):
            tally.left_seconds.append(time.monotonic() - killed)
        elif " begins " in (self.folder / "rank.0").read_text():
            self._fault(f"{name}: ranks {sorted(world.running.values())} outlive the killed one")
        else:
            tally.unmet += 1
            world.end()
        if left := world.orphans():
            self._fault(f"{name}: processes {left} are left")
        world.end()
        tally.inside += any((run / "checkpoints").glob("*.partial"))
        after = newest(run)
        tally.repeated += max(0, made - after)
        if after < before:
            self._fault(f"{name}: step {before} was committed, now the newest is {after}")
        if after:
            folder = store.folder_of(run / "checkpoints", after)
            for fault in store.faults(folder):
                self._fault(f"{name}: {fault}")
        return False

    def _fault(self, text: str) -> None:
        self.tally.faults.append(text)
        print(f"FAULT {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run the campaigns and print one line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="over all layouts")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="all if left out")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    import mmtrain.run  # noqa: F401 the heavy import, once

    torch.set_num_threads(1)  # ranks share the cores

    layouts = options.layout or list(LAYOUTS)
    faults = 0
    print(
        f"{'layout':10}{'kills':>6}{'in a save':>10}{'runs':>5}{'starts':>7}{'lost':>5}"
        f"{'orphans':>8}{'unmet':>6}{'repeated':>9}{'peers end':>20}{'seconds':>8}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shapes(folder / "demo_data", 400, 0)
        weight = sum(WEIGHTS[layout] for layout in layouts)
        for layout in layouts:
            began = time.monotonic()
            campaign = Campaign(folder, layout, random.Random(f"{options.seed} {layout}"))
            tally = campaign.tally
            share = -(-options.kills * WEIGHTS[layout] // weight)
            while tally.kills < share and not tally.faults:
                campaign.round(share - tally.kills)
            seconds = sorted(tally.left_seconds or [0.0])
            lost = sum("newest is" in fault for fault in tally.faults)
            orphans = sum("are left" in fault for fault in tally.faults)
            print(f"{layout:10}{tally.kills:6}{tally.inside:10}{tally.rounds:5}{tally.starts:7}"
                  f"{lost:5}{orphans:8}{tally.unmet:6}{tally.repeated:9}"
                  f"{statistics.median(seconds):9.2f} s {seconds[-1]:6.2f} s"
                  f"{time.monotonic() - began:8.0f}", flush=True)  # fmt: skip
            faults += len(tally.faults)
    print(f"{faults} faults" if faults else "every curve equals that of its run without kills")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
