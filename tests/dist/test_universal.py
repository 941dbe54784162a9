"""DeepSpeed's universal checkpoints: written, read back, loaded and made by DeepSpeed itself."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from forge import free_port
from world import REPOSITORY, TINY, World, kept

from mmtrain.checkpoint.manifest import Manifest

SHORT = ("train.steps=10", "save.every_steps=5", "schedule.warmup_steps=2", "data.workers=0")
STEP = "checkpoints/step-00000005"
LAYOUTS = {
    "zero1": ("parallel.zero_stage=1",),
    "zero3": ("parallel.zero_stage=3",),
    "pipeline": ("parallel.pipeline=2",),
}
FAST_AND_SLOW = [
    "zero1",
    pytest.param("zero3", marks=pytest.mark.slow),
    pytest.param("pipeline", marks=pytest.mark.slow),
]


def on_two_ranks(world: World, *argv: str) -> None:
    """Run `universal_rank.py`."""
    port, script = str(free_port()), Path(__file__).with_name("universal_rank.py")
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script), *argv],
                cwd=world.folder,
                env=os.environ | place | meeting | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=600)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said[0][-4000:]


def assert_same(first: Path, second: Path) -> None:
    before, after = kept(first), kept(second)
    assert after.keys() == before.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert Manifest.read(first).optimizer_steps == Manifest.read(second).optimizer_steps == 5


def new_run(world: World, source: str, name: str) -> Path:
    """A run folder with nothing but another one's recipe."""
    recipe = yaml.safe_load((world.folder / "runs" / source / "recipe.yaml").read_text())
    folder = world.folder / "runs" / name
    folder.mkdir(parents=True)
    text = yaml.safe_dump({**recipe, "name": name}, sort_keys=False)  # sources are numbered
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def half(world: World) -> str:
    """A run in bf16 with running means: every kind of tensor is in its checkpoints."""
    world.train("half", 1, *SHORT, "train.precision=bf16", "train.ema=0.9")
    return "half"


@pytest.fixture(scope="module")
def both(world: World) -> Callable[[str], str]:
    """A run of ten steps on a layout that has saved its 5th in DeepSpeed's format too."""
    made: dict[str, str] = {}

    def run(layout: str) -> str:
        if layout not in made:
            overrides = (*SHORT, *LAYOUTS[layout])
            on_two_ranks(world, "save", str(TINY), f"name=both-{layout}", *overrides)
            made[layout] = f"both-{layout}"
        return made[layout]

    return run


def test_out_and_in_again_is_equal_to_the_last_bit(
    world: World, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ("--checkpoint", "step-00000005")
    assert (
        world.tool_here(
            monkeypatch, "universal_checkpoint.py", "out", f"runs/{half}", "universal", *step
        )
        == 0
    )
    back = new_run(world, half, "back")
    assert (
        world.tool_here(monkeypatch, "universal_checkpoint.py", "in", "universal", "runs/back") == 0
    )
    first = world.folder / "runs" / half / STEP
    kinds = {kind for kind, _ in kept(first)}
    assert kinds == {"weight", "master", "ema", "moment.exp_avg", "moment.exp_avg_sq"}
    assert_same(first, back / STEP)
    assert Manifest.read(first).state == Manifest.read(back / STEP).state
    assert (
        world.tool_here(
            monkeypatch, "universal_checkpoint.py", "out", f"runs/{half}", "universal", *step
        )
        == 74
    )  # is there
    assert (
        world.tool_here(monkeypatch, "universal_checkpoint.py", "in", "universal", "runs/back")
        == 74
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepspeed_loads_what_was_written(
    world: World, both: Callable[[str], str], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = both("zero1")
    assert world.tool_here(
        monkeypatch, "universal_checkpoint.py", "out", f"runs/{source}", f"for-{layout}",
        "--names", "engine", "--checkpoint", "step-00000005", *LAYOUTS[layout],
    ) == 0  # fmt: skip
    name = f"loaded-{layout}"
    on_two_ranks(world, "load", f"for-{layout}", str(TINY), f"name={name}", *LAYOUTS[layout])
    assert_same(world.folder / "runs" / source / STEP, world.folder / "runs" / name / STEP)


@pytest.mark.parametrize("layout", FAST_AND_SLOW)
def test_a_run_goes_on_from_what_deepspeed_has_converted(
    world: World, both: Callable[[str], str], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = both(layout)
    saves = world.folder / "runs" / source / "deepspeed"
    done = subprocess.run(
        [
            sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
            "--input_folder", str(saves / "global_step5"),
            "--output_folder", str(saves / "converted"),
            "--num_extract_workers", "1", "--num_merge_workers", "1",
        ],
        env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    name = f"on-{layout}"
    folder = new_run(world, source, name)
    assert (
        world.tool_here(monkeypatch, "universal_checkpoint.py", "in", str(saves), f"runs/{name}")
        == 0
    )
    assert_same(world.folder / "runs" / source / STEP, folder / STEP)
    plain = ("parallel.pipeline=1", "parallel.zero_stage=1")
    assert world.run(1, "train", f"runs/{name}/recipe.yaml", *plain) == [0], world.last_log
    was, goes = (
        [line["loss"] for line in world.metrics(run) if line["step"] > 5] for run in (source, name)
    )
    assert len(goes) == 5
    assert goes == pytest.approx(was, rel=1e-6)


class Command:
    """A pickle that runs a program when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


PARAMETER = "zero/blocks.1.mlp.up.weight"


def a_program(folder: Path) -> str:
    torch.save(Command(folder.parent / "ran"), folder / PARAMETER / "fp32.pt")
    return "refused, nothing was run"


def no_moment(folder: Path) -> str:
    (folder / PARAMETER / "exp_avg.pt").unlink()
    return "exp_avg.pt: missing"


def no_parameter(folder: Path) -> str:
    shutil.rmtree(folder / PARAMETER)
    return "blocks.1.mlp.up.weight is missing"


def a_wrong_shape(folder: Path) -> str:
    torch.save({"param": torch.zeros(32, 95)}, folder / PARAMETER / "exp_avg_sq.pt")
    return "32x95 f32; the recipe's model has 96x32 f32"


def an_unknown_name(folder: Path) -> str:
    shutil.copytree(folder / PARAMETER, folder / "zero/blocks.9.mlp.up.weight")
    return "no parameter of the recipe's model, which has "


def a_flipped_bit(folder: Path) -> str:
    path = folder / PARAMETER / "fp32.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "has another check sum"


def other_steps(folder: Path) -> str:
    torch.save(torch.tensor(7.0), folder / PARAMETER / "step.pt")
    return "different numbers of steps: [7, 10]"


@pytest.mark.parametrize(
    "spoil",
    [
        a_program, no_moment, no_parameter, a_wrong_shape, an_unknown_name, a_flipped_bit,
        other_steps,
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused_in_one_line(
    world: World,
    half: str,
    spoil: Callable[[Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = world.folder / "whole"
    if not whole.exists():
        assert (
            world.tool_here(monkeypatch, "universal_checkpoint.py", "out", f"runs/{half}", "whole")
            == 0
        )
    shutil.copytree(whole, tmp_path / "u")
    reason = spoil(tmp_path / "u/global_step10_universal")
    run = new_run(world, half, f"refused-{spoil.__name__}")
    capsys.readouterr()
    assert (
        world.tool_here(monkeypatch, "universal_checkpoint.py", "in", str(tmp_path / "u"), str(run))
        == 65
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and reason in said[0]
    assert not (run / "checkpoints").exists() and not list(tmp_path.rglob("ran"))


def test_all_faults_are_named_at_once_and_what_is_missing_is_66(
    world: World,
    half: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        world.tool_here(
            monkeypatch, "universal_checkpoint.py", "out", f"runs/{half}", str(tmp_path / "u")
        )
        == 0
    )
    folder = tmp_path / "u/global_step10_universal"
    reasons = [spoil(folder) for spoil in (no_moment, a_wrong_shape, an_unknown_name)]
    run = new_run(world, half, "refused-three")
    capsys.readouterr()
    assert (
        world.tool_here(monkeypatch, "universal_checkpoint.py", "in", str(folder), str(run)) == 65
    )
    said = capsys.readouterr().err
    assert "3 faults" in said and all(reason in said for reason in reasons)
    shutil.rmtree(folder)
    assert (
        world.tool_here(monkeypatch, "universal_checkpoint.py", "in", str(tmp_path / "u"), str(run))
        == 66
    )
    assert "no folder with zero/" in capsys.readouterr().err
    assert (
        world.tool_here(monkeypatch, "universal_checkpoint.py", "in", str(tmp_path), str(run)) == 66
    )
    assert (
        world.tool_here(
            monkeypatch, "universal_checkpoint.py", "in", str(tmp_path), str(tmp_path / "no_run")
        )
        == 66
    )
    assert "recipe.yaml: not found" in capsys.readouterr().err
