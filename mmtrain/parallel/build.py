"""From a list of layers to this rank's modules: meta, shard, fill, recompute, or a pipeline stage.

Never more than one full layer is in memory: each is built on the meta device, swapped by the
tensor plan, its slices filled, and under ZeRO-3 partitioned before the next one is begun.

The only file that makes DeepSpeed `LayerSpec`s. DeepSpeed facts the code leans on (0.19.8):
every float of a boundary tuple must receive a gradient (runtime/pipe/engine.py), so one float
crosses; stages must have the same optimizer groups (the norm is reduced group by group), which
`train.optim` cares for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtrain.layout.plan import TensorPlan
from mmtrain.nn.attention import HeadAttention
from mmtrain.nn.flow import Flow
from mmtrain.parallel.mesh import Mesh
from mmtrain.parallel.shard import (
    Initial,
    Source,
    TensorRanks,
    fill_weights,
    sum_partial_gradients,
    swap_layers,
)

Builder = tuple[str, Callable[[], nn.Module]]  # canonical prefix, build on the meta device


@dataclass(frozen=True, kw_only=True)
class Construction:
    """How every layer of a run is made.

    Attributes:
        plan: the family's tensor plan.
        initial: (name, full shape) -> full tensor.
        fields: names of the flow's integer fields.
        is_trained: canonical name -> whether the parameter gets gradients.
        recomputed: canonical layer name -> whether its activations are computed again.
        sequence: whether trunk rows are split over the tensor ranks.
        partition: whether weights are partitioned over data ranks at once (ZeRO-3).
        dtype: of weights and activations; ZeRO-3 would keep what it partitions as it finds it.
    """

    plan: TensorPlan
    initial: Initial
    fields: tuple[str, ...]
    is_trained: Callable[[str], bool]
    recomputed: Callable[[str], bool]
    sequence: bool
    partition: bool
    dtype: torch.dtype

    def build(self, layer: Builder, mesh: Mesh) -> nn.Module:
        """This rank's part of one layer, filled and on its device."""
        name, builder = layer
        ranks = TensorRanks(mesh.tensor_group, self.sequence and mesh.dims.tensor > 1)
        with torch.device("meta"):
            module = builder()
            shapes = {f"{name}.{k}": tuple(p.shape) for k, p in module.named_parameters()}
            if ranks.count > 1:
                swap_layers(module, name, self.plan, ranks)
        source = Source(self.initial, mesh.device, self.dtype)
        fill_weights(module, name, shapes, self.plan, ranks, source)
        for local, parameter in module.named_parameters():
            parameter.requires_grad_(self.is_trained(f"{name}.{local}"))
        if ranks.count > 1:
            sum_partial_gradients(module, name, self.plan, ranks)
        if self.recomputed(name):
            module = Recomputed(module)
        return Partitioned(module, mesh) if self.partition else module


class Recomputed(nn.Module):
    """A layer whose activations are dropped and computed again in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        """Wrap `layer`."""
        super().__init__()
        self.layer = layer

    def forward(self, flow: Flow) -> Flow:
        """Run the layer under non-reentrant checkpointing; random state is not needed."""
        out: Flow = checkpoint(self.layer, flow, use_reentrant=False, preserve_rng_state=False)
        return out


class Partitioned(nn.Module):
    """A layer whose weights are partitioned over the data ranks (ZeRO-3).

    DeepSpeed's hooks see tensors, tuples and dictionaries only (parameter_offload.py,
    `apply_to_tensors_only`, 0.19.8): a layer that takes and gives a `Flow` would not get the
    parameters that it owns directly back for the backward pass. So they are external parameters
    of this wrapper, whose output shows the hidden states beside the flow. Its input shows none:
    they would be released when the input's gradient is there, which for learned queries is too
    early. What stays gathered until the step ends is small (positions, queries, one norm).
    ZeRO-3 "leaf" modules are no way out: their gradients are collected just as early, and lost.
    """

    def __init__(self, layer: nn.Module, mesh: Mesh) -> None:
        """Wrap `layer` and partition its parameters at once."""
        super().__init__()
        self.layer = layer
        deepspeed.zero.Init(module=layer, data_parallel_group=mesh.data_group)
        inner = layer.layer if isinstance(layer, Recomputed) else layer
        for parameter in inner.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(self, parameter)
        for module in inner.modules():
            if isinstance(module, HeadAttention):  # it may read them without calling the norms
                for parameter in module.read_directly():
                    deepspeed.zero.register_external_parameter(module, parameter)

    def forward(self, flow: Flow) -> Any:
        """A flow with its hidden states beside it, or the last layer's losses."""
        out = self.layer(flow)
        return (out.hidden, out) if isinstance(out, Flow) else out


def run_layer(layer: nn.Module, flow: Flow) -> Any:
    """One layer of the fold: a flow, or the last layer's losses."""
    out = layer(flow)
    return out[1].with_hidden(out[0]) if isinstance(out, tuple) else out


def canonical_parameters(layers: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, parameter) of built layers; wrappers leave no trace in a name."""
    for name, module in layers:
        while isinstance(module, Partitioned | Recomputed):
            module = module.layer
        for local, parameter in module.named_parameters():
            yield f"{name}.{local}", parameter


class Fold(nn.Module):
    """The whole model on one stage: its forward is the fold of the layer list."""

    def __init__(self, layers: list[Builder], construction: Construction, mesh: Mesh) -> None:
        """Build every layer."""
        super().__init__()
        self.names = tuple(name for name, _ in layers)
        self.layers = nn.ModuleList(construction.build(layer, mesh) for layer in layers)

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """(canonical prefix, module) in order."""
        return list(zip(self.names, self.layers, strict=True))

    def forward(self, flow: Any) -> Any:
        """Input flow to `{loss name: values}`."""
        for layer in self.layers:
            flow = run_layer(layer, flow)
        return flow


class _Part(LayerSpec):  # type: ignore[misc]
    """A layer that is built only on the stage that owns it."""

    def __init__(self, layer: Builder, construction: Construction, mesh: Mesh) -> None:
        # not calling LayerSpec.__init__: it wants a class and its arguments
        self.layer, self.construction, self.mesh = layer, construction, mesh
        self.typename, self.module_args = nn.Module, ()
        self.module_kwargs: dict[str, Any] = {}

    def __repr__(self) -> str:
        return self.layer[0]

    def build(self, log: bool = False) -> nn.Module:
        return self.construction.build(self.layer, self.mesh)


class Stage(PipelineModule):  # type: ignore[misc]
    """One pipeline stage: layers `bounds[i] .. bounds[i + 1]` of the list.

    Args:
        layers: the whole list.
        construction: how layers are made.
        mesh: this rank's place.
        bounds: first layer of every stage, then the number of layers.
    """

    def __init__(
        self,
        layers: list[Builder],
        construction: Construction,
        mesh: Mesh,
        bounds: tuple[int, ...],
    ) -> None:
        """Build this stage's layers."""
        self._bounds = bounds
        self.fields = construction.fields
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.dims.pipeline, num_dp=mesh.dims.data, num_mp=mesh.dims.tensor
        )
        super().__init__(
            layers=[_Part(layer, construction, mesh) for layer in layers],
            topology=topology,
        )
        self.names = tuple(
            name for name, _ in layers[bounds[mesh.pipeline] : bounds[mesh.pipeline + 1]]
        )
        self.is_last = mesh.is_last_stage

    def _partition_layers(self, method: Any = None) -> None:
        """Take the given bounds instead of DeepSpeed's own balance."""
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = list(self._bounds)
        self._set_bounds(start=self._bounds[stage], stop=self._bounds[stage + 1])

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """(canonical prefix, module) of this stage in order."""
        return list(zip(self.names, self.forward_funcs, strict=True))

    def forward(self, packed: tuple[Tensor, ...]) -> Any:
        """Boundary tuple in; boundary tuple out, or the unreduced losses on the last stage."""
        flow = Flow.unpack(packed, self.fields)
        for layer in self.forward_funcs:
            flow = layer(flow)
        if self.is_last:
            return flow
        if torch.is_grad_enabled() and not flow.hidden.requires_grad:
            # a frozen stage: the next one sends a gradient back all the same
            flow = flow.with_hidden(flow.hidden.detach().requires_grad_())
        return flow.pack()
