"""What went wrong on another rank: exceptions of the engines, and stacks, in our words."""

import os
import re
from pathlib import Path
from types import FrameType

from mmtrain.errors import ExitCode, MmtrainError

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# gloo, torch's store, NCCL: a socket that ended because the process behind it did
_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|socket closed|got 0 bytes|pair closure|"
    r"connection refused|remote process (exited|died)|not all ranks joined|ncclremoteerror",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed out|timeout", re.IGNORECASE)
_ENGINES = ("gloo", "nccl", "c10d", "tcpstore", "socket")


class PeerError(MmtrainError):
    """Another rank, or what connects it, is gone."""

    exit_code = ExitCode.PEER


class HangError(MmtrainError):
    """Nothing moves."""

    exit_code = ExitCode.HANG


def engine_fault(error: BaseException) -> type[PeerError] | type[HangError] | None:
    """What an exception of gloo, NCCL or torch's store means; None if it is not theirs."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        theirs = type(seen).__module__.startswith("torch") or (
            isinstance(seen, RuntimeError) and any(word in text.lower() for word in _ENGINES)
        )
        if theirs and _LOST.search(text):
            return PeerError
        if theirs and _LATE.search(text):
            return HangError
        seen = seen.__cause__ or seen.__context__
    return None


def outwards(frame: FrameType | None) -> list[FrameType]:
    """Frames from the innermost one on."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def waiting_in(frames: list[FrameType]) -> str:
    """The collective that the innermost frames are in, and who of ours called it."""
    ours = [_place(f) for f in frames if f.f_code.co_filename.startswith(_PACKAGE)][:3]
    called = f" called from {' < '.join(ours)}" if ours else ""
    for frame in frames:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if any(part in file for part in _COLLECTIVES):
            return f"in {frame.f_code.co_name} ({file.rpartition('/')[2]}){called}"
    if not frames:
        return "nowhere"
    return f"in {frames[0].f_code.co_name} ({_place(frames[0])}){called}"


def _place(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    short = file.removeprefix(_PACKAGE) if file.startswith(_PACKAGE) else Path(file).name
    return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"


def one_line(error: BaseException) -> str:
    """The first line of what an exception says; its name when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
