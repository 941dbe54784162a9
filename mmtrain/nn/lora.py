"""Low-rank adapters beside frozen linears (LoRA, Hu et al. 2021, arXiv:2106.09685), plain modules.

`y = W x + (alpha / r) B A drop(x)`. The adapter of a linear `q` is its sibling `q_lora`, so the
base weight keeps its canonical name, and a run without adapters is a start for one with them. A is
drawn as PEFT draws it, B is zero: training begins at the base model.

Dropout is a hash (`nn.noise`), not a draw: layouts, packing, recomputation and resuming do not
change it. Cost of an adapter: 2 T r (in + out) operations, and with dropout one more copy of x.

T rows   D inputs   r rank
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mmtrain.nn.init import InitialRules, constant, uniform
from mmtrain.nn.noise import RowNoise, seed_of

_NAME = re.compile(r"(?P<base>.+)_lora\.(?P<part>[ab])\.weight")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of the trunk's linears; the defaults but `rank` are the Emu release's."""

    rank: int = 0  # of every adapter (16 in the release); 0 = none, the whole model is trained
    alpha: float = 16.0  # an adapter counts alpha / rank
    dropout: float = 0.05  # of an adapter's input
    targets: tuple[str, ...] = ("q", "k", "v", "out")  # also gate, up, down
    also_train: tuple[str, ...] = ()  # name patterns of base parameters that are trained too

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / self.rank


class HashedDropout(nn.Module):
    """Dropout whose mask is a function of row, channel and place in the model.

    Attributes:
        channels: which channels of the full layer the input holds; tensor ranks hold parts.
    """

    def __init__(self, channels: range, rate: float, salt: int) -> None:
        """Drop with probability `rate`; `salt` tells layers apart."""
        super().__init__()
        self.channels = channels
        self.rate = rate
        self.salt = salt

    def part(self, rank: int, ranks: int) -> "HashedDropout":
        """The same dropout for the `rank`-th of `ranks` equal parts of the channels."""
        width = len(self.channels) // ranks
        return HashedDropout(self.channels[rank * width :][:width], self.rate, self.salt)

    def forward(self, x_TD: Tensor, noise: RowNoise | None) -> Tensor:
        """Zero a share of `x` and scale the rest by `1 / (1 - rate)`; nothing in evaluation."""
        if not self.training or self.rate == 0:
            return x_TD
        assert noise is not None, "dropout needs the field `noise` of the flow"
        dropped_TD = noise.chosen(self.salt, self.channels, self.rate)
        return (x_TD * (1 / (1 - self.rate))).masked_fill(dropped_TD, 0.0)


class Adapter(nn.Module):
    """`(alpha / r) B A drop(x)`."""

    def __init__(self, inputs: int, outputs: int, config: LoraConfig, name: str) -> None:
        """Allocate `a [r, inputs]` and `b [outputs, r]`; `name` is canonical, for the dropout."""
        super().__init__()
        self.drop = HashedDropout(range(inputs), config.dropout, seed_of(name))
        self.a = nn.Linear(inputs, config.rank, bias=False)
        self.b = nn.Linear(config.rank, outputs, bias=False)
        self.scale = config.scale

    def forward(self, x_TD: Tensor, noise: RowNoise | None) -> Tensor:
        """What is added to the base linear's output."""
        out: Tensor = self.b(self.a(self.drop(x_TD, noise)) * self.scale)
        return out


# (name of a linear in its module, the linear) -> its adapter, or None
Beside = Callable[[str, nn.Linear], Adapter | None]


def no_adapter(target: str, linear: nn.Linear) -> None:
    """Every linear stands alone."""
    return None


def adapters(config: LoraConfig, prefix: str) -> Beside:
    """Adapters for the targets among the linears of the module with canonical name `prefix`."""

    def beside(target: str, linear: nn.Linear) -> Adapter | None:
        if config.rank == 0 or target not in config.targets:
            return None
        name = f"{prefix}.{target}_lora"
        return Adapter(linear.in_features, linear.out_features, config, name)

    return beside


def adapted(
    linear: nn.Module, adapter: Adapter | None, x_TD: Tensor, noise: RowNoise | None
) -> Tensor:
    """A linear and what its adapter adds."""
    out: Tensor = linear(x_TD)
    return out if adapter is None else out + adapter(x_TD, noise)


def initial_rules(prefix: str, inputs: int) -> InitialRules:
    """As PEFT draws: Kaiming uniform with a = sqrt(5), which is U(+- 1 / sqrt(inputs)); B zero.

    Args:
        prefix: pattern of the adapted linears, as in `blocks.*.attention.{q,k}`.
        inputs: their input features.
    """
    return [
        (f"{prefix}_lora.a.weight", uniform(inputs**-0.5)),
        (f"{prefix}_lora.b.weight", constant(0.0)),
    ]


def is_adapter(name: str) -> bool:
    """Whether a canonical name is that of an adapter's parameter."""
    return _NAME.fullmatch(name) is not None


def adapted_weights(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Base weight -> names of A and B, for every adapter among `names`."""
    found = (_NAME.fullmatch(name) for name in names)
    bases = dict.fromkeys(hit["base"] for hit in found if hit)
    return {f"{b}.weight": (f"{b}_lora.a.weight", f"{b}_lora.b.weight") for b in bases}


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`W + scale B A`, computed in float32, in the number type of W."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Full tensors with every adapter folded into its base weight.

    Args:
        tensors: by canonical name, adapters and the weights they adapt included.
        scale: alpha / r.
    """
    pairs = adapted_weights(tensors)
    return {
        name: merge(tensor, tensors[pairs[name][0]], tensors[pairs[name][1]], scale)
        if name in pairs
        else tensor
        for name, tensor in tensors.items()
        if not is_adapter(name)
    }
