"""Who works in a run folder, how each attempt ended, and whether attempts get anywhere.

`lock` is held by rank 0 while it lives (POSIX record lock: data workers do not inherit it, the
kernel releases it). `attempts.jsonl` holds a line for the beginning and one for the end of every
attempt. `verdict.json` says why the last one ended: launchers lose exit codes (torchrun turns 85
into 1), so the first rank that fails writes it, and that is the truth.
"""

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtrain.disk import try_lock
from mmtrain.errors import ExitCode, MmtrainError, OccupiedError

log = logging.getLogger(__name__)

LOCK, ATTEMPTS, VERDICT = "lock", "attempts.jsonl", "verdict.json"
RETRYABLE = (
    ExitCode.STORAGE,
    ExitCode.PEER,
    ExitCode.STOPPED,
    ExitCode.HANG,
    ExitCode.DIVERGED,
)
_FRUITLESS = 3  # attempts without progress after which nothing is started
_LOCK_SECONDS = 3.0  # the rank before this one may still be dying


class StuckError(MmtrainError):
    """Attempts get nowhere."""

    exit_code = ExitCode.STUCK


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why an attempt ended, by the first rank that knew.

    Attributes:
        step: optimizer steps done.
        section: what the rank was doing.
        reason: one line.
    """

    exit_code: int
    rank: int
    host: str
    pid: int
    attempt: int
    step: int
    section: str
    reason: str
    time: str

    def write(self, folder: Path) -> bool:
        """Write it unless there is one; returns whether it is this one that stands."""
        path = folder / VERDICT
        own = folder / f".{VERDICT}.{self.host}.{self.pid}"
        try:
            own.write_text(json.dumps(asdict(self), indent=1) + "\n")
            os.link(own, path)  # whole or not at all, and the first wins
        except FileExistsError:
            return False
        except OSError as error:
            log.warning("%s: not written: %s", path, error)
            return False
        finally:
            own.unlink(missing_ok=True)
        return True


class Lease:
    """The right to write into a run folder."""

    def __init__(self, folder: Path) -> None:
        """Take it.

        Raises:
            OccupiedError: another process has it.
        """
        path = folder / LOCK
        self._handle = path.open("a+")
        patience = time.monotonic() + _LOCK_SECONDS
        while not try_lock(self._handle, "start one run only"):
            if time.monotonic() > patience:
                self._handle.seek(0)
                holder = self._handle.read().strip() or "unknown"
                self._handle.close()
                raise OccupiedError(
                    f"{folder}: another run works in this folder ({holder}); wait for it or end "
                    "it, or choose another folder by name= or output="
                )
            time.sleep(0.1)
        self._handle.seek(0)
        self._handle.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._handle.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {since}\n")
        self._handle.flush()

    def release(self) -> None:
        """Give it back before the process ends."""
        self._handle.close()


class Attempts:
    """The attempts of a run, as rank 0 writes them; the folder must be held."""

    def __init__(self, folder: Path) -> None:
        """Read what earlier ones left."""
        self._folder, self._path = folder, folder / ATTEMPTS
        self.past: list[dict[str, Any]] = []
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if "begins" in record:
                self.past.append(record)
            elif self.past:
                self.past[-1] |= record
        if self.past and "exit_code" not in self.past[-1] and (code := _code(folder)) is not None:
            self.past[-1]["exit_code"] = code  # rank 0 could not say so

    def begin(self, recipe_hash: str, step: int) -> int:
        """Note that an attempt begins at a step; returns its number.

        Raises:
            StuckError: the ones before it got nowhere.
        """
        if self.past and "exit_code" in self.past[-1]:
            self._append(exit_code=self.past[-1]["exit_code"])
        (self._folder / VERDICT).unlink(missing_ok=True)
        fruitless = 0
        for attempt in reversed(self.past):
            died = "exit_code" not in attempt or attempt["exit_code"] in RETRYABLE
            if not died or attempt["recipe"] != recipe_hash or attempt["step"] != step:
                break
            fruitless += 1
        if fruitless >= _FRUITLESS:
            codes = [str(attempt.get("exit_code", "killed")) for attempt in self.past[-fruitless:]]
            raise StuckError(
                f"{self._folder}: {fruitless} attempts in a row saved nothing after step {step} "
                f"(exit codes {', '.join(codes)}); find the cause in {self._folder / 'log.txt'}, "
                f"then delete {self._path} or change the recipe to start again"
            )
        number = self.past[-1]["begins"] + 1 if self.past else 1
        self._append(
            begins=number,
            step=step,
            recipe=recipe_hash,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID"),
            time=now(),
        )
        return number

    def end(self, exit_code: int, step: int) -> None:
        """Note how the attempt that began ended."""
        self._append(exit_code=int(exit_code), last_step=step, time_ended=now())

    def _append(self, **record: Any) -> None:
        with self._path.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def now() -> str:
    """Local time, with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _code(folder: Path) -> int | None:
    """Exit code of the verdict, if one was written."""
    try:
        return int(json.loads((folder / VERDICT).read_text())["exit_code"])
    except (OSError, ValueError, KeyError):
        return None
