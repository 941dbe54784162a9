"""What a command says when it refuses something."""

import re

import pytest

from mmtrain.cli import main


def refused(capsys: pytest.CaptureFixture[str], code: int, *command: object) -> str:
    """Run a command that must end with a code; returns the one line that it says."""
    assert main([str(word) for word in command]) == code
    said = capsys.readouterr().err
    if code == 2:  # one fault a line below a headline
        assert said.startswith("mmtrain: 1 fault; nothing was written\n")
        said = said.partition("\n")[2]
    return one_line(said)


def one_line(said: str) -> str:
    """The only line of a message; what is logged begins with the time, or with W."""
    (line,) = [x for x in said.strip().splitlines() if not re.match(r"W?\d\d+[: ]", x)]
    return line
