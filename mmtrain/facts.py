"""What a recipe amounts to, before anything runs: for `mmtrain check` and `mmtrain plan`.

Parameter counts are exact (meta tensors). Memory is an estimate: it says what kind of layout
fits, not the last GiB; allocator slack and communication buffers are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmtrain.layout.balance import balance, stage_ranges, table
from mmtrain.layout.dims import ParallelDims, dims_for
from mmtrain.layout.names import deciding
from mmtrain.models.census import (
    LayerCensus,
    count_by_part,
    forward_passes,
    local_count,
    take_census,
)
from mmtrain.models.families import spec_of
from mmtrain.models.spec import BatchShape, ModelSpec
from mmtrain.settings import Phase, Precision, Recipe, Recompute

GIB, MIB = 2.0**30, 2.0**20
_MASTER_AND_MOMENTS = 12  # bytes a trained number: float32 weight and two Adam moments


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Facts:
    """A recipe, counted.

    Attributes:
        recipe: the recipe.
        spec: its family.
        census: parameters of every layer.
        flops: forward floating-point operations of every layer for one micro-batch.
    """

    recipe: Recipe
    spec: ModelSpec
    census: list[LayerCensus]
    flops: list[float]

    @property
    def numbers(self) -> int:
        """Numbers in all parameters."""
        return sum(layer.count for layer in self.census)

    def is_trained(self, name: str) -> bool:
        """Whether the run trains a parameter."""
        return self.spec.is_trained(self.recipe.model, self.recipe.train.freeze, name)

    def is_recomputed(self, layer: str) -> bool:
        """Whether the activations of a layer are computed again in the backward pass."""
        # the head's forward is one product and the stem's one convolution: little to save there
        heavy = "blocks" in layer or layer == "causal"
        return heavy and self.recipe.parallel.recompute is Recompute.full

    def trained(self, layer: LayerCensus) -> dict[str, tuple[int, ...]]:
        """The parameters of a layer that are trained."""
        return {n: s for n, s in layer.shapes.items() if self.is_trained(n)}

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter that is trained, by canonical name."""
        return {n: s for layer in self.census for n, s in self.trained(layer).items()}

    @property
    def trained_numbers(self) -> int:
        """Numbers in the parameters that are trained."""
        return sum(map(_product, self.trained_shapes.values()))

    @cached_property
    def passes(self) -> list[float]:
        """Forward-sized passes of a step over each layer, without recomputation."""
        return forward_passes(self.census, self.is_trained)

    def bounds(self) -> tuple[int, ...]:
        """First layer of every stage but the first: as given, or balanced over a step's work."""
        given = self.recipe.parallel.bounds
        costs = [f * p for f, p in zip(self.flops, self.passes, strict=True)]
        return given or balance(costs, self.recipe.parallel.pipeline)

    def stages(self) -> dict[str, int]:
        """Pipeline stage of every parameter."""
        return {
            name: stage
            for stage, layers in enumerate(stage_ranges(len(self.census), self.bounds()))
            for layer in layers
            for name in self.census[layer].shapes
        }

    def memory(self, stage: int, dims: ParallelDims) -> Memory:
        """Estimate for one rank of a stage."""
        layers = stage_ranges(len(self.census), self.bounds())[stage]
        held = sum(local_count(self.spec, self.census[i].shapes, dims.tensor) for i in layers)
        trained = sum(
            local_count(self.spec, self.trained(self.census[i]), dims.tensor) for i in layers
        )
        width = bytes_per_number(self.recipe)
        shares = [dims.data if dims.zero_stage >= least else 1 for least in (3, 2, 1)]
        return Memory(
            weights=held * width / shares[0],
            gradients=trained * width / shares[1],
            optimizer=trained * _MASTER_AND_MOMENTS / shares[2],
            activations=self._activations(layers, stage, dims) * width,
        )

    def _activations(self, layers: range, stage: int, dims: ParallelDims) -> float:
        """Numbers kept for the backward pass: the input and output of every matrix.

        Nothing is kept below the first layer that is trained.
        With 1F1B, stage s of S keeps up to S - s micro-batches. Recomputation keeps the input of
        every layer, and one layer in full while its backward runs.
        """
        full = [
            self._kept(self.census[i], self.flops[i], dims.tensor)
            for i in layers
            if self.passes[i] > 1
        ]
        in_flight = min(dims.pipeline - stage, accumulation(self.recipe, dims.data))
        if self.recipe.parallel.recompute is Recompute.none:
            return in_flight * sum(both for _, both in full)
        return in_flight * sum(first for first, _ in full) + max(
            (both for _, both in full), default=0.0
        )

    def _kept(self, layer: LayerCensus, flops: float, tensor: int) -> tuple[float, float]:
        """Numbers in the input of a layer, and in the inputs and outputs of all its matrices."""
        matrices = {name: shape for name, shape in layer.shapes.items() if len(shape) >= 2}
        full = sum(_product(shape) for shape in matrices.values())
        if not full:
            return 0.0, 0.0
        rows = flops / (2.0 * full)
        both, first = 0.0, 0
        for name, shape in matrices.items():
            outputs, inputs = shape[0], _product(shape[1:])
            cut = self.spec.plan.slice_of(name) if tensor > 1 else None
            first = first or inputs
            both += inputs / (tensor if cut and cut.dim == 1 else 1)
            both += outputs / (tensor if cut and cut.dim == 0 else 1)
        return rows * first, rows * both


def collect(recipe: Recipe) -> Facts:
    """Count a recipe that has no faults."""
    spec = spec_of(recipe.family, recipe.phase)
    packs = recipe.train.micro_batch_packs
    shape = BatchShape(positions_of_a_pack(recipe) * packs, recipe.data.pack_images * packs)
    return Facts(recipe, spec, take_census(spec, recipe.model), spec.flops(recipe.model, shape))


def positions_of_a_pack(recipe: Recipe) -> int:
    """Rows that a pack gives the model; in the decoder phase the condition of one picture."""
    if recipe.phase is Phase.decoder:
        return int(recipe.model.conditions)
    return recipe.data.pack_tokens


def accumulation(recipe: Recipe, data_ranks: int) -> int:
    """Micro-batches of one optimizer step on one data rank."""
    return recipe.train.global_batch_packs // (recipe.train.micro_batch_packs * data_ranks)


def bytes_per_number(recipe: Recipe) -> int:
    """Bytes of a weight or an activation."""
    return 2 if recipe.train.precision is Precision.bf16 else 4


def describe(recipe: Recipe) -> str:
    """The resolved facts of a recipe, for `mmtrain check`."""
    facts = collect(recipe)
    parts = count_by_part(facts.census)
    layers = {part: _layers_of(facts.census, part) for part in parts}
    rows = [("part", "layers", "numbers", "trained", "learning rate")]
    rows += [
        (
            part,
            str(len(layers[part])),
            f"{count:,}",
            f"{sum(_product(s) for la in layers[part] for s in facts.trained(la).values()):,}",
            _rates(facts, layers[part]),
        )
        for part, count in parts.items()
    ]
    count = f"{facts.numbers:,}"
    rows.append(("total", str(len(facts.census)), count, f"{facts.trained_numbers:,}", ""))
    tensors = sum(len(layer.shapes) for layer in facts.census)
    return "\n".join(
        [
            _indent(table(rows)),
            "",
            f"  family {recipe.family}, {tensors:,} tensors, {recipe.train.precision.name}",
            f"  {_layout(recipe)}",
            f"  {_batch(recipe)}",
            f"  sources: {_mixture(recipe)}",
            f"  run folder: {Path(recipe.output) / recipe.name}",  # slurm/train.sbatch reads it
        ]
    )


def plan(recipe: Recipe, world_size: int) -> str:
    """Stages, memory and batch arithmetic on a number of ranks, for `mmtrain plan`."""
    facts, parallel = collect(recipe), recipe.parallel
    dims = dims_for(
        world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        zero_stage=parallel.zero_stage,
        sequence=parallel.sequence,
    )
    micro = accumulation(recipe, dims.data)
    micros = recipe.train.global_batch_packs / recipe.train.micro_batch_packs
    per_step = sum(facts.flops) * micros
    again = 0 if parallel.recompute is Recompute.none else 1
    done = sum(p * f for p, f in zip(facts.passes, facts.flops, strict=True))
    passes = again + done / sum(facts.flops)
    positions = positions_of_a_pack(recipe)
    tokens = recipe.train.global_batch_packs * positions
    lines = [
        f"{world_size} ranks = tensor {dims.tensor} x pipeline {dims.pipeline} x data {dims.data}; "
        f"{_layout(recipe)}",
        f"step: {recipe.train.global_batch_packs} packs = {dims.data} data ranks x {micro} "
        f"micro-batches x {recipe.train.micro_batch_packs} packs of {positions} "
        f"positions = {tokens:,} positions",
        f"work: {per_step * passes / 1e12:,.4g} TFLOP a step at most, {passes:.3g} passes "
        f"(forward, backward{', recomputation' if again else ''})",
        f"trained: {facts.trained_numbers:,} of {facts.numbers:,} numbers",
        f"bubble: {bubble(dims.pipeline, micro):.1%} of the time of a stage is waiting",
        "",
        _stages(facts, dims),
    ]
    return "\n".join(lines)


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a pipeline's time spent filling and draining (GPipe, arXiv:1811.06965, sec. 2.3)."""
    return (stages - 1) / (micro_batches + stages - 1)


def _stages(facts: Facts, dims: ParallelDims) -> str:
    ranges = stage_ranges(len(facts.census), facts.bounds())
    costs = [sum(facts.flops[i] for i in layers) for layers in ranges]
    memories = [facts.memory(stage, dims) for stage in range(len(ranges))]
    unit, size_of_unit = ("GiB", GIB) if max(m.total for m in memories) > GIB else ("MiB", MIB)
    heading = "stage layers first last numbers TFLOP share weights grads optim. activ. sum"
    rows: list[Sequence[str]] = [heading.split()]
    for stage, (layers, memory) in enumerate(zip(ranges, memories, strict=True)):
        local = sum(local_count(facts.spec, facts.census[i].shapes, dims.tensor) for i in layers)
        sizes = (
            memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total
        )  # fmt: skip
        rows.append(
            [
                str(stage),
                str(len(layers)),
                facts.census[layers[0]].name,
                facts.census[layers[-1]].name,
                f"{local:,}",
                f"{costs[stage] / 1e12:.3g}",
                f"{costs[stage] / sum(costs):.1%}",
                *(f"{size / size_of_unit:.2f}" for size in sizes),
            ]
        )
    note = f"numbers: per rank; TFLOP: forward, per micro-batch; weights to sum: {unit} per rank"
    return f"{table(rows)}\n\n{note} (estimate)"


def _layers_of(census: list[LayerCensus], part: str) -> list[LayerCensus]:
    return [layer for layer in census if layer.name.partition(".")[0] == part]


def _rates(facts: Facts, layers: list[LayerCensus]) -> str:
    """Peak learning rates met in some layers, `frozen` for parameters that are not trained."""
    optimizer = facts.recipe.optimizer
    met: dict[str, None] = {}
    for layer in layers:
        trained = facts.trained(layer)
        for name in layer.shapes:
            pattern = deciding(optimizer.learning_rates, name)
            rate = optimizer.learning_rates[pattern] if pattern else optimizer.learning_rate
            met[f"{rate:g}" if name in trained else "frozen"] = None
    return ", ".join(met)


def _layout(recipe: Recipe) -> str:
    parallel = recipe.parallel
    return (
        f"layout: tensor {parallel.tensor}, pipeline {parallel.pipeline}, ZeRO "
        f"{parallel.zero_stage}, sequence parallelism {'on' if parallel.sequence else 'off'}, "
        f"recomputation {parallel.recompute.name}"
    )


def _batch(recipe: Recipe) -> str:
    train, data = recipe.train, recipe.data
    if recipe.phase is Phase.decoder:
        return f"batch: {train.steps:,} steps of {train.global_batch_packs:,} pictures"
    return (
        f"batch: {train.steps:,} steps of {train.global_batch_packs} packs of {data.pack_tokens} "
        f"positions and up to {data.pack_images} images"
    )


def _mixture(recipe: Recipe) -> str:
    sources: dict[str, Any] = recipe.data.sources
    total = sum(source.weight for source in sources.values())
    shares = ", ".join(
        f"{name} {s.weight / total if total else 0:.1%} ({s.rule.name})"
        for name, s in sources.items()
    )
    changing = any(s.weight_steps for s in sources.values())
    return f"{shares}; of {recipe.data.weights_by.name}{', at step 0' if changing else ''}"


def _product(shape: Sequence[int]) -> int:
    out = 1
    for length in shape:
        out *= length
    return out


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
