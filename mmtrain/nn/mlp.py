"""Two-layer and gated perceptrons; `enter` marks where tensor ranks start to share the work."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from mmtrain.nn.lora import Beside, adapted, no_adapter
from mmtrain.nn.noise import RowNoise


class Mlp(nn.Module):
    """`down(activation(up(x)))` (EVA-CLIP: erf GELU with biases; T5: ReLU without)."""

    def __init__(
        self, up: nn.Linear, down: nn.Linear, activation: Callable[[Tensor], Tensor]
    ) -> None:
        """Take the two projections and what stands between them."""
        super().__init__()
        self.enter = nn.Identity()
        self.up = up
        self.down = down
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        hidden: Tensor = self.down(self.activation(self.up(self.enter(x))))
        return hidden


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202), no biases."""

    def __init__(self, width: int, inner: int, beside: Beside = no_adapter) -> None:
        """Allocate three projections between `width` and `inner`; `beside` makes adapters."""
        super().__init__()
        self.enter = nn.Identity()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.gate_lora = beside("gate", self.gate)
        self.up_lora = beside("up", self.up)
        self.down_lora = beside("down", self.down)

    def forward(self, x: Tensor, noise: RowNoise | None = None) -> Tensor:
        """`[..., D]` to `[..., D]`; `noise` is for the dropout of adapters."""
        x = self.enter(x)
        gate = adapted(self.gate, self.gate_lora, x, noise)
        up = adapted(self.up, self.up_lora, x, noise)
        return adapted(self.down, self.down_lora, functional.silu(gate) * up, noise)
