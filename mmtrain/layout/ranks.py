"""Which rank this process is, read from what its launcher set.

torchrun and the deepspeed launcher set RANK and WORLD_SIZE. Under `srun` the SLURM_* variables
stand in; a batch script or an interactive shell inside an allocation has them too (SLURM_PROCID
is 0 there), so they count only inside a step that `srun` started (SLURM_STEP_ID below the
reserved numbers, slurm.h: SLURM_MAX_NORMAL_STEP_ID).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_RESERVED_STEPS = 0xFFFFFFF0  # batch, extern, interactive and pending steps lie above


@dataclass(frozen=True)
class Launched:
    """Place of a process among those started together, and whether a launcher started it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    by_launcher: bool = field(default=False, compare=False)


def launched(environment: Mapping[str, str]) -> Launched:
    """Read the launcher's variables; a process without a launcher is rank 0 of 1."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif 0 <= int(environment.get("SLURM_STEP_ID", "-1")) < _RESERVED_STEPS:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    else:
        return Launched()
    rank, local_rank, world_size = (int(environment.get(name, "0")) for name in names)
    return Launched(rank, local_rank, max(1, world_size), by_launcher=True)
