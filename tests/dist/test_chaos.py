"""The short form of `make chaos`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "layout", ["one", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "tp2-dp2"))]
)
def test_ranks_killed_at_random_moments_lose_nothing(layout: str) -> None:
    script = Path(__file__).with_name("chaos.py")
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "2", "--layout", layout],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "every curve equals that of its run without kills"
