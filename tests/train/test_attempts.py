"""Verdicts, leases and attempts of a run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.errors import ExitCode, OccupiedError
from mmtrain.train.attempts import (
    ATTEMPTS,
    VERDICT,
    Attempts,
    Lease,
    StuckError,
    Verdict,
)


def verdict(rank: int, code: int) -> Verdict:
    return Verdict(
        exit_code=code,
        rank=rank,
        host="n1",
        pid=rank,
        attempt=1,
        step=3,
        section="step",
        reason="why",
        time="now",
    )


def test_the_first_verdict_stands_and_a_new_attempt_takes_it_away(tmp_path: Path) -> None:
    Attempts(tmp_path).begin("a", 0)
    assert verdict(1, 74).write(tmp_path)
    assert not verdict(0, 75).write(tmp_path)
    assert json.loads((tmp_path / VERDICT).read_text())["rank"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [ATTEMPTS, VERDICT]
    assert Attempts(tmp_path).begin("a", 0) == 2
    assert not (tmp_path / VERDICT).exists()
    assert Attempts(tmp_path).past[0]["exit_code"] == 74  # kept with its attempt


@pytest.mark.parametrize("codes", [(75, 86, None), (85, 85, 85), (None, None, None)])
def test_three_attempts_that_saved_nothing_are_enough(
    tmp_path: Path, codes: tuple[int | None, ...]
) -> None:
    attempt(tmp_path, codes)
    with pytest.raises(StuckError, match=r"3 attempts in a row saved nothing after step 10") as e:
        Attempts(tmp_path).begin("a", 10)
    assert e.value.exit_code == ExitCode.STUCK and str(tmp_path / ATTEMPTS) in str(e.value)
    (tmp_path / ATTEMPTS).unlink()
    assert Attempts(tmp_path).begin("a", 10) == 1


@pytest.mark.parametrize(
    "codes, recipe, step",
    [
        ((75, 75), "a", 10),  # two only
        ((75, 75, 75), "b", 10),  # another recipe
        ((75, 75, 75), "a", 20),  # the last one saved something
        ((75, 75, 65), "a", 10),  # a fault that somebody has mended since
        ((75, 75, 0), "a", 10),
    ],
)
def test_attempts_that_got_somewhere_or_were_seen_to_do_not_count(
    tmp_path: Path, codes: tuple[int, ...], recipe: str, step: int
) -> None:
    attempt(tmp_path, codes)
    assert Attempts(tmp_path).begin(recipe, step) == len(codes) + 1


def attempt(folder: Path, codes: tuple[int | None, ...]) -> None:
    for code in codes:
        attempts = Attempts(folder)
        attempts.begin("a", 10)
        if code is not None:
            attempts.end(code, 12)


def test_a_torn_line_is_no_attempt(tmp_path: Path) -> None:
    Attempts(tmp_path).begin("a", 0)
    with (tmp_path / ATTEMPTS).open("a") as lines:
        lines.write('{"begins": 2, "st\n')
    assert Attempts(tmp_path).begin("a", 0) == 2


def test_a_folder_is_held_by_one_process_and_free_when_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from mmtrain.train.attempts import Lease\n"
        f"lease = Lease(pathlib.Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(OccupiedError, match=f"pid {holder.pid}") as caught:
            Lease(tmp_path)
        assert caught.value.exit_code == ExitCode.PEER
        holder.kill()
        lease = Lease(tmp_path)
    assert f"pid {os.getpid()}" in (tmp_path / "lock").read_text()
    lease.release()
