"""WebDataset tars of pictures with captions, as LAION-2B and LAION-COCO are passed around.

Members of one sample follow each other and share their name up to its first dot: `000123.jpg`,
`000123.txt`, `000123.json`. The caption is `.txt`, or a key of `.json`; with `--text KEY` it is
always that key.
"""

import json
from collections.abc import Iterator
from typing import Any

from mmtrain.data.document import Modality, Part
from mmtrain.data.ingest.archives import samples, whole
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile
from mmtrain.data.ingest.kind import Kind, Made, Raw, table_of, text_of

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("caption", "text", "TEXT", "top_caption")  # keys of a caption, the first that is there
_READ = (*PICTURES, "txt", "json")
_KEPT = ("url", "key", "similarity")  # of the JSON, in the document's meta


class WebDataset(Kind):
    """Documents of a picture and its caption."""

    name = "webdataset"
    advice = "Is --text a key of the JSON members?"
    endings = (".tar", ".tar.gz", ".tgz")
    options = ("text",)

    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Samples of a tar; those that are passed over are not read."""
        return samples(file.path, _READ.__contains__, skip)

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """The picture, then its caption; raises Dropped."""
        fields = whole(raw.content)
        told = _json_of(fields)
        name = next((ending for ending in PICTURES if ending in fields), None)
        if name is None:
            raise Dropped(Reason.no_image, f"holds {', '.join(sorted(fields))}, no picture")
        text = self._caption(fields, told)
        picture = self.media.stored(fields[name], f"{raw.name}.{name}")
        meta = {kept: told[kept] for kept in _KEPT if isinstance(told.get(kept), str | float | int)}
        parts = (
            Part(modality=Modality.image, media=(picture,)),
            Part(modality=Modality.text, text=text),
        )
        return Made("caption", parts, {"key": raw.name} | meta)

    def _caption(self, fields: dict[str, Any], told: dict[str, Any]) -> str:
        wanted = self.given.text
        if wanted is None and "txt" in fields:
            return text_of(fields["txt"], "txt")
        keys = CAPTIONS if wanted is None else (wanted,)
        key = next((key for key in keys if told.get(key) is not None), None)
        if key is None:
            raise Dropped(Reason.no_text, f"no txt, and no {' or '.join(keys)} in json")
        return text_of(told[key], key)


def _json_of(fields: dict[str, Any]) -> dict[str, Any]:
    if "json" not in fields:
        return {}
    try:
        return dict(table_of(json.loads(fields["json"]), "caption"))
    except (ValueError, RecursionError) as error:
        raise Dropped(Reason.syntax, f"json is no JSON: {error}") from error
