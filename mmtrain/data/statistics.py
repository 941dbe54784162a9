"""What a folder of shards holds, by its length index alone: counts, percentiles, histograms.

D documents
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.lengths import LEFT_OUT, Lengths

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Spread:
    """How a number is spread over documents.

    Attributes:
        total: of all documents.
        mean: of a document.
        percentiles: by `PERCENTILES`.
        bounds: of the histogram's bins: 0, 1, 2, 4, 8, ...; a bin holds its lower bound.
        counts: documents in each bin.
    """

    total: int
    mean: float
    percentiles: dict[int, int]
    bounds: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Statistics:
    """Of a dataset and a tokenizer.

    Attributes:
        documents: all of them.
        kinds: documents of each kind, the most frequent first; left-out ones not counted.
        left_out: documents that cannot be used, by reason.
        shards: files.
        text_tokens: of a document.
        images: pictures and frames of a document.
        positions: of a document uncut: text, image groups, `<s>` and `</s>`.
    """

    documents: int
    kinds: dict[str, int]
    left_out: dict[str, int]
    shards: int
    text_tokens: Spread
    images: Spread
    positions: Spread

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    def described(self) -> str:
        """For the screen."""
        kinds = ", ".join(f"{name} {count:,}" for name, count in self.kinds.items())
        lines = [f"{self.documents:,} documents in {self.shards:,} shards: {kinds}"]
        lines += [f"{count:,} left out: {reason}" for reason, count in self.left_out.items()]
        for name in ("text_tokens", "images", "positions"):
            lines += ["", *_described(name.replace("_", " "), getattr(self, name))]
        return "\n".join(lines)


def measure(lengths: Lengths, group_length: int) -> Statistics:
    """Statistics of a length index; an image takes `group_length` positions."""
    tokens_D, images_D = per_document(lengths)
    kinds = np.bincount(lengths.arrays["kinds"], minlength=len(lengths.kind_names)).tolist()
    named = sorted(zip(kinds, lengths.kind_names, strict=True), reverse=True)
    return Statistics(
        documents=len(lengths),
        kinds={name: count for count, name in named if not name.startswith(LEFT_OUT)},
        left_out=lengths.left_out,
        shards=len(lengths.shard_sizes),
        text_tokens=spread(tokens_D),
        images=spread(images_D),
        positions=spread(tokens_D + images_D * group_length + 2),
    )


def per_document(lengths: Lengths) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Text tokens and images of every document that can be used, `[D]` each."""
    offsets, sizes = lengths.arrays["offsets"], lengths.arrays["sizes"].astype(np.int64)
    is_text = lengths.arrays["modalities"] == 0
    before_text = np.concatenate([[0], np.cumsum(np.where(is_text, sizes, 0))])
    before_image = np.concatenate([[0], np.cumsum(np.where(is_text, 0, sizes))])
    left_out = [name.startswith(LEFT_OUT) for name in lengths.kind_names]
    used = ~np.array(left_out, bool)[lengths.arrays["kinds"]]
    texts, images = np.diff(before_text[offsets])[used], np.diff(before_image[offsets])[used]
    return texts, images


def spread(values_D: NDArray[np.int64]) -> Spread:
    """How values of 0 and more are spread."""
    if not len(values_D):
        return Spread(0, 0.0, dict.fromkeys(PERCENTILES, 0), [0], [0])
    bounds = [0, *(1 << power for power in range(int(values_D.max()).bit_length()))]
    counts, _ = np.histogram(values_D, [*bounds, np.inf])
    found = np.percentile(values_D, PERCENTILES, method="higher").astype(int).tolist()
    return Spread(
        total=int(values_D.sum()),
        mean=float(values_D.mean()),
        percentiles=dict(zip(PERCENTILES, found, strict=True)),
        bounds=bounds,
        counts=counts.tolist(),
    )


def _described(name: str, found: Spread) -> Sequence[str]:
    ranks = ", ".join(f"p{rank} {value:,}" for rank, value in found.percentiles.items())
    lines = [f"{name}: {found.total:,}, {found.mean:,.1f} a document ({ranks})"]
    most = max(found.counts) or 1
    first = next((place for place, count in enumerate(found.counts) if count), 0)
    for low, count in list(zip(found.bounds, found.counts, strict=True))[first:]:
        label = f"{low:,}" if low < 2 else f"{low:,} to {2 * low - 1:,}"
        lines.append(f"{label:>18} {count:>10,} {'#' * round(_BAR * count / most)}".rstrip())
    return lines
