"""A document as tokens: the one meaning of "a sample" for every family.

A rule (`data.rules`) selects from a stored `Document`; what it chose, tokenised, is an
`InterleavedSequence`, and packs are made of those.

T tokens
"""

from dataclasses import dataclass

from torch import Tensor

from mmtrain.data.document import Modality


@dataclass(frozen=True)
class Span:
    """`length` tokens from `start` belong to media item `item` (a whole image group)."""

    start: int
    length: int
    modality: Modality
    item: int


@dataclass(frozen=True, kw_only=True)
class InterleavedSequence:
    """A document as tokens, `<s>` first and `</s>` last.

    Attributes:
        tokens_T: int64 ids, image slots included.
        spans: image groups in order; disjoint, inside T, naming existing items.
        media: encoded images, one per item.
        weights_T: float32, how much each token counts as a target.
        sample_id: where it came from.
        image_weight: of the regression pairs of its images.
        media_numbers: of each item, its place among all images of the stored document.
    """

    tokens_T: Tensor
    spans: tuple[Span, ...]
    media: tuple[bytes, ...]
    weights_T: Tensor
    sample_id: str
    image_weight: float = 1.0
    media_numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Hold the promises of `spans`; a breach is a bug of whoever built the sequence."""
        end = 0
        for span in self.spans:
            assert span.start >= end and span.length > 0, (self.sample_id, span)
            assert 0 <= span.item < len(self.media), (self.sample_id, span, len(self.media))
            end = span.start + span.length
        assert end <= len(self.tokens_T) == len(self.weights_T), self.sample_id
