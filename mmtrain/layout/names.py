"""Which parameters a name pattern of a recipe speaks of (freezing, learning rates, decay)."""

from collections.abc import Iterable

from mmtrain.layout.plan import compile_pattern


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter or a module above it.

    `vision` covers `vision.stem.cls`; `blocks.*.attention` covers `blocks.3.attention.q.weight`.
    """
    compiled = compile_pattern(pattern)
    parts = name.split(".")
    return any(compiled.fullmatch(".".join(parts[:n])) for n in range(1, len(parts) + 1))


def deciding(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that covers a parameter, or None."""
    return next((pattern for pattern in patterns if covers(pattern, name)), None)
