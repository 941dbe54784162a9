"""Why a record does not become a document."""

from enum import Enum
from typing import Any


class Reason(Enum):
    """Why a record is left out."""

    syntax = "no JSON"
    fields = "fields missing or of the wrong type"
    order = "roles out of order"
    empty = "empty turn"
    unanswered = "no answer"
    marks = "marks and pictures do not match"
    missing = "picture or clip not there"
    undecodable = "picture or clip cannot be decoded"
    text = "text is not Unicode"
    no_text = "no text"
    no_image = "no picture"
    outside = "name leads out of its folder"
    large = "too large"
    cut = "file breaks off"
    threshold = "no picture above the CLIP threshold"
    untimed = "no subtitles or no duration"

    @property
    def by_rule(self) -> bool:
        """A rule leaves it out; every other record is broken and counts as a failure."""
        return self in (Reason.threshold, Reason.untimed)


class Dropped(Exception):
    """A record that is left out: `reason` is counted, the text is shown."""

    def __init__(self, reason: Reason, text: str) -> None:
        """Keep both."""
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Both go from process to process."""
        return Dropped, (self.reason, str(self))
