"""Multimodal C4 (Zhu et al. 2023, arXiv:2304.06939): pages of sentences, pictures by name.

A record has `text_list` and `image_info` of `image_name`, `matched_text_index`, `matched_sim`; and
`similarity_matrix` [pictures, sentences]. Pictures are chosen as OpenFlamingo does, which Emu
follows: those that are there are assigned to sentences anew, one to one, so that the sum of
similarities is greatest, and kept from the threshold on. Without a matrix the record's own
matches are taken. A page without a picture above the threshold is left out.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.document import Modality, Part
from mmtrain.data.ingest.assignment import assign
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile
from mmtrain.data.ingest.kind import Made, Raw, table_of, text_of
from mmtrain.data.ingest.media import from_base64
from mmtrain.data.ingest.text import JsonKind

_LARGEST = 1 << 22  # entries of a similarity matrix
_WANTED = "text_list, image_info, similarity_matrix"


@dataclass(frozen=True)
class _Placed:
    """A picture before the sentence that it belongs to."""

    image: int
    sentence: int
    similarity: float


class Mmc4(JsonKind):
    """Documents of sentences, each picture before the one it belongs to."""

    name = "mmc4"
    advice = "Does --images name the folder or the tars of the pictures?"
    options = ("images", "clip_threshold")

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """Sentences and the pictures above the threshold; raises Dropped."""
        record = table_of(raw.content, _WANTED)
        sentences, infos = _list(record, "text_list"), _list(record, "image_info")
        noted: Counter[str] = Counter()
        pictures = self._pictures(infos, noted)
        placed = _placed(record, infos, sentences, list(pictures))
        kept = [item for item in placed if item.similarity >= self.given.clip_threshold]
        if below := len(pictures) - len(kept):
            noted["pictures below the CLIP threshold, or without a sentence"] = below
        if not kept:
            raise Dropped(
                Reason.threshold, f"none of {len(pictures)} pictures reaches the threshold"
            )
        url = record.get("url")
        meta = {"url": url} if isinstance(url, str) else {}
        return Made("page", _parts(sentences, kept, pictures), meta, noted)

    def _pictures(self, infos: Sequence[Any], noted: Counter[str]) -> dict[int, bytes]:
        """The pictures that are there and can be decoded, by their place in the record."""
        found: dict[int, bytes] = {}
        first: Dropped | None = None
        for number, info in enumerate(infos):
            try:
                found[number] = self._picture(table_of(info, "image_name"))
            except Dropped as dropped:
                noted[f"pictures of kept pages: {dropped.reason.value}"] += 1
                first = first or dropped
        if first is not None and not found:
            raise first
        if not found:
            raise Dropped(Reason.no_image, "image_info is empty")
        return found

    def _picture(self, info: Mapping[str, Any]) -> bytes:
        name, embedded = info.get("image_name"), info.get("image_base64")
        if isinstance(embedded, str):
            return self.media.stored(from_base64(embedded, str(name)), str(name))
        if not isinstance(name, str) or not name:
            raise Dropped(Reason.fields, "image_name is no text")
        return self.media.read(name)


def _placed(
    record: Mapping[str, Any], infos: Sequence[Any], sentences: Sequence[Any], there: list[int]
) -> list[_Placed]:
    matrix = record.get("similarity_matrix")
    if matrix is None:
        return [_matched(number, infos[number], len(sentences)) for number in there]
    similarity = _matrix(matrix, len(infos), len(sentences))[there]
    return [
        _Placed(there[row], column, float(similarity[row, column]))
        for row, column in assign(similarity)
    ]


def _matched(number: int, info: Mapping[str, Any], sentences: int) -> _Placed:
    place, similarity = info.get("matched_text_index"), info.get("matched_sim")
    if type(place) is not int or not 0 <= place < sentences:
        raise Dropped(
            Reason.fields, f"matched_text_index is {place!r}; wanted: 0 to {sentences - 1}"
        )
    if type(similarity) not in (int, float) or not math.isfinite(similarity):  # type: ignore[arg-type]
        raise Dropped(Reason.fields, f"matched_sim is {similarity!r}; wanted: a number")
    return _Placed(number, place, float(similarity))  # type: ignore[arg-type]


def _matrix(value: Any, images: int, sentences: int) -> NDArray[np.float64]:
    wanted = (images, sentences)
    if images * sentences > _LARGEST:
        raise Dropped(Reason.large, f"{images} pictures and {sentences} sentences are too many")
    try:
        matrix = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise Dropped(Reason.fields, f"similarity_matrix holds no numbers: {error}") from error
    if matrix.shape != wanted or not np.isfinite(matrix).all():
        raise Dropped(
            Reason.fields, f"similarity_matrix has shape {matrix.shape}; wanted: {wanted}, finite"
        )
    return matrix


def _parts(
    sentences: Sequence[Any], kept: Sequence[_Placed], pictures: Mapping[int, bytes]
) -> list[Part]:
    by_sentence: dict[int, list[int]] = {}
    for item in kept:
        by_sentence.setdefault(item.sentence, []).append(item.image)
    parts: list[Part] = []
    for number, sentence in enumerate(sentences):
        own = by_sentence.get(number, [])
        if not own and isinstance(sentence, str) and not sentence.strip():
            continue
        text = text_of(sentence, f"text_list {number}")
        place = len(parts) + len(own)
        parts += [
            Part(modality=Modality.image, media=(pictures[image],), match=place) for image in own
        ]
        parts.append(Part(modality=Modality.text, text=text))
    return parts


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise Dropped(Reason.fields, f"{key} is no list; wanted: {_WANTED}")
    return value
