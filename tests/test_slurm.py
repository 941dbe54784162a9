"""The batch script: which exit code a job gets, and when it is requeued (srun is played here)."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("slurm/train.sbatch", "slurm/env.sh", ".ci/run", ".ci/setup")


def play(tmp_path: Path, srun: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run the batch script with an `srun` of ours; returns exit code, output, scontrol's calls."""
    bin_folder, venv = tmp_path / "bin", tmp_path / "venv/bin"
    bin_folder.mkdir()
    venv.mkdir(parents=True)
    (venv / "activate").write_text("")
    calls = tmp_path / "calls"
    calls.touch()
    scontrol = f'case $1 in show) echo n1; echo n2;; *) echo "$@" >> {calls};; esac'
    for name, body in (("srun", srun), ("scontrol", scontrol)):
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "20007",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "4",
        "MMTRAIN_VENV": str(tmp_path / "venv"),
        "MMTRAIN_WRAPPER": "true",  # stands for the check before the ranks start
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "slurm/train.sbatch"), *arguments],
        env={**slurm, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text()


def failing(code: int) -> str:
    """What srun does when one rank ends with `code` and it kills the others."""
    return (
        f'echo "1: srun: error: x: task 9: Exited with exit code 5" >&2;'  # a task's own words
        f'echo "srun: error: n1: task 1: Exited with exit code {code}" >&2;'
        'echo "srun: error: n2: tasks 2-3: Terminated" >&2; exit 143'
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_a_job_that_ends_well_gets_0_and_its_ranks_the_recipe(tmp_path: Path) -> None:
    srun = 'echo "$MASTER_ADDR $MASTER_PORT"; printf "<%s>" "$@"'
    code, output, calls = play(tmp_path, srun, "my.yaml", "data.sources={a b}")
    assert (code, calls) == (0, "")
    assert "n1 20007" in output
    assert "<--kill-on-bad-exit=1><--wait=60>" in output
    assert output.endswith("<mmtrain><train><my.yaml><data.sources={a b}>")


@pytest.mark.parametrize("code", [74, 85])
def test_faults_of_the_machine_are_tried_again(tmp_path: Path, code: int) -> None:
    got, _, calls = play(tmp_path, failing(code), "my.yaml")
    assert (got, calls) == (code, "requeue 20007\n")


@pytest.mark.parametrize("code", [2, 87, 93])
def test_faults_that_would_come_back_end_the_job(tmp_path: Path, code: int) -> None:
    got, _, calls = play(tmp_path, failing(code), "my.yaml")
    assert (got, calls) == (code, "")


def test_a_job_is_not_tried_for_ever(tmp_path: Path) -> None:
    code, _, calls = play(
        tmp_path, failing(88), "my.yaml", SLURM_RESTART_COUNT="2", MMTRAIN_ATTEMPTS="3"
    )
    assert (code, calls) == (88, "")


def test_a_faulty_recipe_ends_the_job_before_the_ranks_start(tmp_path: Path) -> None:
    code, output, _ = play(tmp_path, "echo started", "my.yaml", MMTRAIN_WRAPPER="false")
    assert code == 1 and "started" not in output


def test_a_missing_environment_says_what_to_do(tmp_path: Path) -> None:
    code, output, _ = play(tmp_path, "true", "my.yaml", MMTRAIN_VENV=str(tmp_path / "none"))
    assert code == 66
    assert "run 'make setup' or set MMTRAIN_VENV" in output


def test_a_job_without_a_recipe_says_how_it_is_called(tmp_path: Path) -> None:
    code, output, _ = play(tmp_path, "true")
    assert code == 2 and "usage: sbatch" in output
