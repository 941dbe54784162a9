"""What an ingest counted: for the journal, the manifest and the terminal.

Histograms have bins by powers of two: `{"0": a, "1": b, "2": c, "4": d}` are `a` documents of 0,
`b` of 1, `c` of 2 to 3, `d` of 4 to 7.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmtrain.data.document import Document, Modality
from mmtrain.data.ingest.dropped import Reason
from mmtrain.data.lengths import Lengths


@dataclass
class Counts:
    """Of records and of the documents that were made of them."""

    records: int = 0
    documents: int = 0
    images: int = 0  # frames of clips included
    characters: int = 0
    media_bytes: int = 0
    dropped: Counter[Reason] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    image_bins: Counter[int] = field(default_factory=Counter)
    character_bins: Counter[int] = field(default_factory=Counter)

    def keep(self, document: Document, noted: Mapping[str, int]) -> None:
        """Count a record that became a document."""
        images = sum(len(part.media) for part in document.parts)
        characters = sum(len(p.text) for p in document.parts if p.modality is Modality.text)
        self.records += 1
        self.documents += 1
        self.images += images
        self.characters += characters
        self.media_bytes += sum(len(blob) for part in document.parts for blob in part.media)
        self.noted.update(noted)
        self.image_bins[bin_of(images)] += 1
        self.character_bins[bin_of(characters)] += 1

    def drop(self, reason: Reason) -> None:
        """Count a record that was left out."""
        self.records += 1
        self.dropped[reason] += 1

    @property
    def broken(self) -> int:
        """Records that were left out for another reason than a rule."""
        return sum(count for reason, count in self.dropped.items() if not reason.by_rule)

    @property
    def reasons(self) -> str:
        """Records that were left out by reason, the most frequent first."""
        ordered = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0].name))
        return ", ".join(f"{count:,} {reason.value}" for reason, count in ordered)

    def to_json(self) -> dict[str, Any]:
        """As journal and manifest hold them."""
        return {
            "records": self.records,
            "documents": self.documents,
            "images": self.images,
            "characters": self.characters,
            "media_bytes": self.media_bytes,
            "dropped": {reason.name: n for reason, n in sorted_by_name(self.dropped)},
            "noted": dict(sorted(self.noted.items())),
            "histograms": {
                "images": bins_to_json(self.image_bins),
                "characters": bins_to_json(self.character_bins),
            },
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Counts":
        """Undo `to_json`."""
        bins = stored["histograms"]
        return cls(
            **{name: stored[name] for name in ("records", "documents", "images", "characters")},
            media_bytes=stored["media_bytes"],
            dropped=Counter({Reason[name]: n for name, n in stored["dropped"].items()}),
            noted=Counter(stored["noted"]),
            image_bins=Counter({int(low): n for low, n in bins["images"].items()}),
            character_bins=Counter({int(low): n for low, n in bins["characters"].items()}),
        )


def sorted_by_name(dropped: Counter[Reason]) -> list[tuple[Reason, int]]:
    """Reasons in an order that does not depend on which came first."""
    return sorted(dropped.items(), key=lambda item: item[0].name)


def bin_of(size: int) -> int:
    """The least size of the bin that a size falls into."""
    return 1 << (size.bit_length() - 1) if size else 0


def bins_to_json(bins: Mapping[int, int]) -> dict[str, int]:
    """Bins by their least size, ascending."""
    return {str(low): count for low, count in sorted(bins.items())}


def token_facts(lengths: Lengths) -> dict[str, Any]:
    """Text tokens of all documents: their number, and a histogram."""
    text = lengths.arrays["modalities"] == 0
    sizes = lengths.arrays["sizes"] * text
    offsets = lengths.arrays["offsets"].tolist()
    bins: Counter[int] = Counter()
    total = 0
    for start, stop in pairwise(offsets):
        tokens = int(sizes[start:stop].sum())
        total += tokens
        bins[bin_of(tokens)] += 1
    return {"tokenizer": lengths.fingerprint, "tokens": total, "histogram": bins_to_json(bins)}


@dataclass(frozen=True)
class Report:
    """A finished ingest."""

    out: Path
    label: str  # what the source was read as
    counts: Counts
    shards: int
    shard_bytes: int
    tokens: int | None  # None without a tokenizer

    def __str__(self) -> str:
        """What to tell the user."""
        counts = self.counts
        tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
        lines = [
            f"{counts.documents:10,} documents of {counts.records:,} records read as {self.label}: "
            f"{self.out}",
            f"{counts.images:10,} images of {counts.media_bytes:,} bytes, "
            f"{counts.characters:,} characters of text{tokens}",
            f"{self.shards:10,} shards of {self.shard_bytes:,} bytes",
        ]
        if counts.dropped:
            left_out = counts.dropped.total()
            lines.append(f"{left_out:10,} records left out: {counts.reasons}")
        lines += [f"{count:10,} {what}" for what, count in sorted(counts.noted.items())]
        return "\n".join(lines)
