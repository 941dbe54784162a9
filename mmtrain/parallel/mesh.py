"""Ranks and their groups: tensor fastest, then data, then pipeline.

The only file that touches Megatron-core's `parallel_state`. Its rank order `tp-cp-ep-dp-pp`
equals DeepSpeed's `(pipe, data, model)`, so both libraries agree on every group (design law).
Ranks come from the environment (`layout.ranks`).
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mmtrain.layout.dims import ParallelDims
from mmtrain.layout.ranks import launched


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout, its device and its groups.

    Attributes:
        pipeline: stage of this rank.
        data: data rank: which share of the global batch it reads.
        tensor: tensor rank: which slice of each layer it holds.
        tensor_group: ranks that share layers.
        data_group: ranks with the same slices of the same stage.
        device: where weights live.
    """

    dims: ParallelDims
    rank: int
    pipeline: int
    data: int
    tensor: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank reads pixels."""
        return self.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the losses."""
        return self.pipeline == self.dims.pipeline - 1

    def sum_over_world(self, values: Tensor) -> Tensor:
        """Sum a host tensor over all ranks; returned on the host."""
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.cpu()

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum a host tensor over the data ranks; returned on the host."""
        moved = values.to(self.device)
        dist.all_reduce(moved, group=self.data_group)
        return moved.cpu()

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, in their order, on every rank; plain data of a few kilobytes."""
        out: list[Any] = [None] * self.dims.world_size
        dist.all_gather_object(out, value)
        return out

    def any_rank(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.sum_over_world(torch.tensor([float(flag)])).item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum_over_world(torch.zeros(1))

    def patient_barrier(self, timeout_seconds: float) -> Callable[[], None]:
        """A barrier that may last longer than collectives do; making it is a collective itself."""
        made = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        group = cast(dist.ProcessGroup, made)  # every rank is in it

        def wait() -> None:
            dist.barrier(group)

        return wait


class ModelParallelUnit:
    """What DeepSpeed asks of an `mpu`; `parallel_state` itself lacks two of the nine getters."""

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        """Ranks that hold one copy of the model together."""
        group: dist.ProcessGroup = parallel_state.get_model_parallel_group()
        return group

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Size of the model-parallel group."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        """Rank in the model-parallel group."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        """Ranks that hold the same slices."""
        group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
        return group

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """Number of data ranks."""
        return int(parallel_state.get_data_parallel_world_size())

    @staticmethod
    def get_data_parallel_rank() -> int:
        """This rank's data rank."""
        return int(parallel_state.get_data_parallel_rank())


def _complete_environment() -> None:
    """Fill in the variables torch and DeepSpeed read, from Slurm or for a single process."""
    place = launched(os.environ)
    os.environ["RANK"] = str(place.rank)
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    os.environ["WORLD_SIZE"] = str(place.world_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:  # a free port; only a lone process gets here
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


@contextmanager
def open_mesh(dims: ParallelDims, timeout_seconds: float) -> Iterator[Mesh]:
    """Start the process group and both libraries' groups; destroy them on the way out.

    Args:
        dims: the layout; must fit the world size.
        timeout_seconds: after which a collective that waits for a peer fails.
    """
    _complete_environment()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        if not cuda:
            # DeepSpeed would compile a shared-memory extension (84 s, and a stale lock of a killed
            # build hangs every later start); gloo serves without it
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=dims.tensor,
            pipeline_model_parallel_size=dims.pipeline,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        )
        rank = dist.get_rank()
        pipeline, data, tensor = dims.coord(rank)
        seen: tuple[Any, ...] = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        assert seen == (pipeline, data, tensor), (seen, pipeline, data, tensor)
        yield Mesh(
            dims=dims,
            rank=rank,
            pipeline=pipeline,
            data=data,
            tensor=tensor,
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            data_group=parallel_state.get_data_parallel_group(),
            device=torch.device("cuda", torch.cuda.current_device())
            if cuda
            else torch.device("cpu"),
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
