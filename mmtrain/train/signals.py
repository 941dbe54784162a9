"""Requests from outside: SIGTERM, SIGUSR1, SIGINT and the time limit end a run after its step.

Signals only set a flag; the loop asks for it at the boundary of a step. USR2 dumps the stacks of
all threads. A third SIGTERM or SIGINT leaves at once. The kernel's wake-up pipe is read by a
thread, so that all this works while the main thread waits in a collective, where Python's own
handlers do not run. Nothing heavy is imported here: a rank listens before it imports torch.
"""

import contextlib
import faulthandler
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from time import monotonic, time
from types import FrameType

from mmtrain.process import OuterLauncher

log = logging.getLogger(__name__)

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_URGENT = (signal.SIGTERM, signal.SIGINT)
_AT_ONCE = 3  # so many urgent signals
# the deepspeed launcher makes up to four signals of one Ctrl-C, within 0.2 s
_BURST_SECONDS = 0.5
_LOOK_SECONDS = 1.0  # between looks at the launcher
_KILLED = 130


class Interrupted(BaseException):
    """A stop was asked for inside `Listener.interrupting`."""


def _dump_to_terminal() -> None:
    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)


class Listener:
    """Takes the signals of this process until it ends.

    Attributes:
        reason: who asked for the end of the run, or ''.
        dump: what SIGUSR2 does, in a thread of its own.
    """

    def __init__(self) -> None:
        """Install the handlers; main thread only."""
        self.reason = ""
        self.dump: Callable[[], None] = _dump_to_terminal
        self._interrupts = False
        self._urgent = 0
        self._counted = -_BURST_SECONDS
        self._deadline: float | None = None
        self._launcher = OuterLauncher()
        self._ears, mouth = os.pipe()
        os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_close_ears)
        for number in (*_STOPS, signal.SIGUSR2):
            signal.signal(number, self._handle)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def stop_before_limit(self, environment: Mapping[str, str], seconds: float) -> None:
        """Ask for the end of the run so long before the time limit of its Slurm job, if any."""
        ends = environment.get("SLURM_JOB_END_TIME", "")
        if not ends.isdecimal():
            return
        left = int(ends) - time()
        self._deadline = monotonic() + left - seconds
        log.info("the job's time ends in %.0f s; the run stops %.0f s before", left, seconds)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a stop break off what runs inside (main thread).

        Raises:
            Interrupted: a stop is asked for, or was before.
        """
        self._interrupts = True
        try:
            if self.reason:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler; the thread does the rest."""
        if self._interrupts and number in _STOPS:
            self._interrupts = False
            raise Interrupted

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._ears], [], [], _LOOK_SECONDS)
            for number in os.read(self._ears, 64) if ready else b"":
                self._take(number)
            if not self.reason and self._deadline is not None and monotonic() >= self._deadline:
                self._stop("the time limit of the job")
            if not self.reason and self._launcher.is_gone:
                self._stop("the death of the launcher")

    def _stop(self, reason: str) -> None:
        self.reason = reason
        log.info("%s: the step is finished and saved, then the run ends", reason)
        os.kill(os.getpid(), signal.SIGUSR1)  # breaks off what may be broken off

    def _take(self, number: int) -> None:
        if number == signal.SIGUSR2:
            self.dump()
        if number not in _STOPS:
            return
        name = signal.Signals(number).name
        if not self.reason:
            self.reason = name
            log.info("%s: the step is finished and saved, then the run ends", name)
        if number in _URGENT and monotonic() - self._counted >= _BURST_SECONDS:
            self._counted = monotonic()
            self._urgent += 1
            if self._urgent >= _AT_ONCE:
                log.warning("%s for the third time: leaving at once", name)
                os._exit(_KILLED)


def _close_ears() -> None:
    """A forked worker must not tell its rank of the worker's signals."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
