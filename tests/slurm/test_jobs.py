"""Jobs of the tiny recipe under a real Slurm: two nodes, a rank on each.

Every test prints what it measured (`pytest -s`); the curves of interrupted runs equal that of an
uninterrupted one to the last bit.
"""

import sys
import time

import pytest
from cluster import NODES, until
from conftest import ROOT, TINY, Desk, Job

STEPS = 50
SHORT = (f"train.steps={STEPS}", "schedule.warmup_steps=1", "data.workers=1")


@pytest.fixture(scope="session")
def unbroken(desk: Desk) -> list[float]:
    """Losses of a job that nothing happens to."""
    job = desk.submit("unbroken", *SHORT)
    facts = job.wait("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.story
    assert "tasks" not in job.log
    assert len(job.losses) == STEPS
    return job.losses


def stopped(job: Job, attempt: int, code: int) -> float:
    """Wait until the job's own log says that an attempt ended so; returns when (time)."""
    line = f"attempt {attempt} ended with exit code {code} "
    until(f"{line}\n{job.story}", lambda: line in job.log, 300, every=0.05)
    return time.time()


def goes_on(job: Job, since: float, signalled: float | None = None) -> None:
    """Wait for the first step after a requeue, and print how long all took."""
    done = len(job.metrics)
    first = job.reach(done + 1)
    began = time.mktime(time.strptime(job.facts["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    exit_words = f"signal to exit {since - signalled:.1f} s, " if signalled else ""
    print(
        f"\n{job.name}: {exit_words}requeue to start {began - since:.0f} s (Slurm), "
        f"start to first step {first - began:.1f} s; step {done} of {STEPS}"
    )


def finishes(job: Job, unbroken: list[float]) -> None:
    """The job ends well, and its curve is the unbroken one."""
    facts = job.wait("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.story
    assert [line["step"] for line in job.metrics] == list(range(1, STEPS + 1))
    assert job.losses == unbroken


SIGNALS = ("--signal=USR1", "--signal=TERM --batch")


def test_signals_save_requeue_and_go_on(desk: Desk, unbroken: list[float]) -> None:
    job = desk.submit("signals", *SHORT)
    for attempt, how in enumerate(SIGNALS, 1):
        job.reach(len(job.metrics) + 5)
        signalled = job.signal(*how.split())
        exited = stopped(job, attempt, 85)
        assert f"attempt {attempt} ended with exit code 85 " in job.log, job.story
        assert len(job.metrics) < STEPS, "the signal came too late for this test"
        assert (job.run / f"checkpoints/step-{len(job.metrics):08d}").is_dir()
        goes_on(job, exited, signalled)
    finishes(job, unbroken)
    assert "Traceback" not in "".join(path.read_text() for path in job.run.glob("slurm/*.log"))
    assert job.facts["Restarts"] == str(len(SIGNALS))
    assert len(list(job.run.glob("slurm/*.log"))) == 1 + len(SIGNALS)
    assert len(job.log.splitlines()) < 10 * (1 + len(SIGNALS))


def test_a_cancelled_job_is_saved_and_stays_cancelled(desk: Desk, unbroken: list[float]) -> None:
    job = desk.submit("cancelled", *SHORT)
    job.reach(6)
    job.signal()
    stopped(job, 1, 85)
    assert "not requeued" in job.log
    time.sleep(8)  # longer than a requeued job waits here
    assert job.facts["JobState"] == "CANCELLED"
    assert (job.run / f"checkpoints/step-{len(job.metrics):08d}").is_dir()
    finishes(desk.submit("cancelled", *SHORT), unbroken)


def test_a_job_waits_for_a_drained_node_and_goes_on(desk: Desk, unbroken: list[float]) -> None:
    job = desk.submit("drained", *SHORT)
    job.reach(6)
    desk.cluster.run("scontrol", "update", "node=node2", "state=drain", "reason=test")
    job.signal("--signal=USR1")
    stopped(job, 1, 85)
    job.wait("PENDING")
    time.sleep(10)  # longer than a requeued job waits here
    assert job.facts["JobState"] == "PENDING"
    desk.cluster.run("scontrol", "update", "node=node2", "state=resume")
    goes_on(job, time.time())
    finishes(job, unbroken)


@pytest.mark.parametrize("node", NODES)
def test_a_lost_node_requeues_the_job_which_goes_on(
    desk: Desk, unbroken: list[float], node: str
) -> None:
    """node1 runs the batch script as well: Slurm itself requeues the job then."""
    job = desk.submit(f"lost-{node}", *SHORT, "save.every_steps=5")
    job.reach(6)
    desk.cluster.lose_node(node)
    lost = time.time()
    job.wait("PENDING")
    print(f"\n{job.name}: node lost to job pending {time.time() - lost:.1f} s")
    until(f"{node} is down", lambda: "DOWN" in desk.cluster.node(node), 300)
    desk.cluster.start_node(node)
    job.wait("RUNNING")
    finishes(job, unbroken)


def test_an_array_of_seeds_is_so_many_runs(desk: Desk) -> None:
    overrides = ("train.steps=3", "schedule.warmup_steps=1", "--array=4-5")
    array = desk.submit("seeds", *overrides)
    curves = []
    for seed in (4, 5):
        run = Job(desk, f"{array.number}_{seed}", f"seeds-seed-{seed}")
        until("an end", lambda run=run: run.facts["JobState"] in ("COMPLETED", "FAILED"), 600)
        assert run.facts["JobState"] == "COMPLETED"
        assert f"seed: {seed}\n" in (run.run / "recipe.yaml").read_text()
        curves.append(run.losses)
    assert len(curves[0]) == len(curves[1]) == 3
    assert curves[0] != curves[1]


def test_a_faulty_recipe_ends_with_2_and_is_not_tried_again(desk: Desk) -> None:
    (desk.folder / "slurm").symlink_to(ROOT / "slurm")
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
    said = desk.cluster.run(
        *("sbatch", "--parsable", "--job-name=faulty", *options, "slurm/train.sbatch"),
        *(TINY, "name=faulty", "train.stepz=3"),
        folder=desk.folder,
        **desk.environment,
        MMTRAIN_VENV=sys.prefix,
    )
    job = Job(desk, said.strip(), "faulty")
    facts = job.wait("FAILED", "COMPLETED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0"), job.story
    assert "did you mean train.steps?" in job.log
    assert not job.run.exists()


def test_a_job_that_gets_nowhere_is_given_up(desk: Desk) -> None:
    job = desk.submit("stuck", *SHORT)
    for attempt in (1, 2, 3):
        job.reach(len(job.metrics) + 1)
        desk.cluster.kill_a_task("node2")
        stopped(job, attempt, 75)
    facts = job.wait("FAILED", "COMPLETED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("93:0", "3"), job.story
