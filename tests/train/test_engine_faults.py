"""What the watch makes of exceptions of the engines, and of stacks."""

import sys

import pytest
import torch.distributed as dist

from mmtrain.train.watch import HangError, PeerError, _outwards, _waiting, engine_fault

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
    said = _waiting(_outwards(sys._getframe()))
    assert said.startswith("in test_a_rank_outside_collectives_is_named_by_its_innermost_function")
    assert "test_engine_faults.py:" in said
