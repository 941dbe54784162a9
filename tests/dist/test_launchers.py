"""The same recipe under every launcher a user has; the losses are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forge import free_port
from world import TINY, World

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "one-process": [sys.executable, "-m", "mmtrain"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m", "mmtrain"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--module", "mmtrain"],
    "srun": [sys.executable, "-m", "mmtrain"],  # what each task of srun starts
}


def environment(launcher: str, port: int) -> dict[str, str]:
    """What a launcher's ranks see; the rank variables of this process are not theirs."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(port)}
    if launcher == "srun":
        env |= {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        env |= {"SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.0.1"}
    return env


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_trains_the_recipe_alike(world: World, launcher: str) -> None:
    reference = world.folder / "runs" / "launcher-reference"
    if not reference.exists():
        world.train("launcher-reference", 1, "train.steps=2", "schedule.warmup_steps=1")
    command = list(LAUNCHERS[launcher])
    port = free_port()
    if launcher in ("torchrun", "deepspeed"):
        command[1:1] = [f"--master_port={port}"]
    overrides = [f"name={launcher}", "train.steps=2", "schedule.warmup_steps=1"]
    if launcher in ("torchrun", "deepspeed"):
        overrides.append("parallel.tensor=2")
    done = subprocess.run(
        [*command, "train", str(TINY), *overrides],
        cwd=world.folder,
        env=environment(launcher, port),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = (world.folder / "runs" / launcher / "metrics.jsonl").read_text().splitlines()
    expected = world.metrics("launcher-reference")
    for line, wanted in zip(map(json.loads, lines), expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def test_a_faulty_recipe_ends_every_rank_with_2_and_is_said_once(world: World) -> None:
    codes = world.run(2, "train", str(TINY), "name=never", "train.stepz=3", "parallel.tensor=3")
    assert codes == [2, 2]
    assert world.last_log.count("did you mean train.steps?") == 1
    assert "parallel.tensor" in world.last_log
    assert not (world.folder / "runs" / "never").exists()
