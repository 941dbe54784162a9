"""What the watch makes of exceptions of the engines, of stacks, and of a lock that is kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from mmtrain.train.peers import HangError, PeerError, engine_fault, outwards, waiting_in

GLOO = "[../third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    "error, kind",
    [
        (RuntimeError(GLOO + "pair.cc:547] Connection closed by peer [127.0.0.1]:1"), PeerError),
        (
            RuntimeError(GLOO + "pair.cc:525] Read error [::1]:1: Connection reset by peer"),
            PeerError,
        ),
        (RuntimeError(GLOO + "buffer.cc:72] Timed out waiting 4000ms for recv"), HangError),
        (
            dist.DistBackendError("NCCL error: remote process exited or there was a network"),
            PeerError,
        ),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), PeerError),
        (dist.DistStoreError("wait timeout after 4000ms, keys: /0"), HangError),
        (RuntimeError("download of s3://x timed out"), None),
        (ConnectionResetError("Connection reset by peer"), None),
        (ZeroDivisionError("division by zero"), None),
    ],
)
def test_the_engines_words_for_a_dead_or_late_peer(error: Exception, kind: type | None) -> None:
    assert engine_fault(error) is kind


def test_a_cause_is_looked_for_below_what_was_raised() -> None:
    try:
        try:
            raise dist.DistBackendError("Connection closed by peer")
        except dist.DistBackendError as error:
            raise RuntimeError("the schedule broke") from error
    except RuntimeError as error:
        assert engine_fault(error) is PeerError


def test_a_rank_outside_collectives_is_named_by_its_innermost_function() -> None:
    said = waiting_in(outwards(sys._getframe()))
    assert said.startswith("in test_a_rank_outside_collectives_is_named_by_its_innermost_function")
    assert "test_watching.py:" in said


KEEPS_THE_LOCK = """
import ctypes
from pathlib import Path
from mmtrain.layout.ranks import launched
from mmtrain.train.signals import Listener
from mmtrain.train.watch import Watch

watch = Watch(Path("run"), launched({}), {"setup": 3600.0, "step": 0.5}, Listener())
with watch.section("step"):
    ctypes.PyDLL(None).sleep(60)  # called with the interpreter lock
"""


def test_a_section_that_takes_the_lock_at_its_start_is_ended_too(tmp_path: Path) -> None:
    """No thread of Python runs in it, so it must have been armed before."""
    command = [sys.executable, "-c", KEEPS_THE_LOCK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 86, done.stderr
    assert "Timeout (" in done.stderr and 'File "<string>", line 10' in done.stderr
