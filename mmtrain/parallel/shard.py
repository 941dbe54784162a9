"""Tensor parallelism as data: swap the layers that a plan names for Megatron-core's.

The only file that builds Megatron-core layers. A module entered by column layers has an
`Identity` named by an ENTER cut: it sums input gradients once for all of them, so the column
layers themselves communicate nothing (`disable_grad_reduce`). Head counts are read off local
widths, so the same forward serves every degree.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from mmtrain.layout.plan import Cut, Slice, TensorPlan
from mmtrain.nn.init import take_slice
from mmtrain.nn.lora import HashedDropout
from mmtrain.nn.objectives import IGNORED
from mmtrain.parallel.rows import gather_features, gather_rows, reduce_scatter_rows, split_rows

Initial = Callable[[str, tuple[int, ...]], Tensor]  # (name, full shape) -> full tensor


@dataclass(frozen=True)
class TensorRanks:
    """The tensor group of this rank and whether trunk rows are split over it."""

    group: dist.ProcessGroup
    sequence: bool

    @property
    def count(self) -> int:
        """Number of tensor ranks."""
        return int(self.group.size())

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return int(self.group.rank())


@dataclass(frozen=True)
class Source:
    """Where weights come from and what becomes of them."""

    initial: Initial
    device: torch.device
    dtype: torch.dtype


def _config(count: int) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=count,
        use_cpu_initialization=True,
        perform_initialization=False,  # weights are drawn by name
        params_dtype=torch.get_default_dtype(),
    )


class Column(ColumnParallelLinear):  # type: ignore[misc]
    """Output features are split; the ENTER module before it sums the input's gradient."""

    def __init__(self, plain: nn.Linear, ranks: TensorRanks, outputs: int) -> None:
        """Take the sizes of `plain`, with `outputs` (padded) rows."""
        super().__init__(
            plain.in_features,
            outputs,
            config=_config(ranks.count),
            init_method=lambda weight: weight,
            bias=plain.bias is not None,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=ranks.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] -> [..., out / n]`."""
        out: Tensor = super().forward(x)[0]
        return out


class ColumnGathered(Column):
    """COLUMN with its output gathered to full width on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`."""
        return gather_features(super().forward(x), self.tp_group)


class VocabColumn(Column):
    """Logits of this rank's part of the vocabulary; padding columns are minus infinity."""

    def __init__(self, plain: nn.Linear, ranks: TensorRanks) -> None:
        """Pad the vocabulary to a multiple of the ranks."""
        local = Slice(0, padded=True).local_length(plain.out_features, ranks.count)
        super().__init__(plain, ranks, local * ranks.count)
        self.valid = max(0, min(local, plain.out_features - ranks.rank * local))

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D] -> [T, V / n]`."""
        logits = super().forward(x)
        if self.valid == logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self.valid
        return logits.masked_fill(padding, float("-inf"))


class Row(RowParallelLinear):  # type: ignore[misc]
    """Input features are split; outputs are summed over the ranks."""

    def __init__(self, plain: nn.Linear, ranks: TensorRanks) -> None:
        """Take the sizes of `plain`."""
        super().__init__(
            plain.in_features,
            plain.out_features,
            config=_config(ranks.count),
            init_method=lambda weight: weight,
            bias=plain.bias is not None,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=ranks.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in / n] -> [..., out]` on every rank."""
        out: Tensor = super().forward(x)[0]
        return out


class RowScattered(nn.Module):
    """ROW with its sum split by rows: `[R, in / n] -> [R / n, out]`."""

    def __init__(self, plain: nn.Linear, ranks: TensorRanks) -> None:
        """Take the sizes of `plain`; it must have no bias."""
        super().__init__()
        assert plain.bias is None, "a bias would need its gradient summed over row parts"
        local = plain.in_features // ranks.count
        self.weight: nn.Parameter = nn.Parameter(torch.empty(plain.out_features, local))
        self.group: dist.ProcessGroup = ranks.group

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, then reduce-scatter over rows."""
        return reduce_scatter_rows(nn.functional.linear(x, self.weight), self.group)


class VocabEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Token table with its rows split and padded to a multiple of the ranks."""

    def __init__(self, plain: nn.Embedding, ranks: TensorRanks) -> None:
        """Take the sizes of `plain`."""
        local = Slice(0, padded=True).local_length(plain.num_embeddings, ranks.count)
        super().__init__(
            local * ranks.count,
            plain.embedding_dim,
            init_method=lambda weight: weight,
            config=_config(ranks.count),
            tp_group=ranks.group,
        )


class VocabCrossEntropy(nn.Module):
    """Token cross-entropy over logits whose vocabulary is split."""

    def forward(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        """`[T, V / n]`, `[T]` -> float32 `[T]`, 0 where the label is ignored."""
        ignored = labels_T == IGNORED
        # clone: Megatron-core subtracts the maximum in place, also from float32 input
        losses: Tensor = vocab_parallel_cross_entropy(
            logits_TV.float().clone(), labels_T.masked_fill(ignored, 0)
        )
        return losses.masked_fill(ignored, 0.0)


class Enter(nn.Module):
    """Entry of a parallel region: identity forward, gradient summed over the ranks."""

    def __init__(self, ranks: TensorRanks) -> None:
        """Remember the group."""
        super().__init__()
        self.group = ranks.group

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        out: Tensor = copy_to_tensor_model_parallel_region(x, group=self.group)
        return out


class GatherRows(Enter):
    """Entry of a parallel region from split rows: `[R / n, D] -> [R, D]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Gather rows; the gradient is summed and split."""
        return gather_rows(x, self.group)


class SplitRows(Enter):
    """Where rows are split: `[R, D] -> [R / n, D]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep this rank's rows."""
        return split_rows(x, self.group)


def _replacement(cut: Cut, plain: nn.Module, ranks: TensorRanks) -> nn.Module:
    """The parallel module that stands for `plain`."""
    match cut, plain:
        case Cut.COLUMN, nn.Linear():
            return Column(plain, ranks, plain.out_features)
        case Cut.COLUMN_GATHERED, nn.Linear():
            return ColumnGathered(plain, ranks, plain.out_features)
        case Cut.VOCAB_COLUMN, nn.Linear():
            return VocabColumn(plain, ranks)
        case Cut.ROW, nn.Linear():
            return Row(plain, ranks)
        case Cut.ROW_SCATTERED, nn.Linear():
            return RowScattered(plain, ranks) if ranks.sequence else Row(plain, ranks)
        case Cut.VOCAB, nn.Embedding():
            return VocabEmbedding(plain, ranks)
        case Cut.VOCAB_LOSS, _:
            return VocabCrossEntropy()
        case Cut.ENTER, nn.Identity():
            return Enter(ranks)
        case Cut.ENTER_ROWS, nn.Identity():
            return GatherRows(ranks) if ranks.sequence else Enter(ranks)
        case Cut.SCATTER_ROWS, nn.Identity():
            return SplitRows(ranks) if ranks.sequence else plain
        case Cut.CHANNELS, HashedDropout():
            return plain.part(ranks.rank, ranks.count)
        case ((Cut.SHARED | Cut.ROWWISE), _):
            return plain  # stays whole; `_sum_partial_gradients` sums its gradients
    raise TypeError(f"tensor plan: {cut} does not apply to {type(plain).__name__}")


def swap_layers(module: nn.Module, name: str, plan: TensorPlan, ranks: TensorRanks) -> None:
    """Replace the submodules of `module` (canonical prefix `name`) that the plan names."""
    for local, plain in list(module.named_modules()):
        cut = plan.cut(f"{name}.{local}")
        if not local or cut is None:
            continue
        parent, _, leaf = local.rpartition(".")
        setattr(module.get_submodule(parent), leaf, _replacement(cut, plain, ranks))


def fill_weights(
    module: nn.Module,
    name: str,
    shapes: dict[str, tuple[int, ...]],
    plan: TensorPlan,
    ranks: TensorRanks,
    source: Source,
) -> None:
    """Allocate every parameter of `module` and copy this rank's slice of the full tensor in.

    Args:
        module: built on the meta device, layers already swapped.
        name: canonical prefix.
        shapes: full shape of every parameter, by canonical name.
        plan: the family's table.
        ranks: the tensor group.
        source: gives the full tensor of a name.
    """
    for path, owner in module.named_modules():
        for leaf in list(owner._parameters):
            if owner._parameters[leaf] is None:
                continue
            fqn = ".".join(part for part in (name, path, leaf) if part)
            cut = plan.slice_of(fqn)
            full = source.initial(fqn, shapes[fqn])
            part = take_slice(full, cut, ranks.rank, ranks.count)
            parameter = nn.Parameter(part.to(source.device, source.dtype).contiguous().clone())
            if cut is not None and ranks.count > 1:
                # DeepSpeed counts parameters without this mark on tensor rank 0 alone when it
                # computes the gradient norm; Megatron-core leaves it unset without
                # perform_initialization (3.7858 instead of 4.5364 in the first trial)
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            owner._parameters[leaf] = parameter
    stray = [buffer for buffer, tensor in module.named_buffers() if tensor.is_meta]
    assert not stray, f"{name}: buffers {stray} have no values; compute tables in forward"


def sum_partial_gradients(
    module: nn.Module, name: str, plan: TensorPlan, ranks: TensorRanks
) -> None:
    """Sum over the ranks the gradients of whole parameters that each rank used on a part."""
    wanted = {Cut.SHARED} | ({Cut.ROWWISE} if ranks.sequence else set())

    def add_up(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ranks.group)
        return total

    for local, parameter in module.named_parameters():
        fqn = f"{name}.{local}"
        cuts = {plan.cut(fqn), plan.cut(fqn.rpartition(".")[0])}
        if cuts & wanted and parameter.requires_grad:
            parameter.register_hook(add_up)  # type: ignore[no-untyped-call]
