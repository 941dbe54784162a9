"""`tools/check_golden.py` as a command: a table, and exit code 1 when anything is off."""

import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def check(repository: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools" / "check_golden.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)


def test_the_command_prints_every_quantity_and_succeeds(repository: Path) -> None:
    done = check(repository, repository / "tests" / "golden" / "emu_a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "89 quantities, 0 outside their limit" in done.stdout
    for quantity in (
        "textgen.beam.beam5_caption_ids",
        "rollout.cfg_pair.latents",
        "rank.order_each_alone",
        "instruct out.merged_logits",
        "storyboard a4_two_sheets",
        "emu-instruct: release -> full tensors -> .bin (108 tensors)",
    ):
        assert quantity in done.stdout
    assert "FAIL" not in done.stdout and "not covered" not in done.stdout


def test_the_command_fails_with_one_when_a_number_is_off(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(repository / "tests" / "golden" / "emu_a", folder)
    recorded = load_file(folder / "io.safetensors")
    recorded["out.ce_mean"] += 1e-4
    save_file(recorded, folder / "io.safetensors")
    done = check(repository, folder)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.endswith("FAIL")]
    assert len(failed) == 1 and failed[0].startswith("out.ce_mean")


def test_a_missing_folder_is_told_apart(repository: Path, tmp_path: Path) -> None:
    done = check(repository, tmp_path / "nowhere")
    assert done.returncode == 66 and "not found" in done.stderr
