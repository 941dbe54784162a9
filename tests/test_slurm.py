"""The batch script and `mmtrain slurm`: exit codes, logs and requeues (Slurm is played here).

`tests/slurm` runs the same script under a real Slurm.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mmtrain import __version__
from mmtrain.cli import main
from mmtrain.errors import ExitCode

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("slurm/train.sbatch", "slurm/env.sh", ".ci/run", ".ci/setup")
TINY = str(ROOT / "configs/emu/tiny.yaml")

SCONTROL = """\
case "$1 $2" in
    "show hostnames") echo n1; echo n2 ;;
    "show node") echo "NodeName=$3 CPUTot=8 NodeAddr=10.0.0.7 NodeHostName=$3 Port=6818" ;;
    *) echo "$@" >>"$CALLS"; exit "${REFUSED:-0}" ;;
esac"""
# srun without its own options
TASK = 'while [ "$1" != bash ]; do shift; done; "$@"'


@dataclass
class Ended:
    """A job that has ended: its exit code, its own log, what scontrol was asked."""

    code: int
    output: str
    calls: str


@dataclass
class Stage:
    """A Slurm of scripts in `folder`; `check` and `train` are what srun does for each command."""

    folder: Path
    script: Path = ROOT / "slurm/train.sbatch"
    check: str = 'echo "  family emu"; echo "  run folder: $RUN"'
    train: str = "true"
    squeue: str = "echo RUNNING"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "my run"

    @property
    def logs(self) -> dict[str, str]:
        """Text of the attempts' logs."""
        return {path.name: path.read_text() for path in (self.run / "slurm").iterdir()}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the batch script."""
        commands, venv = self.folder / "bin", self.folder / "venv/bin"
        commands.mkdir(exist_ok=True)
        venv.mkdir(parents=True, exist_ok=True)
        (venv / "python").unlink(missing_ok=True)
        (venv / "python").symlink_to(sys.executable)
        (self.folder / "calls").write_text("")
        srun = f'case "$*" in *"mmtrain check"*) {self.check}; exit;; esac\n{self.train}'
        played = {"srun": srun, "scontrol": SCONTROL, "squeue": self.squeue, "sleep": ""}
        for name, body in played.items():
            (commands / name).write_text(f"#!/bin/bash\n{body}\n")
            (commands / name).chmod(0o755)
        slurm = {
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NAME": "mine",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": "4",
            "MMTRAIN_VENV": str(self.folder / "venv"),
            "RUN": str(self.run),
            "CALLS": str(self.folder / "calls"),
            "PATH": f"{commands}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            ["bash", str(self.script), *arguments],
            env={**slurm, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # as Slurm starts it; a shell cannot trap what was ignored when it began, as SIGINT is
            # in the background of a script
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )

    def end(self, job: subprocess.Popen[str]) -> Ended:
        """Wait for it."""
        output, _ = job.communicate(timeout=60)
        return Ended(job.returncode, output, (self.folder / "calls").read_text())

    def play(self, *arguments: str) -> Ended:
        """Run the batch script."""
        return self.end(self.start(*arguments))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def failing(code: int) -> str:
    """What srun does when one rank ends with `code` and it kills the others."""
    return (
        f'echo "1: srun: error: x: task 9: Exited with exit code 5" >&2;'  # a task's own words
        f'echo "srun: error: n1: task 1: Exited with exit code {code}" >&2;'
        'echo "srun: error: n2: tasks 2-3: Terminated" >&2; exit 143'
    )


def judged(code: int) -> str:
    """What a run leaves behind when its first failing rank could still say why."""
    verdict = f'{{\\n "exit_code": {code},\\n "rank": 3,\\n "host": "n2",\\n "reason": "a, b"\\n}}'
    return f"printf '{verdict}\\n' >\"$RUN/verdict.json\""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script: str) -> None:
    subprocess.run(["shellcheck", "--shell=bash", str(ROOT / script)], check=True)


def test_a_job_that_ends_well_gets_0_and_its_ranks_the_recipe(stage: Stage) -> None:
    stage.train = 'echo "$MASTER_ADDR $MASTER_PORT"; printf "<%s>" "$@"'
    ended = stage.play("my.yaml", "data.sources={a b}")
    assert (ended.code, ended.calls) == (0, "")
    [log] = stage.logs.values()
    assert "10.0.0.7 20007" in log  # the address that Slurm knows, whatever names resolve
    assert "<--kill-on-bad-exit=1><--wait=60>" in log
    assert log.endswith("<mmtrain><train><my.yaml><data.sources={a b}>")


def test_the_recipe_is_checked_for_all_ranks_before_they_start(stage: Stage) -> None:
    stage.check = 'printf "<%s>" "$@"; exit 2'
    ended = stage.play("my.yaml", "a=b")
    assert (ended.code, ended.calls) == (2, "")
    assert "ended with exit code 2" in ended.output and not stage.run.exists()
    stage.check = 'printf "<%s>" "$@" >&2; exit 2'
    assert "<mmtrain><check><my.yaml><--world><4><a=b>" in stage.play("my.yaml", "a=b").output


@pytest.mark.parametrize("code", [74, 75, 85, 86, 88])
def test_faults_of_the_machine_are_tried_again(stage: Stage, code: int) -> None:
    stage.train = failing(code)
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (code, "requeue 20007\n")


@pytest.mark.parametrize("code", [1, 2, 65, 66, 70, 87, 93])
def test_faults_that_would_come_back_end_the_job(stage: Stage, code: int) -> None:
    stage.train = failing(code)
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (code, "")
    assert f"attempt 1 ended with exit code {code}" in ended.output


def test_a_job_is_not_tried_for_ever(stage: Stage) -> None:
    stage.train = failing(88)
    stage.environment = {"SLURM_RESTART_COUNT": "2", "MMTRAIN_ATTEMPTS": "3"}
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (88, "")
    assert "the last of MMTRAIN_ATTEMPTS" in ended.output


def test_each_attempt_has_its_own_log_and_the_job_a_short_one(stage: Stage) -> None:
    stage.train = 'echo "words of restart ${SLURM_RESTART_COUNT:-0}"'
    outputs = [stage.play("my.yaml").output]
    stage.environment = {"SLURM_RESTART_COUNT": "1"}
    outputs.append(stage.play("my.yaml").output)
    assert stage.logs == {
        "mine-20007-attempt-1.log": "words of restart 0\n",
        "mine-20007-attempt-2.log": "words of restart 1\n",
    }
    for number, output in enumerate(outputs, 1):
        assert f"my run/slurm/mine-20007-attempt-{number}.log" in output
        assert "words" not in output and len(output.splitlines()) == 2


def test_the_verdict_speaks_where_srun_is_silent(stage: Stage) -> None:
    stage.train = f"{judged(86)}; exit 143"
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (86, "requeue 20007\n")
    assert 'rank: 3\n  host: "n2"\n  reason: "a, b"\n' in ended.output


def test_the_verdict_of_an_earlier_attempt_is_not_this_ones(stage: Stage) -> None:
    stage.run.mkdir()
    (stage.run / "verdict.json").write_text('{\n "exit_code": 86,\n "reason": "old"\n}\n')
    stage.train = "echo last words; exit 137"
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (137, "")
    assert "old" not in ended.output and "last words" in ended.output


def test_a_lost_node_is_worth_another_attempt(stage: Stage) -> None:
    stage.train = 'echo "srun: error: Node failure on n2" >&2; exit 137'
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (75, "requeue 20007\n")


def test_a_cancelled_job_is_not_brought_back(stage: Stage) -> None:
    stage.train, stage.squeue = failing(85), "echo COMPLETING"
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (85, "")
    assert "the job is COMPLETING, not requeued" in ended.output


def test_a_task_of_an_array_is_requeued_alone(stage: Stage) -> None:
    stage.train = failing(85)
    stage.environment = {"SLURM_ARRAY_JOB_ID": "20007", "SLURM_ARRAY_TASK_ID": "4"}
    assert stage.play("my.yaml").calls == "requeue 20007_4\n"
    assert list(stage.logs) == ["mine-20007_4-attempt-1.log"]


def test_a_busy_controller_is_asked_again(stage: Stage) -> None:
    stage.train = failing(85)
    stage.squeue = '[ -e "$CALLS.2" ] && echo RUNNING || { touch "$CALLS.2"; exit 1; }'
    assert stage.play("my.yaml").calls == "requeue 20007\n"
    stage.squeue = "exit 1"
    ended = stage.play("my.yaml")
    assert ended.calls == "" and "unknown to Slurm" in ended.output


def test_a_refused_requeue_is_asked_for_again_and_then_told(stage: Stage) -> None:
    stage.train = failing(85)
    stage.environment = {"REFUSED": "1"}
    ended = stage.play("my.yaml")
    assert ended.code == 85 and ended.calls == "requeue 20007\n" * 2
    assert "submit it again to go on" in ended.output


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_signal_to_the_batch_shell_reaches_the_ranks(stage: Stage, name: str) -> None:
    stage.train = (
        'trap "echo srun: error: n1: tasks 0-3: Exited with exit code 85; exit 85" USR1\n'
        'touch "$RUN/started"; while :; do /bin/sleep 0.05; done'
    )
    job = stage.start("my.yaml")
    end = time.monotonic() + 30
    while not (stage.run / "started").exists() and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(getattr(signal, f"SIG{name}"))
    ended = stage.end(job)
    assert (ended.code, ended.calls) == (85, "requeue 20007\n")


def test_ranks_killed_because_of_a_signal_to_the_batch_shell_are_tried_again(stage: Stage) -> None:
    stage.train = "kill -s TERM $PPID; /bin/sleep 0.5; exit 137"
    ended = stage.play("my.yaml")
    assert (ended.code, ended.calls) == (75, "requeue 20007\n")


def test_a_missing_environment_says_what_to_do(stage: Stage) -> None:
    stage.check = TASK
    stage.environment = {"MMTRAIN_VENV": str(stage.folder / "none")}
    ended = stage.play("my.yaml")
    assert ended.code == 66
    assert "run 'make setup' or set MMTRAIN_VENV" in ended.output


def test_a_container_needs_no_environment_of_the_host(stage: Stage) -> None:
    stage.check = TASK
    container = stage.folder / "container"
    container.write_text('#!/bin/bash\necho "$*" >>"$CALLS"; echo "run folder: $RUN"\n')
    container.chmod(0o755)
    stage.environment = {"MMTRAIN_VENV": "/none", "MMTRAIN_WRAPPER": str(container)}
    ended = stage.play("my.yaml")
    assert ended.code == 0, ended.output
    assert "python -m mmtrain check my.yaml --world 4" in ended.calls
    srun = {"MMTRAIN_SRUN": "--container-image=/images/m.sqsh --cpu-bind=none"}
    words = Stage(stage.folder, train='printf "<%s>" "$@"', environment=srun)
    assert words.play("my.yaml").code == 0
    [log] = words.logs.values()
    assert "<--container-image=/images/m.sqsh><--cpu-bind=none><bash>" in log


def test_a_job_without_a_recipe_says_how_it_is_called(stage: Stage) -> None:
    ended = stage.play()
    assert ended.code == 2 and "usage: sbatch" in ended.output


@pytest.fixture
def printed(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> "Printed":
    """`mmtrain slurm --print`, run from beside the tiny recipe's data."""
    monkeypatch.chdir(shapes.parent)
    monkeypatch.setattr(sys, "prefix", "/shared/venv")
    return Printed(capsys)


@dataclass
class Printed:
    """Exit code and words of `mmtrain slurm TINY`."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main(["slurm", TINY, *arguments])
        captured = self.capture.readouterr()
        return code, captured.out, captured.err


HEAD = f"""\
#!/usr/bin/env bash
#SBATCH --job-name=it's tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --qos=long
#SBATCH --array=0-4%2
#SBATCH --output=%x-%A_%a.out
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# written by mmtrain {__version__}
set -- {TINY} 'name=it'"'"'s tiny' data.workers=2 \
seed="$SLURM_ARRAY_TASK_ID" name='it'"'"'s tiny'-seed-"$SLURM_ARRAY_TASK_ID"
MMTRAIN_RUN_FOLDER='runs/it'"'"'s tiny'-seed-"$SLURM_ARRAY_TASK_ID"
export MMTRAIN_VENV="${{MMTRAIN_VENV:-/shared/venv}}"
"""


def test_the_printed_script_is_the_batch_script_with_the_jobs_own_head(printed: Printed) -> None:
    code, out, err = printed(
        *("name=it's tiny", "--nodes=2", "--gpus-per-node=4", "--time=12:00:00"),
        *("--partition=gpu", "--account=lab", "--qos=long", "--array=0-4%2"),
        *("--print", "data.workers=2"),
    )
    assert (code, err) == (0, "")
    assert out.startswith(HEAD)
    body = out.removeprefix(HEAD)
    own = (ROOT / "slurm/train.sbatch").read_text()
    lines = [line for line in own.splitlines()[1:] if not line.startswith("#SBATCH")]
    assert [line for line in lines if line not in body.splitlines()] == [
        "environment=$(<slurm/env.sh) || exit 66"
    ]
    assert (ROOT / "slurm/env.sh").read_text() in body
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_the_printed_script_gives_the_ranks_recipe_and_seed(printed: Printed, stage: Stage) -> None:
    _, out, _ = printed("--nodes=2", "--gpus-per-node=0", "--array=3,7", "--print", "save.keep=1")
    stage.script = stage.folder / "job.sbatch"
    stage.script.write_text(out)
    stage.check = "echo checked again >&2; exit 2"
    stage.train = 'printf "<%s>" "$@"'
    stage.environment = {"SLURM_ARRAY_JOB_ID": "20001", "SLURM_ARRAY_TASK_ID": "7"}
    stage.environment["SLURM_SUBMIT_DIR"] = str(stage.folder)  # where no checkout lies
    ended = stage.play()
    assert ended.code == 0, ended.output
    [path] = stage.folder.glob("runs/tiny-seed-7/slurm/*.log")
    log = path.read_text()
    assert "exec ${MMTRAIN_WRAPPER:-} python -m mmtrain" in log
    assert log.endswith(f"<train><{TINY}><save.keep=1><seed=7><name=tiny-seed-7>")


def test_a_sites_own_environment_is_the_one_that_is_written(printed: Printed) -> None:
    Path("slurm").mkdir()
    Path("slurm/env.sh").write_text("module load site's\n")
    try:
        _, out, _ = printed("--nodes=1", "--gpus-per-node=0", "--print")
    finally:
        shutil.rmtree("slurm")
    assert "\nmodule load site's\nENVIRONMENT\n" in out and "MMTRAIN_VENV:-$PWD" not in out


@pytest.mark.parametrize(
    "image, gpus, line",
    [
        ("m.sif", 8, 'export MMTRAIN_WRAPPER="apptainer exec --nv m.sif"'),
        ("docker://m:1", 0, 'export MMTRAIN_WRAPPER="apptainer exec docker://m:1"'),
        ("m.sqsh", 8, 'export MMTRAIN_SRUN="--container-image=m.sqsh --container-mounts='),
    ],
)
def test_a_container_is_started_by_what_it_is_made_for(
    printed: Printed, image: str, gpus: int, line: str
) -> None:
    _, out, _ = printed("--nodes=1", f"--gpus-per-node={gpus}", f"--container={image}", "--print")
    assert f"\n{line}" in out and "/shared/venv" not in out


def test_a_faulty_job_is_refused_with_all_its_faults(printed: Printed) -> None:
    code, out, err = printed(
        *("--nodes=4", "--gpus-per-node=1", "--time=soon", "--array=a-b", "--container=a b"),
        *("--tasks-per-node=2", "--print", "train.stepz=3", "seed=4"),
    )
    assert (code, out) == (ExitCode.RECIPE, "")
    assert "6 faults; nothing was written" in err
    for place in (
        "train.stepz",
        "--time",
        "--array",
        "--container",
        "--tasks-per-node",
        "'seed=4'",
    ):
        assert place in err
    code, out, err = printed("--nodes=3", "--gpus-per-node=1", "--print")
    assert (code, out) == (ExitCode.RECIPE, "")
    assert "3 data rank(s)" in err  # the layout, against the ranks that the job will have


def test_a_script_goes_to_sbatch_and_a_refusal_comes_back(
    printed: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = printed("--nodes=2", "--gpus-per-node=1")
    assert (code, out) == (ExitCode.MISSING, "") and "no sbatch" in err and "--print" in err

    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n/bin/cat >{tmp_path}/got; echo as job 5\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert printed("--nodes=2", "--gpus-per-node=1") == (0, "as job 5\n", "")
    assert printed("--nodes=2", "--gpus-per-node=1", "--print")[1] == (tmp_path / "got").read_text()

    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    code, out, err = printed("--nodes=2", "--gpus-per-node=1")
    assert (code, out) == (ExitCode.PEER, "") and "invalid partition" in err
