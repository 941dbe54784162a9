"""Faults a user can fix, and the exit codes of a run.

An error names the place (file, key, sample), what was found, what is allowed and the way out.
Faults of one kind are collected as `Problem`s and reported together.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells its launcher; 74, 75, 85, 86 and 88 are worth a retry."""

    DONE = 0
    RECIPE = 2  # the recipe or the command is wrong; nothing was written
    CONTENT = 65  # data or checkpoint content is invalid
    MISSING = 66  # an input is missing
    BUG = 70  # ranks disagree, an internal promise is broken
    STORAGE = 74  # disk full, I/O
    PEER = 75  # a peer or a service failed
    STOPPED = 85  # stopped on request after a commit
    HANG = 86
    NUMBERS = 87  # non-finite after rollbacks
    DIVERGED = 88  # replicas differ
    STUCK = 93  # no progress over several attempts


@dataclass(frozen=True)
class Problem:
    """One fault: `place` is a dotted key or a file, `text` says found, allowed and the way out."""

    place: str
    text: str

    def __str__(self) -> str:
        """Return `place: text`."""
        return f"{self.place}: {self.text}"


class MmtrainError(Exception):
    """A fault the user can fix; `exit_code` is what the process ends with."""

    exit_code: ExitCode = ExitCode.BUG


class RecipeError(MmtrainError):
    """All faults of a recipe or a command line at once."""

    exit_code = ExitCode.RECIPE

    def __init__(self, problems: Iterable[Problem]) -> None:
        """Keep the problems and join them, one a line."""
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ContentError(MmtrainError):
    """Data or a checkpoint holds what it must not hold."""

    exit_code = ExitCode.CONTENT


class MissingError(MmtrainError):
    """An input file or folder is not there."""

    exit_code = ExitCode.MISSING


class StorageError(MmtrainError):
    """Writing or reading failed: disk full, permission, I/O."""

    exit_code = ExitCode.STORAGE


class ServiceError(MmtrainError):
    """A service (object storage, a web server) failed or cannot be reached; worth a retry."""

    exit_code = ExitCode.PEER


class OccupiedError(MmtrainError):
    """Another process works in the folder."""

    exit_code = ExitCode.PEER


class NumbersError(MmtrainError):
    """Losses or gradients stay non-finite; the last good checkpoint is whole."""

    exit_code = ExitCode.NUMBERS


class DivergedError(MmtrainError):
    """Ranks that must hold the same weights do not."""

    exit_code = ExitCode.DIVERGED
