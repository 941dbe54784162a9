"""Where log lines go."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger(log.ROOT)
    before = root.handlers[:], root.level, root.propagate
    with warnings.catch_warnings():
        yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level, root.propagate = before


def test_rank_0_reports_events_and_the_others_only_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in (0, 1):
        log.start(rank, world_size=2)
        logging.getLogger("mmtrain.train.loop").info("step 3 loss 2.5")
        logging.getLogger("mmtrain.data").warning("bad image")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "rank 0 step 3 loss 2.5",
        "rank 0 bad image",
        "rank 1 bad image",
    ]


def test_the_file_keeps_what_earlier_launches_wrote(tmp_path: Path) -> None:
    for step in (1, 2):
        log.start(0)
        log.add_file(tmp_path / "run" / "log.txt")
        logging.getLogger("mmtrain").info("step %d", step)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split()[1:] for line in lines] == [["step", "1"], ["step", "2"]]


def test_starting_twice_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.start(0)
    log.start(0)
    logging.getLogger("mmtrain").info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
