"""Log lines: one event with its numbers, `step 1200 loss 2.314 grad 0.91 tokens/s 412k`.

Every room logs through `logging.getLogger(__name__)`; this file decides once where lines go.
Rank 0 writes to the terminal and, in more detail, to the run's `log.txt`; other ranks only warn.
"""

import logging
import sys
import warnings
from pathlib import Path

ROOT = "mmtrain"
FILE = "log.txt"  # in the run's folder
# engines that report their own start-up at length on every rank
_TALKATIVE = ("DeepSpeed", "megatron", "streaming", "transformers", "torch.distributed")


def start(rank: int, world_size: int = 1) -> None:
    """Send the log to the terminal; call it once, before the heavy imports."""
    root = logging.getLogger(ROOT)
    root.setLevel(logging.DEBUG if rank == 0 else logging.WARNING)
    root.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    # a filter, not a level: the progress bar's handler takes over filters alone
    handler.addFilter(lambda record: record.levelno >= logging.INFO)
    handler.setFormatter(_format(rank, world_size))
    root.handlers[:] = [handler]


def add_file(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Send the log to a file too, after what it holds already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_format(rank, world_size))
    logging.getLogger(ROOT).addHandler(handler)


def quiet_imports() -> None:
    """Drop what the engines say about optional parts while they are imported; call it before."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA toolkit
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")


def quiet_engines() -> None:
    """Keep only warnings of the engines; call it after they are imported, they set levels then."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def _format(rank: int, world_size: int) -> logging.Formatter:
    where = f" rank {rank}" if world_size > 1 else ""
    return logging.Formatter(f"%(asctime)s{where} %(message)s", "%H:%M:%S")
