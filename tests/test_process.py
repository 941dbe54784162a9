"""Processes that end when they should."""

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_process_dies_with_its_parent() -> None:
    child = (
        "import os, time; from mmtrain.process import die_with_parent; die_with_parent()\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        stat = Path(f"/proc/{int(process.stdout.readline())}/stat")
        process.kill()
    patience = time.monotonic() + 5
    while stat.exists() and ") Z " not in stat.read_text() and time.monotonic() < patience:
        time.sleep(0.02)
    assert not stat.exists() or ") Z " in stat.read_text()


def test_a_timer_ends_a_process_that_keeps_the_interpreter_lock() -> None:
    code = (
        "import ctypes; from mmtrain.process import ExitTimer; timer = ExitTimer(86)\n"
        "timer.start(60); timer.start(0.3); ctypes.PyDLL(None).sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20, check=False)
    assert done.returncode == 86


def test_a_timer_that_was_stopped_ends_nothing() -> None:
    code = (
        "import time; from mmtrain.process import ExitTimer; timer = ExitTimer(86)\n"
        "timer.start(0.3); timer.start(0); time.sleep(0.6)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_signals_are_heard_before_anything_heavy_is_imported() -> None:
    code = (
        "import os, signal, sys, time; from mmtrain.train.signals import Listener\n"
        "heard = Listener(); os.kill(os.getpid(), signal.SIGTERM)\n"
        "while not heard.reason: time.sleep(0.01)\n"
        "print(heard.reason, [m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert done.stdout == f"{signal.SIGTERM.name} []\n"
