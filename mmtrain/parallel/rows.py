"""Collectives over the tensor ranks with their gradients: gather, split, reduce-scatter.

Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) keeps norms and residuals of the
trunk on T / n rows. Own functions because Megatron-core 0.16.1 allocates the results of its
mappings on the current CUDA device (tensor_parallel/mappings.py:137), so they fail on a CPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def _gather(part: Tensor, group: Group) -> Tensor:
    whole = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _reduce_scatter(whole: Tensor, group: Group) -> Tensor:
    part = whole.new_empty((whole.shape[0] // group.size(), *whole.shape[1:]))
    dist.reduce_scatter_tensor(part, whole.contiguous(), group=group)
    return part


def _split(whole: Tensor, group: Group) -> Tensor:
    return whole.chunk(group.size())[group.rank()].contiguous()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(part, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradients[0], ctx.group), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(whole, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], ctx.group), None


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _split(whole, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], ctx.group), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(part.movedim(-1, 0), group).movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.group.size(), -1)[ctx.group.rank()].contiguous(), None


def gather_features(part: Tensor, group: Group) -> Tensor:
    """`[..., D / n]` -> `[..., D]`, used alike on every rank; each keeps its share of gradient."""
    out: Tensor = _GatherFeatures.apply(part, group)
    return out


def gather_rows(part: Tensor, group: Group) -> Tensor:
    """`[R / n, D]` -> `[R, D]` on every rank; gradients are summed and split."""
    out: Tensor = _GatherRows.apply(part, group)
    return out


def reduce_scatter_rows(whole: Tensor, group: Group) -> Tensor:
    """Sum `[R, D]` over the ranks and keep this rank's `[R / n, D]`."""
    out: Tensor = _ReduceScatterRows.apply(whole, group)
    return out


def split_rows(whole: Tensor, group: Group) -> Tensor:
    """Keep this rank's `[R / n, D]` of rows that every rank holds; gradients are gathered."""
    out: Tensor = _SplitRows.apply(whole, group)
    return out
