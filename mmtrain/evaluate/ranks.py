"""Measures of a ranking of candidate answers (VisDial, arXiv:1611.08669).

A rank counts from 1. Recall at k, mean rank and mean reciprocal rank tell where the true answer
came; the normalised discounted gain tells how well all answers that people found fitting are
placed, over as many places as there are fitting answers.
"""

import math
from collections.abc import Sequence

RECALLS = (1, 5, 10)


def rank_of(scores: Sequence[float], true: int) -> int:
    """Place of candidate `true` when lower scores come first; ties go against it."""
    return sum(score <= scores[true] for score in scores)


def summary(ranks: Sequence[int]) -> dict[str, float]:
    """MRR, recalls and mean rank."""
    count = len(ranks)
    return {
        "mrr": sum(1 / rank for rank in ranks) / count,
        **{f"recall_at_{k}": sum(rank <= k for rank in ranks) / count for k in RECALLS},
        "mean_rank": sum(ranks) / count,
    }


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """Discounted gain of a ranking by ascending score, of the best possible; 0 to 1."""
    places = sum(value > 0 for value in relevance)
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    best = sorted(relevance, reverse=True)
    ideal = _gain(best[:places])
    return _gain([relevance[index] for index in order[:places]]) / ideal if ideal else 0.0


def _gain(values: Sequence[float]) -> float:
    return sum(value / math.log2(place + 2) for place, value in enumerate(values))
