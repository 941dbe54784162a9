"""The command line: what is printed where, and the exit codes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmtrain.cli import COMMANDS, main
from mmtrain.errors import ExitCode
from mmtrain.layout.ranks import Launched, launched
from mmtrain.ops import select
from mmtrain.ops.select import Preference

TINY = "configs/emu/tiny.yaml"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Training takes the signals of its process; here that is the tests'."""
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in taken}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny(repository: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny recipe, run from beside its data."""
    monkeypatch.chdir(shapes.parent)
    return str(repository / TINY)


def test_a_sound_recipe_prints_its_facts_and_ok(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", tiny]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "119,808" in out and "boards 11.1% (storyboard)" in out
    assert out.endswith("OK\n")


def test_a_faulty_recipe_exits_2_and_leaves_nothing(
    tiny: str, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(shapes.parent.iterdir())
    assert main(["train", tiny, "train.stepz=3", "parallel.tensor=3"]) == ExitCode.RECIPE
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("mmtrain: ") and "nothing was written" in lines[0]
    assert len(lines) == 1 + int(lines[0].split()[1])
    assert "did you mean train.steps?" in captured.err
    assert sorted(shapes.parent.iterdir()) == before


def test_only_rank_0_reports_faults(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["train", tiny, "train.stepz=3"]) == ExitCode.RECIPE
        assert bool(capsys.readouterr().err) == said


def test_train_checks_the_layout_against_the_ranks_that_were_started(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    # as the deepspeed launcher writes it: the local rank stands before the command
    assert main(["--local_rank=0", "train", tiny, "parallel.tensor=2"]) == ExitCode.RECIPE
    assert "does not divide the 3 rank(s) started" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_options(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", tiny, "train.steps=30", "--world", "4", "parallel.pipeline=2"]
    assert main(command) == ExitCode.DONE
    assert "tensor 1 x pipeline 2 x data 2" in capsys.readouterr().out


def test_a_plan_needs_no_data(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(repository / "configs/emu/7b_pretrain.yaml")
    assert main(["plan", path, "--world", "64"]) == ExitCode.DONE
    assert "1,977,406,176" in capsys.readouterr().out
    assert main(["plan", path, "--world", "6"]) == ExitCode.RECIPE


def test_shapes_are_written_and_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "world"
    assert main(["data", "shapes", str(out), "--documents", "24", "--seed", "3"]) == 0
    assert main(["data", "index", str(out / "pages"), "--tokenizer", str(out / "tokenizer")]) == 0
    assert "text tokens" in capsys.readouterr().out


def test_a_fault_outside_the_recipe_has_its_own_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "index", str(tmp_path), "--tokenizer", str(tmp_path / "none")]
    assert main(command) == ExitCode.MISSING
    assert capsys.readouterr().err.startswith("mmtrain: tokenizer folder")


@pytest.mark.parametrize(
    "command, said",
    [
        (["chek"], "invalid choice: 'chek'"),
        (["plan", "x.yaml", "--world", "0"], "wanted: a whole number from 1"),
        (["check", "x.yaml", "--wrld", "3"], "unknown argument(s): --wrld"),
        (["sample", "runs/x", "a=b"], "unknown argument(s): a=b"),
        (["data"], "COMMAND"),
    ],
)
def test_a_wrong_command_exits_2(
    command: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == ExitCode.RECIPE
    assert said in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        group, _, word = command.name.rpartition(" ")
        assert (word if group else command.summary) in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_module_starts_without_the_heavy_rooms(repository: Path) -> None:
    code = "import sys, mmtrain.cli; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_python_m_mmtrain_is_the_same_command(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmtrain", "check", "none.yaml"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.RECIPE
    assert "there is no such recipe" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_come_from_whichever_launcher_started_them() -> None:
    assert launched({}) == Launched(0, 0, 1) and not launched({}).by_launcher
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert launched(torchrun) == Launched(3, 1, 4) and launched(torchrun).by_launcher
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    assert launched({**slurm, "SLURM_STEP_ID": "0"}) == Launched(5, 1, 8)
    assert launched({**slurm, "SLURM_STEP_ID": "0", **torchrun}) == Launched(3, 1, 4)


def test_a_shell_inside_an_allocation_is_one_process() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert launched(batch) == Launched(0, 0, 1)
    assert launched({**batch, "SLURM_STEP_ID": str(0xFFFFFFFA)}) == Launched(0, 0, 1)


@pytest.fixture
def run_folder(tiny: str, tmp_path: Path) -> Path:
    """A run of which the recipe alone is there."""
    (tmp_path / "recipe.yaml").write_text(f"base: {tiny}\nops: {{attention: torch}}\n")
    return tmp_path


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["sample"], Preference.torch),
        (["evaluate"], Preference.torch),
        (["evaluate", "ops.attention=auto"], Preference.auto),
    ],
)
def test_commands_on_a_run_take_the_ops_that_its_recipe_names(
    run_folder: Path, argv: list[str], expected: Preference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen before weights are looked for, which are missing here."""
    chosen: list[Preference] = []
    monkeypatch.setattr(select, "use", chosen.append)
    command, *overrides = argv
    assert main([command, str(run_folder), *overrides]) == ExitCode.MISSING
    assert chosen == [expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels may be there")
def test_a_run_that_insists_on_the_kernels_is_not_sampled_without_them(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("torch}", "cuda}"))
    assert main(["sample", str(run_folder)]) == ExitCode.MISSING
    assert "ops.attention: cuda, but there is no CUDA device" in capsys.readouterr().err


def test_what_a_command_writes_is_never_writable_for_everybody(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert main(["data", "shapes", str(tmp_path / "shapes"), "--documents", "60"]) == 0
    finally:
        os.umask(before)
    made = [tmp_path / "shapes", *(tmp_path / "shapes").rglob("*")]
    assert len(made) > 10
    assert not [path for path in made if path.stat().st_mode & 0o002]
