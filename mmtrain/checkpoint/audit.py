"""Every committed checkpoint of a run, file by file: what `mmtrain check RUN` prints."""

from pathlib import Path

from mmtrain.checkpoint import store
from mmtrain.errors import ContentError, MissingError


def audit(run: Path) -> None:
    """Print one line a checkpoint, and what is wrong with it.

    Raises:
        MissingError: the run has no committed checkpoint.
        ContentError: one is damaged.
    """
    found = store.committed(run / "checkpoints")
    if not found:
        raise MissingError(f"{run}: no committed checkpoint in {run / 'checkpoints'}")
    damaged = 0
    for folder in found:
        faults = list(store.faults(folder))
        damaged += bool(faults)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder.name}  {size / 1e6:12,.1f} MB  {'damaged' if faults else 'sound'}")
        for fault in faults:
            print(f"  {fault}")
    if damaged:
        raise ContentError(
            f"{run}: {damaged} of {len(found)} checkpoint(s) damaged; training goes on from the "
            "newest sound one"
        )
