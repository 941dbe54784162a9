"""Every key of a recipe, as frozen dataclasses: the schema, its defaults, its documentation.

`mmtrain.recipe` reads a YAML into a `Recipe` and checks spelling and types against this file;
`mmtrain.faults` checks what spans several keys. See `configs/emu/` for recipes. Low on purpose:
any room may name the section it works from.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mmtrain.data.choices import Overlong, Packing, Resize, WeightsBy
from mmtrain.data.rules import Rule
from mmtrain.ops.select import Preference


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
    steps = "steps"  # `schedule.steps` says which factor holds from which step on


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
    weight: float = 1.0  # its share, relative to the other sources; see data.weights_by
    # optimizer step -> weight from there on, as in {10000: 0.5}; `weight` holds before
    weight_steps: dict[str, float] = field(default_factory=dict)
    epochs: float | None = None  # how often its documents may come; null = without end
    rule: Rule = Rule.document
    max_images: int = 5  # images (or frames) a sequence keeps
    max_tokens: int = 1024  # positions a sequence may take, image groups included
    overlong: Overlong = Overlong.cut  # documents longer than that
    image_first: float = 0.5  # probability that an image stands before its text
    decode_failures: float | None = None  # share of bad samples; null = data.decode_failures


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from and how they are packed."""

    tokenizer: str = "???"  # a Hugging Face tokenizer folder
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    heldout: dict[str, SourceConfig] = field(
        default_factory=dict
    )  # for validation, never trained on
    weights_by: WeightsBy = WeightsBy.documents  # what the weights of sources are shares of
    packing: Packing = Packing.first_fit
    pack_tokens: int = 2048  # positions of one pack
    pack_images: int = 8  # images of one pack at most
    window_documents: int = 1024  # documents packed together at most (look-ahead)
    # packs of this step and later are planned anew, in a new order: how a run goes on with other
    # data, batch or pack sizes
    plan_from_step: int = 0
    shuffle: bool = True
    workers: int = 2  # processes that decode images for each rank; 0 decodes in the rank
    prefetch: int = 2  # micro-batches that each worker makes ahead of the step
    decode_failures: float = 0.01  # share of bad samples of a source beyond which a run stops
    cache_bytes: int = 0  # of the shards fetched for all sources, on each host; 0 = no bound
    resize: Resize = Resize.fast  # exact = Pillow's filter, bit for bit as released models had it
    learn_image_begin: bool = False  # learn to begin images ([IMG] is a label); off as published

    @property
    def failure_limits(self) -> dict[str, float]:
        """Share of bad samples that each source may have."""
        limits = {name: source.decode_failures for name, source in self.sources.items()}
        return {n: self.decode_failures if v is None else v for n, v in limits.items()}


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
    # with decay `steps`: optimizer step -> factor of the peak from there on, as in {10000: 0.5}
    steps: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batch of the run."""

    steps: int = 10000
    global_batch_packs: int = 64  # packs of one optimizer step over all data ranks
    micro_batch_packs: int = 1  # packs of one forward pass on one rank
    precision: Precision = Precision.bf16
    loss_weights: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "image": 1.0})
    freeze: tuple[str, ...] = ()  # name patterns of parameters that are not trained
    ema: float = 0.0  # decay of a running mean of the weights, as in 0.9999; 0 = none is kept
    # a run, a checkpoint or an export; adapters and rows of new tokens that it lacks are made
    initialize_from: str | None = None
    # new token -> the word whose rows' mean it begins with; of all rows when it is not named here
    new_rows: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports, and how often."""

    every_steps: int = 1  # metrics.jsonl and TensorBoard scalars
    modules_every_steps: int = 50  # gradient norm per module; 0 = never
    images_every_steps: int = 500  # packed samples drawn with their text; 0 = never
    samples: bool = False  # samples.jsonl: the sample ids of every step, in order
    peak_tflops: float = 0.0  # per device, for MFU; 0 = look the device up, measure on a CPU


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Held-out loss per source."""

    every_steps: int = 500  # 0 = never
    packs: int = 64


class TaskKind(Enum):
    """What an evaluation asks for."""

    shapes_captions = "shapes_captions"  # captions whose truth is computed (world of shapes)
    caption = "caption"  # captions compared with people's (CIDEr)
    vqa = "vqa"  # short answers compared with people's
    chat = "chat"  # answers of held-out conversations, to the letter
    rank = "rank"  # candidate answers by their likelihood
    draw = "draw"  # pictures of captions, judged by their pixels (world of shapes)
    edit = "edit"  # edited pictures, judged likewise


class ShotChoice(Enum):
    """Which examples of the support set are shown before a question."""

    similar = "similar"  # those with the most similar pictures (RICES)
    random = "random"


class ShotForm(Enum):
    """What is shown of an example."""

    pictures = "pictures"  # its picture, question and answer
    text = "text"  # question and answer alone


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """A set of examples: published JSON with its pictures, or a folder of shards."""

    path: str = ""  # a JSON file, or a folder of shards; empty = the held-out sources
    questions: str | None = None  # the questions file of VQAv2 and OK-VQA
    images: str = ""  # folder of the pictures that a JSON file names
    split: str = "test"  # of Karpathy's file
    relevance: str | None = None  # VisDial's dense annotations


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ExamplesConfig):
    """One evaluation; what is left out (null) is as published for the kind."""

    kind: TaskKind
    documents: int | None = None  # asked, of each source; null = 256 of shards, all of a JSON file
    prompt: str | None = None  # words after a picture; `{question}` stands for the question
    # system message of a run tuned on conversations: auto, image, video, none, or a file;
    # null = auto for JSON, none for shards
    system: str | None = None
    beams: int | None = None  # of the search; 1 = greedy
    new_tokens: int | None = None  # of an answer at most
    shots: tuple[int, ...] = (0,)  # examples shown before a question; each number is a result
    support: ExamplesConfig | None = None  # where they are from
    choice: ShotChoice = ShotChoice.similar
    form: ShotForm = ShotForm.pictures
    candidates: int = 10  # captions that are ranked, where the set has no candidates of its own
    scheduler: str | None = None  # of drawing; null = the decoder's, or the model's own
    steps: int | None = None  # of drawing; null = the decoder's
    guidance: float | None = None  # of drawing; null = the decoder's
    seed: int = 0  # of random shots and of drawing


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `mmtrain evaluate` asks, and how often a run in training is asked."""

    every_steps: int = 0  # from a checkpoint, while training; 0 = never
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    timeout_seconds: float = 7200.0  # other ranks wait so long for rank 0


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Checkpoints."""

    every_steps: int = 500  # 0 = only at the end
    keep: int = 3  # newest checkpoints kept
    keep_every_steps: int = 0  # multiples of this step are kept for ever; 0 = none
    background: bool = True  # write while training goes on; the host holds one copy


class Spike(Enum):
    """What is done about a loss far above those before it."""

    off = "off"
    skip = "skip"  # the optimizer step is not made; the loss is summed over ranks before it
    rewind = "rewind"  # back to the newest checkpoint, on with the data after the spike


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What a run looks after by itself: stalls, time limits, numbers, replicas, slow ranks."""

    # of one step, waiting for data included; 0 = no limit. At most parallel.timeout_seconds, else
    # a collective fails first
    stall_seconds: float = 600.0
    setup_seconds: float = 1800.0  # from the start to the first step; 0 = no limit
    save_seconds: float = 1800.0  # of what a save holds up training for; 0 = no limit
    stop_before_limit_seconds: float = 120.0  # of the Slurm job; the run saves and ends with 85
    nonfinite_steps: int = 3  # steps in a row without finite numbers, then a rollback
    rollbacks: int = 1  # to the same checkpoint, before the run gives up (exit 87)
    spike: Spike = Spike.off
    spike_window: int = 128  # finite losses that a loss is compared with
    spike_score: float = 10.0  # distance from their median, in their spread, that is a spike
    replicas_every_steps: int = 500  # weights that ranks hold alike are compared; 0 = never
    slow_rank: float = 1.3  # times the median of its peers; a slower rank is named; 0 = never


class Condition(Enum):
    """What the visual decoder is told a picture by."""

    rollout = "rollout"  # the rows the frozen model writes after the picture's text (Emu)
    encoder = "encoder"  # the rows its encoder makes of the picture itself (Emu2)


class Null(Enum):
    """What stands for no condition, in training (`decoder.drop`) and for guidance."""

    prompt = "prompt"  # the rows the frozen model writes after an empty prompt, as released
    zeros = "zeros"


class Latent(Enum):
    """What is taken of the distribution that the VAE gives for a picture."""

    sample = "sample"
    mode = "mode"


class Fit(Enum):
    """How a picture becomes a square."""

    crop = "crop"  # the shorter side is scaled, the middle is kept
    squash = "squash"  # both sides are scaled, as for the vision tower


class BetaSchedule(Enum):
    """How noise grows over the diffusion steps (names of diffusers)."""

    scaled_linear = "scaled_linear"  # SD-1.5
    linear = "linear"
    squaredcos_cap_v2 = "squaredcos_cap_v2"  # cosine; better for small pictures


class Prediction(Enum):
    """What the decoder answers to a noisy picture (names of diffusers)."""

    epsilon = "epsilon"  # the noise, as published
    v_prediction = "v_prediction"  # between the two: the noise where there is little of it
    sample = "sample"  # the clean picture; little models learn that fastest


class Scheduler(Enum):
    """How pictures are drawn."""

    pndm = "pndm"  # as released
    ddim = "ddim"
    dpm = "dpm"  # DPM-Solver++ of second order


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How pictures are drawn, in training and by default afterwards."""

    pictures: int = 8  # held-out captions drawn at `log.images_every_steps`
    scheduler: Scheduler = Scheduler.pndm
    steps: int = 50
    guidance: float = 7.5  # unconditional + guidance * (conditional - unconditional)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The phase `decoder`: what conditions the visual decoder, and what it diffuses."""

    language: str | None = None  # the frozen model: a run, a checkpoint or an export folder
    recipe: str | None = None  # of the frozen model; null = recipe.yaml of the run
    condition: Condition = Condition.rollout
    condition_scale: float = 1.0  # conditions are multiplied by it
    unconditional: Null = Null.prompt
    drop: float = 0.1  # share of samples trained without their condition
    cached: str | None = None  # folder written by tools/encode_latents.py; null = made in the run
    longest_text: int = 0  # tokens; documents with more are left out; 0 = no limit
    vae: str | None = None  # diffusers folder of the frozen VAE; null = pixels are diffused
    latent: Latent = Latent.sample
    fit: Fit = Fit.crop
    beta_schedule: BetaSchedule = BetaSchedule.scaled_linear
    beta_start: float = 0.00085  # of scaled_linear and linear
    beta_end: float = 0.012
    noise_steps: int = 1000
    prediction: Prediction = Prediction.epsilon
    # errors of the clean picture count min(1 + signal / noise, this): edges are learned where there
    # is little noise; 0 = every answer counts alike, as published
    snr_limit: float = 0.0
    draw: DrawConfig = field(default_factory=DrawConfig)


@dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """Which implementations of operations run; the table at start says what was chosen, and why."""

    attention: Preference = Preference.auto  # norm, rotary embedding and attention of every head


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
    ops: OpsConfig = field(default_factory=OpsConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)  # in the phase decoder alone
    log: LogConfig = field(default_factory=LogConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
