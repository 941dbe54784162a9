"""Ways to make a phase of a run last; called in the rank before its command.

Each says that it has begun by a file `begun-<phase>.<rank>` in the folder the rank was started in.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

from mmtrain import run
from mmtrain.checkpoint import store
from mmtrain.data.loader import Loader
from mmtrain.evaluate import session
from mmtrain.train.engine import FoldEngine

PHASES: dict[str, tuple[Any, str]] = {
    "setup": (run, "read_setting"),
    "data": (Loader, "step"),
    "forward": (FoldEngine, "train_step"),
    "save": (store, "write_part"),
    "evaluate": (session, "ask_all"),
}


def phase(rank: int, word: str) -> None:
    """`phase number seconds how`: its N-th call begins with so many seconds, of one kind.

    `sleep` is ordinary waiting, `lock` keeps the interpreter lock, `raise` fails afterwards.
    """
    name, number, seconds, how = word.split()
    owner, function = PHASES[name]
    plain, calls = getattr(owner, function), 0

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number):
            Path(f"begun-{name}.{rank}").touch()
            if how == "lock":
                ctypes.PyDLL(None).sleep(int(seconds))
            patience = time.monotonic() + float(seconds)
            while time.monotonic() < patience:
                time.sleep(0.05)
            if how == "raise":
                raise ZeroDivisionError("made to fail")
        return plain(*args, **kwargs)

    setattr(owner, function, slow)


def phase_on(rank: int, word: str) -> None:
    """The same on one rank: `rank phase number seconds how`."""
    chosen, _, rest = word.partition(" ")
    if rank == int(chosen):
        phase(rank, rest)
