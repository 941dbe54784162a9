"""Tables of pictures and text: parquet (img2dataset, OBELICS) and Hugging Face datasets on disk.

A row is a picture and its caption; or `texts` and `images`, two lists of which one holds nothing
where the other holds something (OBELICS); or text alone. Pictures are bytes, `{bytes, path}`, or
names of files below `--images`. Needs the extra `mmtrain[parquet]`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain.data.document import Modality, Part
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile, find_files
from mmtrain.data.ingest.kind import IngestOptions, Kind, Made, Raw, text_of
from mmtrain.data.ingest.webdataset import CAPTIONS, PICTURES
from mmtrain.data.vocabulary import Vocabulary
from mmtrain.errors import ContentError, MissingError
from mmtrain.paths import inside

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:  # the extra is optional; `prepare` says how to get it
    pa = pq = None

_IMAGES = ("image", *PICTURES, "image_bytes", "img")  # columns of a picture
_TEXTS = (*CAPTIONS, "txt", "alt_text")
_KEPT = ("key", "url", "id")  # columns that go to the document's meta
_ROWS = 64  # read at a time


class _Columns:
    """Which columns hold what: a picture and its caption, or two lists of a page, or text."""

    def __init__(self, names: Sequence[str], options: IngestOptions, place: Path) -> None:
        """Choose among the columns of a file; raises ContentError."""
        self.page = {"texts", "images"} <= set(names) and not (options.text or options.image)
        self.text = "texts" if self.page else _chosen(options.text, _TEXTS, names)
        self.image = "images" if self.page else _chosen(options.image, _IMAGES, names)
        asked = (options.image and not self.image) or (options.text and not self.text)
        if self.text is None or asked:
            raise ContentError(
                f"{place} holds the columns {', '.join(names)}; wanted: texts and images, or one "
                f"of {', '.join(_TEXTS)} with or without one of {', '.join(_IMAGES)}; name others "
                "by --text and --image"
            )
        wanted = (self.text, self.image, *_KEPT)
        self.read = [name for name in wanted if name is not None and name in names]


def _chosen(given: str | None, known: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in ((given,) if given else known) if name in names), None)


class _Table(Kind):
    """Rows to documents."""

    advice = "Are --text and --image the right columns, and --images the folder of the files?"
    options = ("images", "image", "text")

    def prepare(self, files: Sequence[SourceFile], vocabulary: Vocabulary | None) -> None:
        """Find the columns of the first file."""
        if pa is None:
            raise MissingError(f"reading {self.name} needs pyarrow: pip install 'mmtrain[parquet]'")
        next(self.records(files[0], 0), None)

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """A caption, a page or a text; raises Dropped."""
        columns, row = raw.content
        meta = {name: row[name] for name in _KEPT if isinstance(row.get(name), str | int)}
        if columns.page:
            noted: Counter[str] = Counter()
            return Made("page", self._page(row, noted), meta, noted)
        text = Part(modality=Modality.text, text=text_of(row[columns.text], columns.text))
        if columns.image is None:
            return Made("text", (text,), meta)
        blob = self._picture(row[columns.image], raw.name or f"row {raw.number}")
        return Made("caption", (Part(modality=Modality.image, media=(blob,)), text), meta)

    def _page(self, row: Mapping[str, Any], noted: Counter[str]) -> list[Part]:
        texts, images = row["texts"], row["images"]
        if not isinstance(texts, list) or not isinstance(images, list):
            raise Dropped(Reason.fields, "texts or images is no list")
        if len(texts) != len(images):
            raise Dropped(
                Reason.fields, f"{len(texts)} texts and {len(images)} images; wanted: as many"
            )
        parts: list[Part] = []
        lost: Dropped | None = None
        for place, (text, image) in enumerate(zip(texts, images, strict=True)):
            if image is not None:
                try:
                    blob = self._picture(image, f"image {place}")
                    parts.append(Part(modality=Modality.image, media=(blob,)))
                except Dropped as dropped:
                    noted[f"pictures of kept pages: {dropped.reason.value}"] += 1
                    lost = lost or dropped
            if isinstance(text, bytes | str) and text.strip():
                text = text_of(text, f"text {place}")
                parts.append(Part(modality=Modality.text, text=text))
        if not any(part.media for part in parts):
            raise lost or Dropped(Reason.no_image, "a page without pictures")
        return parts

    def _picture(self, value: Any, name: str) -> bytes:
        if isinstance(value, Mapping):
            name = str(value.get("path") or name)
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self.media.stored(value, name)
        if not isinstance(value, str) or not value:
            raise Dropped(Reason.no_image, f"{name} holds neither bytes nor a name")
        return self.media.read(value)

    def _rows(self, batch: Any, columns: _Columns, number: int) -> Iterator[Raw]:
        batch = batch.select(columns.read)
        _check(batch)
        try:
            rows = batch.to_pylist()
        except ValueError:  # one of its texts is no UTF-8
            rows = [_row(batch.slice(index, 1)) for index in range(len(batch))]
        for row in rows:
            number += 1
            if isinstance(row, Dropped):
                yield Raw(number, None, "", row)
                continue
            name = next((str(row[key]) for key in _KEPT if row.get(key) is not None), "")
            yield Raw(number, (columns, row), name)


def _row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except ValueError as error:
        return Dropped(Reason.text, f"a text of the row is no UTF-8 ({error})")


def _check(batch: Any) -> None:
    """Raise ArrowInvalid where places of a batch lie outside of it: reading would not notice."""
    schema = pa.schema([field.with_type(_as_bytes(field.type)) for field in batch.schema])
    batch.cast(schema).validate(full=True)  # texts may be no UTF-8: that is the row's matter


def _as_bytes(kind: Any) -> Any:
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    return kind


class Parquet(_Table):
    """Rows of parquet files."""

    name = "parquet"
    endings = (".parquet",)

    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Rows; row groups that are passed over are not read."""
        number = 0
        try:
            with pq.ParquetFile(file.path) as table:
                columns = _Columns(table.schema_arrow.names, self.given, file.path)
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if number + rows <= skip:
                        number += rows
                        continue
                    for batch in table.iter_batches(
                        _ROWS, row_groups=[group], columns=columns.read
                    ):
                        for raw in self._rows(batch, columns, number):
                            if raw.number > skip:
                                yield raw
                        number += len(batch)
        except (pa.ArrowException, OSError, EOFError) as error:
            fault = Dropped(Reason.cut, f"the file is damaged ({_short(error)}); fetch it again")
            yield Raw(max(number, skip) + 1, None, "", fault)


class HuggingFace(_Table):
    """Rows of a dataset that `save_to_disk` wrote: its Arrow files in the order it names."""

    name = "huggingface"
    endings = (".arrow",)

    def files(self) -> tuple[SourceFile, ...]:
        """The Arrow files that `state.json` names."""
        splits = self.source / "dataset_dict.json"
        if splits.is_file():
            parts = ", ".join(map(str, _json(splits).get("splits", ())))
            raise ContentError(
                f"{self.source} holds the splits {parts}; name one of them, as SRC/train"
            )
        state = self.source / "state.json"
        if not state.is_file():
            return find_files(self.source, self.endings)
        told = _json(state)
        if told.get("_indices_data_files"):
            raise ContentError(
                f"{state}: the dataset is a selection by indices; write it by "
                "dataset.flatten_indices().save_to_disk()"
            )
        try:
            names = [entry["filename"] for entry in told["_data_files"]]
        except (KeyError, TypeError) as error:
            raise ContentError(f"{state} names no _data_files; save the dataset again") from error
        found = [SourceFile(inside(self.source, name, state), Path(name).stem) for name in names]
        for file in found:
            if not file.path.is_file():
                raise MissingError(f"{file.path} is not there, {state} names it; copy it too")
        if not found:
            raise MissingError(f"{state} names no file; the dataset is empty")
        return tuple(found)

    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Rows; batches that are passed over are not decoded."""
        number = 0
        try:
            with pa.memory_map(str(file.path)) as stream, pa.ipc.open_stream(stream) as reader:
                columns = _Columns(reader.schema.names, self.given, file.path)
                for whole in reader:
                    for start in range(0, len(whole), _ROWS):
                        batch = whole.slice(start, _ROWS)
                        if number + len(batch) > skip:
                            for raw in self._rows(batch, columns, number):
                                if raw.number > skip:
                                    yield raw
                        number += len(batch)
        except (pa.ArrowException, OSError, EOFError) as error:
            fault = Dropped(Reason.cut, f"the file is damaged ({_short(error)}); fetch it again")
            yield Raw(max(number, skip) + 1, None, "", fault)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ContentError(f"{path} is no JSON ({error}); save the dataset again") from error
    if not isinstance(value, dict):
        raise ContentError(f"{path} is no JSON object; save the dataset again")
    return value


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
