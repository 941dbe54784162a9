"""`mmtrain slurm`: a recipe as a batch script that holds all it needs, and its submission.

The script is the text of `slurm/train.sbatch` (package data), with the job's own options, recipe
and environment written into it, so it needs no checkout where it runs. The recipe is checked here
for the ranks that the job will have: a fault is told at once instead of after a night in the queue.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mmtrain import __version__
from mmtrain.errors import ExitCode, MissingError, MmtrainError, Problem, RecipeError
from mmtrain.recipe import examine

_ENVIRONMENT = "environment=$(<slurm/env.sh) || exit 66\n"
_SITE = Path("slurm/env.sh")  # of the folder that the job is submitted from; ours if there is none
_TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+(:\d+)?)?")
_SEEDS = re.compile(r"(\d+(-\d+(:\d+)?)?)(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_SEED = '"$SLURM_ARRAY_TASK_ID"'


class SubmissionError(MmtrainError):
    """Slurm does not take the job."""

    exit_code = ExitCode.PEER


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of Slurm; a rank is a task, and has a GPU where nodes have them.

    Attributes:
        gpus_per_node: 0 = CPU nodes.
        tasks_per_node: ranks of a node; as many as GPUs if None.
        time: in sbatch's words, as in `24:00:00`.
        container: an Apptainer image, or a `.sqsh` file for Pyxis.
        array: seeds in sbatch's words, as in `0-4`; one run each.
    """

    nodes: int
    gpus_per_node: int = 8
    tasks_per_node: int | None = None
    cpus_per_task: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    container: str | None = None
    array: str | None = None

    @property
    def tasks(self) -> int:
        """Ranks of one node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks


def script(job: Job, path: Path, overrides: Sequence[str]) -> str:
    """The batch script of a recipe.

    Raises:
        RecipeError: all faults of the recipe for these ranks and of the job at once.
    """
    seen = examine(path, overrides, job.ranks)
    found = [*seen.faults, *seen.missing, *_problems(job, overrides)]
    if found or seen.recipe is None:
        raise RecipeError(found)
    name, folder = seen.recipe.name, str(Path(seen.recipe.output) / seen.recipe.name)
    arguments = [shlex.quote(word) for word in (str(path), *overrides)]
    if job.array:
        arguments.append(f"seed={_SEED}")
        arguments.append(f"name={shlex.quote(name)}-seed-{_SEED}")
    head = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{option}" for option in _options(job, name)),
        "#",
        f"# written by mmtrain {__version__}",
        f"set -- {' '.join(arguments)}",
        f"MMTRAIN_RUN_FOLDER={shlex.quote(folder)}{f'-seed-{_SEED}' if job.array else ''}",
        *_surroundings(job),
    ]
    site = _SITE.read_text() if _SITE.is_file() else _text("env.sh")
    embedded = f"IFS= read -r -d '' environment <<'ENVIRONMENT' || true\n{site}ENVIRONMENT\n"
    lines = _text("train.sbatch").splitlines(keepends=True)
    body = "".join(line for line in lines[1:] if not line.startswith("#SBATCH"))
    assert _ENVIRONMENT in body, "train.sbatch reads its environment in another way"
    return "\n".join(head) + "\n" + body.replace(_ENVIRONMENT, embedded)


def submit(text: str) -> str:
    """Hand a script to sbatch; returns what it says.

    Raises:
        MissingError: there is no sbatch.
        SubmissionError: Slurm refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise MissingError(
            "there is no sbatch on this machine; run this on a login node of the cluster, "
            "or write the script with --print and submit it there"
        )
    done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SubmissionError(f"nothing was submitted: {done.stderr.strip()}")
    return done.stdout.strip()


def _options(job: Job, name: str) -> list[str]:
    asked = {
        "job-name": name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "array": job.array,
        "output": "%x-%A_%a.out" if job.array else "%x-%j.out",
    }
    own = [line.removeprefix("#SBATCH --") for line in _text("train.sbatch").splitlines()]
    kept = [o for o in own if o.startswith(("signal=", "requeue", "open-mode="))]
    return [f"{key}={value}" for key, value in asked.items() if value is not None] + kept


def _surroundings(job: Job) -> list[str]:
    """Where the ranks find mmtrain: in a container, or in this environment."""
    if job.container is None:
        return [f'export MMTRAIN_VENV="${{MMTRAIN_VENV:-{sys.prefix}}}"']
    if job.container.endswith(".sqsh"):
        here = "--container-mounts=$SLURM_SUBMIT_DIR --container-workdir=$SLURM_SUBMIT_DIR"
        return [f'export MMTRAIN_SRUN="--container-image={job.container} {here}"']
    gpus = "--nv " if job.gpus_per_node else ""
    return [f'export MMTRAIN_WRAPPER="apptainer exec {gpus}{job.container}"']


def _problems(job: Job, overrides: Sequence[str]) -> list[Problem]:
    found = []
    if job.gpus_per_node and job.tasks != job.gpus_per_node:
        text = f"{job.tasks} with --gpus-per-node {job.gpus_per_node}; a rank has one GPU: leave "
        found.append(Problem("--tasks-per-node", text + "it out, or say --gpus-per-node 0"))
    if not _TIME.fullmatch(job.time):
        text = f"found {job.time!r}; wanted: minutes, hours:minutes:seconds or days-hours"
        found.append(Problem("--time", text))
    if job.container and re.search(r"[\s\"$`\\]", job.container):
        text = f"found {job.container!r}; wanted: an image's name without spaces, quotes and $"
        found.append(Problem("--container", text))
    if job.array is None:
        return found
    if not _SEEDS.fullmatch(job.array):
        text = f"found {job.array!r}; wanted: seeds as in 0-4, 1,3,5 or 0-9%2 (two at a time)"
        found.append(Problem("--array", text))
    found += [
        Problem(f"override {word!r}", "--array sets the seed of each run; leave one of them out")
        for word in overrides
        if word.startswith("seed=")
    ]
    return found


def _text(name: str) -> str:
    return files("mmtrain.slurm").joinpath(name).read_text(encoding="utf-8")
