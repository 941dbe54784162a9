"""Watches a rank: a step that does not end, a peer that died, an error nobody foresaw.

A thread of each rank knows what the rank is doing and since when. A section that outlasts its
budget ends the rank with exit code 86, after the stacks of all threads went to
`stacks/rank-NNNNN.txt` with the collective it waits in. The clock of a step begins for all ranks
at the same collective, so those that wait for the culprit run out together, and each says where.

Whatever ends a rank is said in `log.txt` by the rank itself, and the first to fail writes
`verdict.json`. Cost: one assignment a section; the thread wakes once a second.
"""

import contextlib
import faulthandler
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmtrain import log as logs
from mmtrain.errors import ExitCode, MmtrainError, RecipeError, StorageError
from mmtrain.layout.ranks import Launched
from mmtrain.parallel.mesh import Mesh
from mmtrain.process import ExitTimer
from mmtrain.settings import Recipe
from mmtrain.train.attempts import Attempts, Lease, Verdict, now
from mmtrain.train.peers import HangError, PeerError, engine_fault, one_line, outwards, waiting_in
from mmtrain.train.signals import Listener

log = logging.getLogger(__name__)

STACKS = "stacks"
_TICK_SECONDS = 1.0
# before the process ends where Python cannot run; the thread has done it earlier elsewhere
_GRACE_SECONDS = 20.0
_LINGER_SECONDS = 3.0  # so that peers whose time is up as well say where they wait
_PEER_SECONDS = 1.5  # for the verdict of a rank that failed first, and takes its peers along


class BugError(MmtrainError):
    """An error nobody foresaw."""

    exit_code = ExitCode.BUG


@dataclass(frozen=True)
class _Section:
    """What the rank does, since when (monotonic), and how long it may; 0 = as long as it takes."""

    name: str
    began: float
    seconds: float

    @property
    def deadline(self) -> float:
        """When its time is up (monotonic)."""
        return self.began + self.seconds if self.seconds else math.inf


def budgets_of(recipe: Recipe) -> dict[str, float]:
    """Seconds that each section may last; data are waited for within a step."""
    watch = recipe.watch
    return {
        "setup": watch.setup_seconds,
        "step": watch.stall_seconds,
        "validate": watch.stall_seconds,
        "save": watch.save_seconds,
        "evaluate": recipe.evaluate.timeout_seconds,
    }


class Watch:
    """What one rank is doing; ends it when that takes too long.

    Attributes:
        folder: the run's folder.
        step: optimizer steps done.
    """

    def __init__(
        self, folder: Path, place: Launched, budgets: Mapping[str, float], listener: Listener
    ) -> None:
        """Watch from now on; the first section is `setup`."""
        self.folder, self.place, self.listener = folder, place, listener
        self.step = 0
        self._budgets = budgets
        self._section = _Section("setup", time.monotonic(), budgets["setup"])
        self._armed: _Section | None = None
        self._arming = threading.Lock()
        self._exit = ExitTimer(ExitCode.HANG)
        self._stacks = folder / STACKS / f"rank-{place.rank:05d}.txt"
        self._attempt = 0  # 0 = the folder is not ours
        self._lease: Lease | None = None
        self._attempts: Attempts | None = None
        self._told: BaseException | None = None
        listener.dump = lambda: self.dump(f"{now()} SIGUSR2 in section {self._section.name}")
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    # --- what the rank says of itself --------------------------------------------------------

    def ends(self, mesh: Mesh, step: int) -> bool:
        """Whether any rank was asked to end the run; a collective at the boundary of steps."""
        self.step = step
        asked = mesh.any_rank(bool(self.listener.reason))
        self._enter(_Section("step", time.monotonic(), self._budgets["step"]))
        return asked

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Name what runs inside; a name with a budget of its own has a clock of its own."""
        outer = self._section
        if name not in self._budgets:
            self._section = replace(outer, name=name)
            yield
            self._section = outer
            return
        self._enter(_Section(name, time.monotonic(), self._budgets[name]))
        yield  # after an error the section is where it happened
        self._enter(replace(outer, began=time.monotonic()))

    def _enter(self, section: _Section) -> None:
        """Begin a section; arm it here if what is armed would end later, else the thread does.

        The thread needs the interpreter lock, which the section may take and keep.
        """
        self._section = section
        armed = self._armed
        if armed is None or section.deadline < armed.deadline:
            self._arm(section)

    # --- the folder --------------------------------------------------------------------------

    def occupy(self) -> None:
        """Take the run folder (rank 0).

        Raises:
            OccupiedError: another run has it.
        """
        self._lease = Lease(self.folder)

    def begin(self, recipe_hash: str, step: int) -> int:
        """Note that an attempt begins at a saved step (rank 0); returns its number.

        Raises:
            StuckError: the ones before it got nowhere.
        """
        self._attempts = Attempts(self.folder)
        return self._attempts.begin(recipe_hash, step)

    def admit(self, attempt: int) -> None:
        """Rank 0 holds the folder for an attempt: this rank may write there too."""
        self._attempt = attempt

    @property
    def _owns(self) -> bool:
        """Whether this launch holds the folder."""
        return self._attempt > 0 or self._lease is not None

    # --- ends --------------------------------------------------------------------------------

    def done(self) -> int:
        """The last step is made."""
        self._note(ExitCode.DONE)
        return ExitCode.DONE

    def stopped(self, mesh: Mesh) -> int:
        """The run was ended on request, and what it did is saved; a collective."""
        reasons = mesh.gather(self.listener.reason)
        told = ", ".join(f"{reason} on rank {r}" for r, reason in enumerate(reasons) if reason)
        reason = f"stopped after step {self.step}: {told}; start again to go on"
        log.info(reason)
        if mesh.rank == 0:
            self._judge(ExitCode.STOPPED, reason)
        return ExitCode.STOPPED

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell why the rank ends, in `log.txt` and `verdict.json`, before anything is undone.

        A peer's death ends the process at once: what tidies up would wait for the dead.

        Raises:
            MmtrainError: for every exception.
        """
        try:
            yield
        except Exception as error:
            if error is self._told:
                raise
            fault = self._fault(error)
            self._told = fault
            self._report(fault, error)
            if isinstance(fault, PeerError | HangError):
                self._leave(fault)
            raise fault from (None if fault is error else error)

    def close(self) -> None:
        """Stop watching and give the folder back."""
        self._closed.set()
        self._disarm()
        if self._lease is not None:
            self._lease.release()

    def _fault(self, error: Exception) -> MmtrainError:
        if isinstance(error, MmtrainError):
            return error
        if str(error).startswith("DataLoader worker"):  # torch raises it wherever the rank is
            return StorageError(f"a data worker is gone: {one_line(error)}")
        trail = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
        where = f"in section {self._section.name} after step {self.step}, {waiting_in(trail)}"
        kind = engine_fault(error)
        if kind is PeerError:
            return PeerError(
                f"lost its peer {where}: {one_line(error)}; the rank that ended first"
                f" says why in {self.folder / 'log.txt'}"
            )
        if kind is HangError and not self._attempt:  # the ranks have not even met
            return PeerError(
                f"no answer from a peer {where}: {one_line(error)}; is every rank "
                "started, and can it reach MASTER_ADDR:MASTER_PORT?"
            )
        if kind is HangError:
            return HangError(f"no answer from a peer {where}: {one_line(error)}")
        name = type(error).__name__
        return BugError(
            f"{where}: {name}: {one_line(error)}; this is a bug, please report it "
            f"with the traceback in {self.folder / 'log.txt'}"
        )

    def _report(self, fault: MmtrainError, error: Exception) -> None:
        if isinstance(fault, RecipeError):  # nothing was written, and nothing is
            return
        lines = []
        if fault is not error:
            lines = traceback.format_exception(error)
        if isinstance(fault, BugError):
            print("".join(lines), file=sys.stderr)
        if isinstance(fault, HangError):
            self.dump("".join(lines))
        if isinstance(fault, PeerError) and self._attempt:
            _wait_for(self.folder / "verdict.json", _PEER_SECONDS)
        self._write_log(f"{fault}\n" + "".join(lines))
        self._judge(fault.exit_code, str(fault))

    def _leave(self, fault: MmtrainError) -> None:
        print(f"mmtrain: rank {self.place.rank}: {fault}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(fault, HangError):
            time.sleep(_LINGER_SECONDS)
        os._exit(fault.exit_code)

    def _judge(self, code: ExitCode, reason: str) -> None:
        if not self._owns:
            return
        Verdict(
            exit_code=int(code),
            rank=self.place.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            attempt=self._attempt,
            step=self.step,
            section=self._section.name,
            reason=reason.splitlines()[0],
            time=now(),
        ).write(self.folder)
        self._note(code)

    def _note(self, code: ExitCode) -> None:
        """Rank 0 closes the attempt."""
        if self._attempts is not None and self._attempt:
            self._attempts.end(code, self.step)

    def _write_log(self, text: str) -> None:
        """Ranks share `log.txt`; every rank tells its own end there."""
        if not self._owns:
            return
        stamp = time.strftime("%H:%M:%S")
        try:
            with (self.folder / logs.FILE).open("a") as lines:
                lines.write(f"{stamp} rank {self.place.rank} {text.rstrip()}\n")
        except OSError as error:
            log.warning("%s: %s", self.folder / logs.FILE, error)

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(self._pause()):
            section = self._section
            if section is not self._armed:
                self._arm(section)
            if time.monotonic() > section.deadline:
                self._expire(section)

    def _pause(self) -> float:
        seconds = self._section.seconds
        return min(_TICK_SECONDS, seconds / 10) if seconds else _TICK_SECONDS

    def _arm(self, section: _Section) -> None:
        """Where the interpreter lock is held for ever, C code ends the rank a little later."""
        with self._arming:
            self._armed = section
            if not section.seconds:
                self._disarm()
                return
            grace = min(_GRACE_SECONDS, section.seconds)
            left = max(0.0, section.deadline - time.monotonic()) + grace
            faulthandler.dump_traceback_later(left, file=sys.__stderr__ or sys.stderr)
            self._exit.start(left + 1.0)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._exit.start(0.0)

    def _expire(self, section: _Section) -> None:
        self._exit.start(_GRACE_SECONDS)  # should what follows hang as well
        waited = time.monotonic() - section.began
        main = threading.main_thread().ident
        frame = sys._current_frames().get(main) if main is not None else None
        reason = (
            f"no progress for {waited:.0f} s in section {section.name} after step {self.step} "
            f"(allowed: {section.seconds:g} s), {waiting_in(outwards(frame))}"
        )
        self.dump(f"{now()} {reason}")
        self._judge(ExitCode.HANG, reason)
        self._write_log(f"{reason}; stacks: {self._stacks}")
        print(f"mmtrain: rank {self.place.rank}: {reason}; stacks: {self._stacks}", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(_LINGER_SECONDS)
        os._exit(ExitCode.HANG)

    def dump(self, heading: str) -> None:
        """Append the stacks of all threads to this rank's file; data workers write to the terminal.

        Without a folder of our own all of it goes to the terminal.
        """
        title = f"rank {self.place.rank} host {socket.gethostname()} pid {os.getpid()} {heading}"
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGUSR2)
        try:
            if not self._attempt:
                raise FileNotFoundError(self.folder)
            self._stacks.parent.mkdir(exist_ok=True)
            with self._stacks.open("a") as out:
                _dump(title, out)
        except OSError:
            _dump(title, sys.__stderr__ or sys.stderr)
        self._dump_flight_record()

    def _dump_flight_record(self) -> None:
        """NCCL's last collectives, where there are any."""
        c10d = sys.modules.get("torch._C._distributed_c10d")
        torch = sys.modules.get("torch")
        take = getattr(c10d, "_dump_nccl_trace_json", None)
        if take is None or torch is None or not torch.cuda.is_initialized() or not self._attempt:
            return

        def write() -> None:
            record = json.loads(take())
            path = self._stacks.with_suffix(".nccl.json")
            path.write_text(json.dumps(record, indent=1) + "\n")

        writer = threading.Thread(target=write, daemon=True)  # NCCL may hold a lock for ever
        writer.start()
        writer.join(_LINGER_SECONDS)


def _dump(title: str, out: Any) -> None:
    out.write(title.rstrip() + "\n")
    out.flush()
    faulthandler.dump_traceback(out, all_threads=True)
    out.write("\n")
    out.flush()


def _wait_for(path: Path, seconds: float) -> None:
    patience = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < patience:
        time.sleep(0.05)
