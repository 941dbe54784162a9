"""What the kernel does with this process: it dies with its parent, and it leaves in time.

Launchers lose ranks: torchrun and the deepspeed launcher leave theirs behind when they are killed
(both on SIGKILL, deepspeed's inner launcher on SIGUSR1 too). So a rank asks to be killed when its
parent dies (prctl(2), PR_SET_PDEATHSIG), and so does a data worker. On other systems than Linux
nothing is asked of the kernel.
"""

import atexit
import ctypes
import faulthandler
import functools
import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2
_DEEPSPEED = "deepspeed"
_IMPORTED = time.monotonic()


class StartUp:
    """Where the time from the start of this process to its first step goes."""

    def __init__(self) -> None:
        """What lies before is the first phase, of imports."""
        self._seconds: dict[str, float] = {}
        self._last = 0.0
        self.passed("imports")

    def passed(self, phase: str) -> None:
        """End a phase, which began where the one before ended."""
        now = _age_seconds()
        self._seconds[phase] = now - self._last
        self._last = now

    def __str__(self) -> str:
        """As in `7.2 s after its start: imports 5.9, groups 0.4`."""
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._seconds.items())
        return f"{self._last:.1f} s after its start: {phases}"


def _age_seconds() -> float:
    """Since this process was started (proc(5), field 22); since its imports elsewhere."""
    if sys.platform != "linux":
        return time.monotonic() - _IMPORTED
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def die_with_parent() -> None:
    """Be killed when the process that started this one ends; at once, if it just has."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(128 + signal.SIGKILL)


def become_worker(number: int) -> None:
    """Make a data worker of this forked process (`worker_init_fn` of a DataLoader).

    Signals go to every process of a job; what they ask for is the rank's matter, which needs its
    workers until the step is done.
    """
    del number
    die_with_parent()
    rank = multiprocessing.parent_process()
    if rank is not None and os.getppid() != rank.pid:
        os._exit(128 + signal.SIGKILL)
    for asked in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(asked, signal.SIG_IGN)
    # the real one: what stands in its place may have no descriptor
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__ or sys.stderr, all_threads=True)


@functools.cache
def kill_workers_at_exit() -> None:
    """Kill what is left of the data workers at exit.

    They ignore the SIGTERM with which multiprocessing would end them before it waits for them.
    """
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    # torch's handler raises at the death of a worker (utils/data/_utils/signal_handling.py)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


class OuterLauncher:
    """The first of the two processes of the deepspeed launcher, which start each other.

    Ended by a signal, it leaves the second one and its ranks behind: on one node it passes none on
    (deepspeed 0.19.8, launcher/runner.py, line 630).
    """

    def __init__(self) -> None:
        """Look who started the parent of this process."""
        self._parent = os.getppid()
        grandparent = _parent_of(self._parent)
        both = _DEEPSPEED in _command(self._parent) and _DEEPSPEED in _command(grandparent)
        self._seen = grandparent if both else 0

    @property
    def is_gone(self) -> bool:
        """Whether it was there and has ended."""
        return self._seen != 0 and _parent_of(self._parent) != self._seen


def _parent_of(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[1])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


class _Event(ctypes.Structure):
    """`struct sigevent` of glibc on 64-bit Linux."""

    _fields_ = (
        ("value", ctypes.c_size_t),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    )


class ExitTimer:
    """Ends the process with an exit code at a time, even where no Python code can run.

    A thread that keeps the interpreter lock (a compiled loop, a driver call) stops every Python
    thread. glibc's timer thread calls `_exit` itself and needs no lock.
    """

    def __init__(self, code: int) -> None:
        """Make the timer; it does not run yet."""
        self._timer = ctypes.c_void_p()
        if sys.platform != "linux":
            return
        self._c = ctypes.CDLL(None, use_errno=True)
        leave = ctypes.cast(self._c._exit, ctypes.c_void_p).value
        event = _Event(value=code, notify=_SIGEV_THREAD, function=leave)
        if self._c.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def start(self, seconds: float) -> None:
        """End the process in so many seconds, instead of at the time set before; 0 = never."""
        if sys.platform != "linux":
            return
        whole = int(seconds)
        times = (ctypes.c_long * 4)(0, 0, whole, int((seconds - whole) * 1e9))
        if self._c.timer_settime(self._timer, 0, ctypes.byref(times), None):
            raise OSError(ctypes.get_errno(), "timer_settime")
