"""One picture to one sentence, so that the sum of their similarities is greatest.

The linear assignment problem by shortest augmenting paths (Kuhn, Munkres; Jonker and Volgenant
1987), in n^2 m steps for n <= m. MMC4 and OpenFlamingo assign so. Own code, as scipy would be a
dependency of 100 MB for this function alone.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def assign(similarity: Sequence[Sequence[float]] | NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs (row, column), rows ascending; as many as the shorter side has.

    Args:
        similarity: finite numbers [rows, columns].
    """
    gain = np.asarray(similarity, np.float64)
    if gain.shape[0] > gain.shape[1]:
        return sorted((row, column) for column, row in assign(gain.T))
    rows, columns = gain.shape
    cost = gain.max(initial=0.0) - gain
    of_row, of_column = np.zeros(rows), np.zeros(columns)  # dual prices
    holder = np.full(columns, -1)  # row that has a column
    for start in range(rows):
        shortest, before = np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns, bool)
        row, column, length = start, -1, 0.0
        while row >= 0:
            reached = length + cost[row] - of_row[row] - of_column
            nearer = ~done & (reached < shortest)
            shortest[nearer], before[nearer] = reached[nearer], column
            column = int(np.where(done, np.inf, shortest).argmin())
            length, row = float(shortest[column]), int(holder[column])
            done[column] = True
        taken = done & (holder >= 0)
        of_row[holder[taken]] += length - shortest[taken]
        of_row[start] += length
        of_column[done] += shortest[done] - length
        while column >= 0:
            earlier = int(before[column])
            holder[column] = start if earlier < 0 else holder[earlier]
            column = earlier
    return sorted((int(row), column) for column, row in enumerate(holder.tolist()) if row >= 0)
