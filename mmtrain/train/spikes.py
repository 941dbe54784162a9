"""When a loss is a spike: far above the losses before it, by their own spread.

Score = (loss - median) / spread, over a window of losses; spread = 1.4826 * median absolute
deviation, the standard deviation of a normal distribution (Rousseeuw and Croux 1993), and at least
1 % of the median, so that on a flat curve a rise below a tenth is no spike at a score of 10. Both
stand up to half the window being spikes. Only rises count.

Cost: two sorts of the window a step, 11 us for 128 losses.
"""

import math
from collections import deque
from statistics import median

_NORMAL = 1.4826
_LEAST_SPREAD = 0.01  # of the median
_FEWEST = 4  # losses, or a quarter of the window


class SpikeJudge:
    """Keeps the last losses of a run and judges the next one."""

    def __init__(self, window: int, score: float, row: int) -> None:
        """Begin without losses; the first quarter of a window is not judged.

        Args:
            window: losses that count.
            score: from which on a loss is a spike.
            row: spikes in a row after which they are the new level and nothing is kept.
        """
        self._losses: deque[float] = deque(maxlen=window)
        self._score, self._row, self._spikes = score, row, 0
        self._needed = max(_FEWEST, window // 4)

    def score(self, loss: float) -> float:
        """Distance above the median in spreads; 0 while there are too few losses."""
        if len(self._losses) < self._needed:
            return 0.0
        middle = median(self._losses)
        spread = _NORMAL * median(abs(loss - middle) for loss in self._losses)
        return (loss - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)

    def is_spike(self, loss: float) -> bool:
        """Judge the next loss, and keep it when it is none; one that is not finite is neither."""
        if not math.isfinite(loss):
            return False
        self._spikes = self._spikes + 1 if self.score(loss) >= self._score else 0
        if self._spikes > self._row:
            self._losses.clear()
            self._spikes = 0
        if self._spikes:
            return True
        self._losses.append(loss)
        return False
