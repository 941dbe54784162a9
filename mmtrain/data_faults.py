"""What is wrong with a recipe's sources: where they are read from, weights, epochs."""

import math
import re
from collections.abc import Iterator

from mmtrain.errors import Problem
from mmtrain.schema import join
from mmtrain.settings import DataConfig, SourceConfig


def source_faults(place: str, source: SourceConfig) -> Iterator[Problem]:
    """Faults of one source, `place` being its key."""
    if source.remote is not None and re.match(r"[^/@]*://[^/@]*:[^/@]*@", source.remote):
        yield Problem(
            f"{place}.remote",
            "holds a password, which the run would write into its recipe.yaml and its log; leave "
            "it out: sftp:// takes the key file that COMPOSER_SFTP_KEY_FILE names, the others the "
            "credentials of their own tools",
        )
    if not 0 <= (source.decode_failures or 0) <= 1:
        yield Problem(
            f"{place}.decode_failures", f"found {source.decode_failures}; allowed: 0 to 1"
        )
    yield from _weights(place, source)


def _weights(place: str, source: SourceConfig) -> Iterator[Problem]:
    steps = source.weight_steps
    if not 0 <= source.weight < math.inf or (source.weight == 0 and not steps):
        yield Problem(
            f"{place}.weight",
            f"found {source.weight}; allowed: above 0 (0 only with weight_steps, until one of "
            f"them holds); null removes {place}",
        )
    for step, weight in steps.items():
        if not step.isdecimal() or not 0 <= weight < math.inf:
            yield Problem(
                join(f"{place}.weight_steps", step),
                f"found {weight}; wanted: a step number and a weight of 0 or more, as in "
                "{10000: 0.5}",
            )
    if source.epochs is not None and not 0 < source.epochs < math.inf:
        yield Problem(
            f"{place}.epochs", f"found {source.epochs}; allowed: above 0, or null for no end"
        )


def mixture(data: DataConfig) -> Iterator[Problem]:
    """Faults of all training sources together."""
    sources = data.sources.values()
    if not any(source.weight_steps for source in sources):
        return  # a weight of 0 is reported by source
    if any(not step.isdecimal() for source in sources for step in source.weight_steps):
        return  # reported by source
    for step in sorted({0, *(int(step) for source in sources for step in source.weight_steps)}):
        if sources and not any(weight_at(source, step) > 0 for source in sources):
            yield Problem(
                "data.sources", f"every weight is 0 from step {step} on; give one source a weight"
            )


def weight_at(source: SourceConfig, step: int) -> float:
    """Weight of a source at a step."""
    steps = {int(begin): weight for begin, weight in source.weight_steps.items()}
    passed = [begin for begin in steps if begin <= step]
    return steps[max(passed)] if passed else source.weight
