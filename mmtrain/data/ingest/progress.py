"""How far an ingest is: a bar on a terminal, a line every half minute elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mmtrain.data.ingest.report import Counts
from mmtrain.log import ROOT

log = logging.getLogger(__name__)

_SECONDS = 30.0  # between lines
_BAR_SECONDS = 1.0  # between words beside the bar


class Progress:
    """Counts records as they pass; use it in a `with` block."""

    def __init__(self, counts: Counts, *, bar: bool | None = None) -> None:
        """Begin at what is counted; `bar` is whether standard error is a terminal."""
        shown = sys.stderr.isatty() if bar is None else bar
        self._begun, self._passed, self._said = time.monotonic(), 0, time.monotonic()
        self._bar = tqdm(initial=counts.records, unit=" records", disable=not shown)
        # lines of the log go above the bar
        self._redirect = logging_redirect_tqdm([logging.getLogger(ROOT)]) if shown else None

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if self._redirect is not None:
            self._redirect.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take it away."""
        self._bar.close()
        if self._redirect is not None:
            self._redirect.__exit__(kind, error, trace)

    def passed(self, counts: Counts) -> None:
        """One record more."""
        self._passed += 1
        self._bar.update()
        now = time.monotonic()
        if now - self._said < (_SECONDS if self._bar.disable else _BAR_SECONDS):
            return
        self._said = now
        rate = self._passed / (now - self._begun)
        text = f"{counts.documents:,} documents, {counts.dropped.total():,} left out"
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable:
            log.info("%s records, %s, %.0f records/s", f"{counts.records:,}", text, rate)
