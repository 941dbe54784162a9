"""One optimizer step on DeepSpeed, with or without pipeline stages.

The only importer of `deepspeed.initialize`, and the only writer of its JSON: DeepSpeed ignores
unknown keys, so the JSON is made from typed fields alone.

Losses are exact means over the global batch: raw weights are divided by their sum over data
ranks and micro-batches, then multiplied by (data ranks x micro-batches) because DeepSpeed
averages gradients over both.
"""

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from mmtrain.data.batch import Batch
from mmtrain.parallel.build import Fold, Stage
from mmtrain.parallel.mesh import Mesh, ModelParallelUnit
from mmtrain.train.norms import GradientNorms
from mmtrain.train.state import LossSums, StepReport

Values = dict[str, Tensor]  # loss name -> unreduced losses


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What DeepSpeed is told."""

    zero_stage: int
    accumulation: int
    clip_norm: float
    bf16: bool
    losses: tuple[str, ...]
    loss_weights: dict[str, float]
    sources: int  # number of data sources, for sums by source

    def on_data_ranks(self, ranks: int) -> "EngineSettings":
        """The stage that does what this one asks for on `ranks` data ranks, without idle copies.

        On one data rank ZeRO-1 and 2 partition nothing, and copy all gradients three times: 80 ms
        of a step of 1,430 (25M parameters, fp32, one CPU thread). In bf16 they stay, because
        their float32 masters are wanted.
        """
        idle = ranks == 1 and self.zero_stage in (1, 2) and not self.bf16
        return replace(self, zero_stage=0) if idle else self

    @property
    def clips_here(self) -> bool:
        """Whether `train.norms` clips instead of DeepSpeed."""
        return self.zero_stage == 0 and not self.bf16

    def to_json(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # one packed micro-batch
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0 if self.clips_here else self.clip_norm,
            "bf16": {"enabled": self.bf16},
            "zero_optimization": {"stage": self.zero_stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
            # both default to True under tensor parallelism and would cut the boundary tensors
            "pipeline": {
                "pipe_partitioned": False,
                "grad_partitioned": False,
                "use_reentrant": False,
            },
        }


class Engine(Protocol):
    """What the loop knows of either engine."""

    deepspeed: Any
    norms: GradientNorms
    mesh: Mesh
    tally: "Tally"

    @property
    def model(self) -> nn.Module:
        """This rank's layers, as one module."""

    def global_loss(self) -> float:
        """Loss of the step in progress, before its optimizer step; a collective over all ranks."""

    def release(self) -> None:
        """Drop gathered copies of weights, which are about to be loaded."""

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """(canonical prefix, module) of this rank."""

    def train_step(self, batches: Sequence[Batch] | None, rates: float) -> StepReport:
        """One optimizer step; `batches` is None on stages that read no data."""

    def evaluate(self, batches: Sequence[Batch] | None, micro_batches: int) -> "Tally":
        """Losses of `micro_batches` micro-batches of each data rank, without training."""


class Tally:
    """Sums of losses over micro-batches, by loss and source, then over ranks."""

    def __init__(self, losses: tuple[str, ...], sources: int) -> None:
        """Start at zero."""
        self.losses = losses
        self.sums = torch.zeros(len(losses), sources, 2, dtype=torch.float64)
        self.facts = torch.zeros(4, dtype=torch.float64)  # tokens, images, documents, slots
        self.spoilt: list[bool] = []  # of each micro-batch: whether a loss is not finite

    def add_losses(self, values: Values, targets: "WeightedTargets") -> None:
        """Count one micro-batch on the rank that computed its losses."""
        self.spoilt.append(False)
        for row, name in enumerate(self.losses):
            mask = (targets.weights[name] != 0).double()
            total = values[name].detach().double() * mask
            origins = targets.origins[name]
            pair = torch.stack([total, mask], 1).cpu()
            self.sums[row].index_add_(0, origins.cpu(), pair)
            self.spoilt[-1] |= not bool(pair.isfinite().all())

    def add_facts(self, batches: Sequence[Batch]) -> None:
        """Count tokens and images on one rank of each data rank."""
        for batch in batches:
            info = batch.info
            documents = len(info.sample_ids)
            self.facts += torch.tensor([info.tokens, info.images, documents, info.slots])

    def sum_over_world(self, mesh: Mesh) -> None:
        """Add up all ranks; each count must have been made on one rank only."""
        flat = torch.cat([self.sums.flatten(), self.facts])
        flat = mesh.sum_over_world(flat)
        self.sums = flat[: self.sums.numel()].view_as(self.sums)
        self.facts = flat[self.sums.numel() :]

    def parts(self) -> dict[str, float]:
        """Mean of each loss; 0 where nothing was counted."""
        total, count = self.sums.sum(1).unbind(-1)
        means = (total / count.clamp_min(1)).tolist()
        return dict(zip(self.losses, means, strict=True))

    def means(self) -> dict[str, float]:
        """Mean of each loss that was counted at all."""
        counts = self.sums[..., 1].sum(1).tolist()
        parts = self.parts().items()
        return {name: mean for (name, mean), count in zip(parts, counts, strict=True) if count}

    def by_source(self) -> dict[tuple[str, int], LossSums]:
        """Sums of every (loss, source) that was counted."""
        return {
            (name, source): LossSums(total=total, count=count)
            for name, rows in zip(self.losses, self.sums.tolist(), strict=True)
            for source, (total, count) in enumerate(rows)
            if count
        }


@dataclass(frozen=True)
class WeightedTargets:
    """Targets with weights ready to be summed: normalised, and scaled per loss."""

    weights: dict[str, Tensor]
    origins: dict[str, Tensor]

    def pack(self, losses: tuple[str, ...]) -> tuple[Tensor, ...]:
        """The tuple DeepSpeed hands to the loss on the last stage."""
        return tuple(group[name] for name in losses for group in (self.weights, self.origins))

    @classmethod
    def unpack(cls, packed: Sequence[Tensor], losses: tuple[str, ...]) -> "WeightedTargets":
        """Undo `pack`."""
        weights = {name: packed[2 * i] for i, name in enumerate(losses)}
        origins = {name: packed[2 * i + 1] for i, name in enumerate(losses)}
        return cls(weights, origins)


class _Base:
    """What both engines share: normalised targets, tallies and reports."""

    deepspeed: Any

    def __init__(self, mesh: Mesh, settings: EngineSettings) -> None:
        self.mesh = mesh
        self.settings = settings
        self.tally = Tally(settings.losses, settings.sources)

    def weighted_sum(self, values: Values, targets: WeightedTargets) -> Tensor:
        """Scalar loss of one micro-batch; also counts it."""
        if self.mesh.tensor == 0:
            self.tally.add_losses(values, targets)
        total = torch.stack(
            [(targets.weights[name] * values[name]).sum() for name in self.settings.losses]
        ).sum()
        # an infinite loss can have finite gradients (cross-entropy of an infinite logit): with NaN
        # in them the gradient norm tells all ranks, without a collective more
        return total * torch.where(torch.isfinite(total.detach()), 1.0, float("nan"))

    def global_loss(self) -> float:
        """Loss of the step in progress, before its optimizer step; a collective over all ranks."""
        summed = Tally(self.settings.losses, self.settings.sources)
        summed.sums = self.mesh.sum_over_world(self.tally.sums)
        return self.total(summed.parts())

    def release(self) -> None:
        """Drop gathered copies of weights, which are about to be loaded."""
        if hasattr(self.deepspeed.optimizer, "parameter_offload"):  # ZeRO-3 keeps small ones
            self.deepspeed.optimizer.parameter_offload.partition_all_parameters()

    def normalise(self, batches: Sequence[Batch]) -> list[WeightedTargets]:
        """Divide raw weights by their sum over the global batch and scale each loss.

        A collective over the data ranks of a stage.
        """
        names = self.settings.losses
        counts = torch.tensor(
            [sum(float(b.targets.weights[n].sum()) for b in batches) for n in names],
            dtype=torch.float64,
        )
        counts = self.mesh.sum_over_data(counts)
        averaged = self.mesh.dims.data * self.settings.accumulation
        device = self.mesh.device
        scale = {
            name: self.settings.loss_weights[name] * averaged / max(count, 1.0)
            for name, count in zip(names, counts.tolist(), strict=True)
        }
        return [
            WeightedTargets(
                {n: (w * scale[n]).to(device) for n, w in batch.targets.weights.items()},
                {n: o.to(device) for n, o in batch.targets.origins.items()},
            )
            for batch in batches
        ]

    def new_tally(self, batches: Sequence[Batch] | None) -> None:
        """Begin a step: facts are counted where data is read first, by tensor rank 0."""
        self.tally = Tally(self.settings.losses, self.settings.sources)
        if batches is not None and self.mesh.is_first_stage and self.mesh.tensor == 0:
            self.tally.add_facts(batches)

    def total(self, parts: dict[str, float]) -> float:
        """Weighted sum of the parts."""
        return sum(self.settings.loss_weights[name] * value for name, value in parts.items())

    def report(self, started: float, norms: GradientNorms) -> StepReport:
        """Sum the tally over ranks and make the step's report."""
        self.tally.sum_over_world(self.mesh)
        parts = self.tally.parts()
        tokens, images, documents, slots = (int(x) for x in self.tally.facts.tolist())
        return StepReport(
            loss=self.total(parts),
            parts=parts,
            by_source=self.tally.by_source(),
            grad_norm=norms.total,
            module_norms=norms.by_layer,
            skipped=norms.skipped,
            tokens=tokens,
            images=images,
            documents=documents,
            slots=slots,
            seconds=time.perf_counter() - started,
            data_seconds=0.0,
        )


def _set_rates(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


class FoldEngine(_Base):
    """The whole model on every rank: data and tensor parallelism, ZeRO 0-3."""

    def __init__(
        self, model: Fold, optimizer: torch.optim.Optimizer, mesh: Mesh, settings: EngineSettings
    ) -> None:
        """Hand model and optimizer to DeepSpeed."""
        settings = settings.on_data_ranks(mesh.dims.data)
        super().__init__(mesh, settings)
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                mpu=ModelParallelUnit() if mesh.dims.tensor > 1 else None,
                config=settings.to_json(),
            )
        if mesh.dims.data == 1 and settings.clips_here:
            # as DeepSpeed's PipelineEngine does: it would be a sum over one rank, with two copies
            self.deepspeed.enable_backward_allreduce = False
        self.model = model
        self.norms = GradientNorms(self.deepspeed, self.named_layers(), mesh)

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """(canonical prefix, module) of this rank."""
        return self.model.named_layers()

    def train_step(self, batches: Sequence[Batch] | None, rates: float) -> StepReport:
        """One optimizer step over `accumulation` micro-batches."""
        assert batches is not None and len(batches) == self.settings.accumulation
        started = time.perf_counter()
        self.new_tally(batches)
        _set_rates(self.deepspeed.optimizer, rates)
        for batch, targets in zip(batches, self.normalise(batches), strict=True):
            loss = self.weighted_sum(self.deepspeed(batch.inputs.to(self.mesh.device)), targets)
            self.deepspeed.backward(loss)
            if self.settings.clips_here and self.deepspeed.is_gradient_accumulation_boundary():
                self.norms.clip_whole(self.settings.clip_norm)
            self.deepspeed.step()
        return self.report(started, self.norms)

    def evaluate(self, batches: Sequence[Batch] | None, micro_batches: int) -> Tally:
        """Losses of micro-batches without training, summed over all ranks."""
        assert batches is not None and len(batches) == micro_batches
        self.new_tally(batches)
        self.deepspeed.eval()
        with torch.no_grad():
            for batch in batches:
                values = self.deepspeed(batch.inputs.to(self.mesh.device))
                self.weighted_sum(
                    values, WeightedTargets(batch.targets.weights, batch.targets.origins)
                )
        self.deepspeed.train()
        self.tally.sum_over_world(self.mesh)
        return self.tally


class StageEngine(_Base):
    """Pipeline stages (ZeRO-1), each with tensor and data ranks."""

    def __init__(
        self, model: Stage, optimizer: torch.optim.Optimizer, mesh: Mesh, settings: EngineSettings
    ) -> None:
        """Hand stage and optimizer to DeepSpeed; it must get no `mpu`."""
        super().__init__(mesh, settings)
        model.loss_fn = self._loss
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings.to_json()
            )
        self.model = model
        self.norms = GradientNorms(self.deepspeed, self.named_layers(), mesh)

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """(canonical prefix, module) of this stage."""
        return self.model.named_layers()

    def _loss(self, values: Values, packed: Sequence[Tensor]) -> Tensor:
        return self.weighted_sum(values, WeightedTargets.unpack(packed, self.settings.losses))

    def _pairs(self, batches: Sequence[Batch] | None, targets: list[WeightedTargets]) -> Any:
        """What DeepSpeed reads: (input tuple, target tuple) of each micro-batch."""
        if batches is None:
            return None
        packed = [t.pack(self.settings.losses) for t in targets] or [()] * len(batches)
        return iter([(b.inputs.pack(), t) for b, t in zip(batches, packed, strict=True)])

    def train_step(self, batches: Sequence[Batch] | None, rates: float) -> StepReport:
        """One optimizer step; middle stages pass None."""
        started = time.perf_counter()
        self.new_tally(batches)
        _set_rates(self.deepspeed.optimizer, rates)
        last = self.mesh.is_last_stage
        targets = self.normalise(batches) if last and batches is not None else []
        self.deepspeed.train_batch(self._pairs(batches, targets))
        return self.report(started, self.norms)

    def evaluate(self, batches: Sequence[Batch] | None, micro_batches: int) -> Tally:
        """Losses of micro-batches without training, summed over all ranks."""
        self.new_tally(batches)
        device = self.mesh.device
        targets = [
            WeightedTargets(
                {n: w.to(device) for n, w in b.targets.weights.items()},
                {n: o.to(device) for n, o in b.targets.origins.items()},
            )
            for b in batches or ()
        ]
        self.deepspeed.eval_batch(
            self._pairs(batches, targets), num_micro_batches=micro_batches, compute_loss=True
        )
        self.tally.sum_over_world(self.mesh)
        return self.tally
