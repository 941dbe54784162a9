"""Initial weights by name: every layout starts from the same numbers.

The generator of a parameter is seeded with (seed, full name); the full tensor is drawn in
float32 on the host, then this rank's slice is kept.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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


def torch_defaults(module: nn.Module, prefix: str) -> InitialRules:
    """How torch draws convolutions, linears and norms: U(+- 1 / sqrt(inputs)); norms 1 and 0.

    Names with the same inputs share a rule: a bias alone does not tell how wide its weight is.

    Args:
        module: built on the meta device, of such parts alone.
        prefix: canonical name of the module.
    """
    bounded: dict[float, list[str]] = {}
    ones, zeros = [], []
    for path, part in module.named_modules():
        name = f"{prefix}.{path}" if path else prefix
        parameters = dict(part.named_parameters(recurse=False))
        if isinstance(part, nn.Conv2d | nn.Linear):
            bound = math.prod(parameters["weight"].shape[1:]) ** -0.5
            bounded.setdefault(bound, []).extend(f"{name}.{leaf}" for leaf in parameters)
        elif isinstance(part, nn.GroupNorm | nn.LayerNorm):
            ones.append(f"{name}.weight")
            zeros.append(f"{name}.bias")
        else:
            assert not parameters, (name, type(part).__name__, "has no initial rule")
    rules = [(_any_of(names), uniform(bound)) for bound, names in bounded.items()]
    norms = [(_any_of(ones), constant(1.0)), (_any_of(zeros), constant(0.0))] if ones else []
    return [*rules, *norms]


def _any_of(names: list[str]) -> str:
    return "{" + ",".join(names) + "}"


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
