"""Where to cut a list of layers into pipeline stages: exact, by dynamic programming.

A pipeline is as fast as its heaviest stage. First the least possible heaviest stage is found,
then, among the cuts that reach it, the one with the least sum of squares, so the light stages
are even too. Cost: O(stages * layers^2), 0.01 s for 85 layers and 8 stages.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

_INFINITE = float("inf")


def balance(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut layers into contiguous stages with the least heaviest stage.

    Args:
        costs: cost of each layer, in any unit, none negative.
        stages: number of stages; each gets at least one layer.

    Returns:
        The first layer of every stage but the first, ascending.

    Raises:
        ValueError: fewer layers than stages.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot fill {stages} stages")
    heaviest = _best(costs, stages, max, lambda cost: cost)[0]
    # the two passes add the same numbers in the same order; the margin is for the prefix sums
    limit = heaviest * (1 + 1e-12)
    return _best(
        costs,
        stages,
        lambda left, right: left + right,
        lambda cost: cost * cost if cost <= limit else _INFINITE,
    )[1]


def _best(
    costs: Sequence[float],
    stages: int,
    join: Callable[[float, float], float],
    price: Callable[[float], float],
) -> tuple[float, tuple[int, ...]]:
    """Least joined price of a cut into stages, and its bounds."""
    sums = [0.0, *accumulate(costs)]
    count = len(costs)
    # least[n]: best price of the first n layers in the stages so far; from_[k][n]: its last cut
    least = [_INFINITE] + [price(sums[n]) for n in range(1, count + 1)]
    from_: list[list[int]] = []
    for stage in range(1, stages):
        row, cuts = [_INFINITE] * (count + 1), [0] * (count + 1)
        for end in range(stage + 1, count + 1):
            for cut in range(stage, end):
                total = join(least[cut], price(sums[end] - sums[cut]))
                if total < row[end] or cuts[end] == 0:
                    row[end], cuts[end] = total, cut
        least = row
        from_.append(cuts)
    bounds, end = [], count
    for cuts in reversed(from_):
        end = cuts[end]
        bounds.append(end)
    return least[count], tuple(reversed(bounds))


def stage_ranges(layers: int, bounds: Sequence[int]) -> list[range]:
    """The layers of each stage."""
    return [range(start, stop) for start, stop in pairwise([0, *bounds, layers])]


def stage_costs(costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """The summed cost of each stage."""
    return [sum(costs[i] for i in part) for part in stage_ranges(len(costs), bounds)]


def bounds_table(names: Sequence[str], costs: Sequence[float], bounds: Sequence[int]) -> str:
    """One line a stage: its layers, its cost, and its share of the heaviest stage's cost."""
    totals = stage_costs(costs, bounds)
    heaviest = max(totals) or 1.0
    rows = [("stage", "layers", "first", "last", "cost", "of heaviest")]
    for stage, part in enumerate(stage_ranges(len(names), bounds)):
        rows.append(
            (
                str(stage),
                str(len(part)),
                names[part[0]],
                names[part[-1]],
                f"{totals[stage]:.3g}",
                f"{totals[stage] / heaviest:.0%}",
            )
        )
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest entry; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
