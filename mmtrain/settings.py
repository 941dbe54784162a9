"""Every key of a recipe, as frozen dataclasses: the schema, its defaults, its documentation.

`mmtrain.recipe` reads a YAML into a `Recipe` and checks spelling and types against this file;
`mmtrain.faults` checks what spans several keys. See `configs/emu/` for recipes. Low on purpose:
any room may name the section it works from.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mmtrain.data.rules import Rule


class Phase(Enum):
    """What a run trains: the phases of the published systems, one run each."""

    pretrain = "pretrain"  # everything, on interleaved documents
    instruct = "instruct"  # adapters on conversations; the loss counts answers alone
    decoder = "decoder"  # the visual decoder, on embeddings of a frozen model


class Precision(Enum):
    """Numbers of weights and activations; the optimizer's master weights are float32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """Which activations are computed again in the backward pass."""

    none = "none"
    full = "full"  # every transformer block


class Decay(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Implementation(Enum):
    """Which AdamW runs; `auto` takes apex, then torch fused, then plain torch."""

    auto = "auto"
    torch = "torch"
    torch_fused = "torch_fused"
    deepspeed = "deepspeed"
    apex = "apex"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data source: a folder of MDS shards with its index."""

    path: str  # local folder; with `remote`, the cache of its shards
    remote: str | None = None  # where shards are fetched from (s3://, gs://, https://, a folder)
    weight: float = 1.0  # share of documents drawn, relative to the other sources
    rule: Rule = Rule.document
    max_images: int = 5  # images (or frames) a sequence keeps
    max_tokens: int = 1024  # positions a sequence may take, image groups included
    image_first: float = 0.5  # probability that an image stands before its text


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from and how they are packed."""

    tokenizer: str = "???"  # a Hugging Face tokenizer folder
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    heldout: dict[str, SourceConfig] = field(
        default_factory=dict
    )  # for validation, never trained on
    pack_tokens: int = 2048  # positions of one pack
    pack_images: int = 8  # images of one pack at most
    window_documents: int = 1024  # documents packed together at a time (look-ahead)
    shuffle: bool = True
    workers: int = 2  # processes that decode images for each rank; 0 decodes in the rank
    decode_failures: float = 0.01  # share of bad samples beyond which a run stops
    learn_image_begin: bool = False  # learn to begin images ([IMG] is a label); off as published


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks; data ranks are what is left."""

    tensor: int = 1  # ranks that share one layer; must divide every head count
    pipeline: int = 1  # stages; above 1 requires zero_stage = 1
    zero_stage: int = 1  # DeepSpeed ZeRO: 0 replicates, 1 optimizer, 2 + gradients, 3 + weights
    sequence: bool = False  # split trunk rows over the tensor ranks (Megatron sequence parallelism)
    bounds: tuple[int, ...] = ()  # first layer of every stage but the first; empty = balanced
    recompute: Recompute = Recompute.none
    timeout_seconds: float = 600.0  # a collective that waits longer fails


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with learning rates and weight decay by name pattern."""

    learning_rate: float = 3e-5  # of every parameter no pattern names
    learning_rates: dict[str, float] = field(default_factory=dict)  # name pattern -> peak rate
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] = ()  # name patterns; vectors (norms, biases) are never decayed
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    implementation: Implementation = Implementation.auto


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over steps, as a factor of each peak rate."""

    warmup_steps: int = 2000
    decay: Decay = Decay.cosine
    final_ratio: float = 0.0  # of the peak, at the last step


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batch of the run."""

    steps: int = 10000
    global_batch_packs: int = 64  # packs of one optimizer step over all data ranks
    micro_batch_packs: int = 1  # packs of one forward pass on one rank
    precision: Precision = Precision.bf16
    loss_weights: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "image": 1.0})
    freeze: tuple[str, ...] = ()  # name patterns of parameters that are not trained
    initialize_from: str | None = None  # folder of full tensors (safetensors) by canonical name


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports, and how often."""

    every_steps: int = 1  # metrics.jsonl and TensorBoard scalars
    modules_every_steps: int = 50  # gradient norm per module; 0 = never
    images_every_steps: int = 500  # packed samples drawn with their text; 0 = never
    peak_tflops: float = 0.0  # per device, for MFU; 0 = look the device up, measure on a CPU


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Held-out loss per source."""

    every_steps: int = 500  # 0 = never
    packs: int = 64


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Checkpoints."""

    every_steps: int = 500  # 0 = only at the end
    keep: int = 3  # newest checkpoints kept


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole of a run."""

    name: str = "???"  # the run's folder below `output`
    family: str = "emu"
    phase: Phase = Phase.pretrain
    output: str = "runs"
    seed: int = 0
    model: Any = None  # the family's own dataclass
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
