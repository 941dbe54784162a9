"""One Slurm for all tests of this folder, and a way to watch jobs of the tiny recipe."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, lacking, until

from mmtrain.data.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/emu/tiny.yaml")
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
START_SECONDS = 600.0  # imports of two ranks on a busy machine, and Slurm's own waits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs a Slurm."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes on this host."""
    if missing := lacking():
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tear down, whoever ends the tests
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as cluster:
        yield cluster


@dataclass
class Desk:
    """Where jobs are submitted from: a folder with `demo_data` and no checkout of mmtrain."""

    cluster: Cluster
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What jobs inherit."""
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        return {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}

    def submit(self, name: str, *arguments: str) -> "Job":
        """`mmtrain slurm` of the tiny recipe on two nodes with a rank each."""
        said = self.cluster.run(
            *(sys.executable, "-m", "mmtrain", "slurm", TINY, f"name={name}"),
            *("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=1:00:00", *arguments),
            folder=self.folder,
            **self.environment,
        )
        [number] = re.findall(r"Submitted batch job (\d+)", said)
        return Job(self, number, name)


@dataclass
class Job:
    """A job and its run folder."""

    desk: Desk
    number: str
    name: str

    @property
    def run(self) -> Path:
        return self.desk.folder / "runs" / self.name

    @property
    def log(self) -> str:
        """The job's own log."""
        return (self.desk.folder / f"{self.name}-{self.number}.out").read_text()

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm says of it."""
        return self.desk.cluster.job(self.number)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` so far, a torn last one left out."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics]

    def reach(self, step: int) -> float:
        """Wait until a step is done; returns when (time)."""
        looked = time.monotonic()

        def done() -> bool:
            nonlocal looked
            if time.monotonic() - looked > 2:
                looked = time.monotonic()
                assert self.facts["JobState"] in ALIVE, self.story
            return len(self.metrics) >= step

        self._wait(f"step {step}", done, every=0.05)
        return time.time()

    def wait(self, *states: str) -> dict[str, str]:
        """Wait until it is in one of these states; returns Slurm's facts."""
        self._wait(f"job {self.number} {states}", lambda: self.facts["JobState"] in states)
        return self.facts

    def signal(self, *arguments: str) -> float:
        """`scancel` it with options; returns when (time)."""
        self.desk.cluster.run("scancel", *arguments, self.number)
        return time.time()

    @property
    def story(self) -> str:
        """What happened, for the one who reads a failed test."""
        logs = sorted(self.run.glob("slurm/*.log"))
        parts = [str(self.facts), self.log, *(f"{log}\n{log.read_text()[-3000:]}" for log in logs)]
        return "\n".join(parts)

    def _wait(self, what: str, ask: Callable[[], bool], every: float = 0.5) -> None:
        try:
            until(what, ask, START_SECONDS, every)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.story}") from None


@pytest.fixture(scope="session")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A folder to submit from."""
    folder = tmp_path_factory.mktemp("desk")
    write_shapes(folder / "demo_data", 400, 0)
    return Desk(cluster, folder)


@pytest.fixture(autouse=True)
def idle(cluster: Cluster) -> Iterator[None]:
    """No test leaves a job to the next one."""
    yield
    jobs = cluster.run("squeue", "--noheader", "--format=%A").split()
    if jobs:
        subprocess.run(["scancel", "--signal=KILL", *jobs], env=cluster.environment, check=False)
        cluster.run("scancel", *jobs)
    until("an empty queue", lambda: not cluster.run("squeue", "--noheader"), 300)
