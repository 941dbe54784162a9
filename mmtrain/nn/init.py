"""Initial weights by name: every layout starts from the same numbers.

The generator of a parameter is seeded with (seed, full name); the full tensor is drawn in
float32 on the host, then this rank's slice is kept.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmtrain.layout.plan import Slice, compile_pattern

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
InitialRules = Sequence[tuple[str, Draw]]  # (name pattern, how to draw); the first match decides


def normal(std: float) -> Draw:
    """Normal distribution with mean 0."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def truncated_normal(std: float) -> Draw:
    """Normal distribution cut at two standard deviations."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.nn.init.trunc_normal_(
            torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator
        )

    return draw


def uniform(bound: float) -> Draw:
    """Uniform distribution on (-bound, bound)."""
    return lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound


def constant(value: float) -> Draw:
    """Every entry equal to `value`."""
    return lambda shape, generator: torch.full(shape, value)


def draw_by_name(name: str, shape: tuple[int, ...], rules: InitialRules, seed: int) -> Tensor:
    """Draw the full tensor `name`.

    Raises:
        KeyError: no rule matches; every parameter of a family must have one.
    """
    for pattern, draw in rules:
        if compile_pattern(pattern).fullmatch(name):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            return draw(shape, generator)
    raise KeyError(f"no initial rule for parameter {name} of shape {shape}")


def take_slice(full: Tensor, cut: Slice | None, rank: int, ranks: int) -> Tensor:
    """Rank `rank`'s part of a full tensor; a padded cut fills the tail with zeros."""
    if cut is None or ranks == 1:
        return full
    length = full.shape[cut.dim]
    local = cut.local_length(length, ranks)
    assert cut.padded or local * ranks == length, (full.shape, cut, ranks)
    start = min(rank * local, length)
    part = full.narrow(cut.dim, start, min(local, length - start))
    if part.shape[cut.dim] == local:
        return part
    pad = list(part.shape)
    pad[cut.dim] = local - part.shape[cut.dim]
    return torch.cat([part, part.new_zeros(pad)], cut.dim)
