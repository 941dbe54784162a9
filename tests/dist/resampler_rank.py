"""One rank of a resampler that tensor ranks share: builds it, runs it, writes what it found."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from mmtrain.encoders.resampler import (
    LatentAttention,
    Resampler,
    ResamplerBlock,
    initial_rules,
    tensor_rules,
)
from mmtrain.layout.dims import ParallelDims
from mmtrain.layout.plan import TensorPlan
from mmtrain.nn.attention import Cosine, DotProduct
from mmtrain.nn.init import draw_by_name, normal
from mmtrain.nn.norm import RMSNorm
from mmtrain.parallel.build import Construction
from mmtrain.parallel.mesh import open_mesh

NAME, LATENTS, WIDTH, HEADS, MLP_WIDTH = "history", 5, 48, 4, 80
CONTEXT_WIDTH, OUTPUT_WIDTH, EPS = 20, 32, 1e-6
PLAN = TensorPlan(tensor_rules(NAME))


def built(kind: str) -> Resampler:
    """A resampler of two layers with both projections."""

    def attention() -> LatentAttention:
        norms = [RMSNorm(WIDTH // HEADS, EPS) if kind == "qk" else nn.Identity() for _ in range(2)]
        similarity = DotProduct() if kind == "qk" else Cosine(HEADS)
        return LatentAttention(
            WIDTH, HEADS, q_norm=norms[0], k_norm=norms[1], similarity=similarity
        )

    blocks = [
        ResamplerBlock(width=WIDTH, mlp_width=MLP_WIDTH, attention=attention(), norm_eps=EPS)
        for _ in range(2)
    ]
    return Resampler(
        latents=LATENTS,
        width=WIDTH,
        blocks=blocks,
        norm_eps=EPS,
        context_width=CONTEXT_WIDTH,
        output_width=OUTPUT_WIDTH,
    )


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    """What the rules draw, and something beside it, so that norms and scales differ by channel."""
    rules = initial_rules(NAME, width=WIDTH, mlp_width=MLP_WIDTH, context_width=CONTEXT_WIDTH)
    return draw_by_name(name, shape, rules, 0) + draw_by_name(name, shape, [(name, normal(0.2))], 1)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Features, a mask with holes and an empty frame, and the gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    draw = partial(torch.randn, generator=generator)
    mask = torch.rand(3, 9, generator=generator) < 0.6
    mask[2] = False
    return draw(3, 9, CONTEXT_WIDTH).requires_grad_(), mask, draw(3, LATENTS, OUTPUT_WIDTH)


class Sums:
    """Counts how often ranks add up, in Megatron-core's layers and in hooks."""

    def __init__(self) -> None:
        """Stand before `all_reduce`."""
        self.count = 0
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self._counted

    def _counted(self, *args: object, **kwargs: object) -> object:
        self.count += 1
        return self._all_reduce(*args, **kwargs)  # type: ignore[arg-type]


def main(argv: Sequence[str]) -> int:
    """Of a kind, on a number of tensor ranks: outputs and gradients to a file for each rank."""
    kind, ranks, out = argv
    construction = Construction(
        plan=PLAN,
        initial=initial,
        fields=(),
        is_trained=lambda name: True,
        recomputed=lambda name: False,
        sequence=False,
        partition=False,
        dtype=torch.float32,
    )
    context, mask, upstream = inputs()
    with open_mesh(ParallelDims(tensor=int(ranks)), 60) as mesh:
        resampler = construction.build((NAME, lambda: built(kind)), mesh)
        sums = Sums()
        found = resampler(context, mask)
        forward = sums.count
        found.backward(upstream)
        assert context.grad is not None
        tensors = {"out": found.detach(), "context": context.grad}
        for name, parameter in resampler.named_parameters():
            assert parameter.grad is not None, name
            tensors[f"{NAME}.{name}"] = parameter.grad
        tensors["sums"] = torch.tensor([forward, sums.count - forward])
        save_file({name: x.contiguous() for name, x in tensors.items()}, f"{out}.{mesh.tensor}")
    return 0
