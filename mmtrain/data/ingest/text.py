"""Plain text: JSONL (also .gz, .zip) with a key of text in every record."""

from collections import Counter
from collections.abc import Iterator

from mmtrain.data.document import Modality, Part
from mmtrain.data.ingest.dropped import Dropped, Reason
from mmtrain.data.ingest.files import SourceFile
from mmtrain.data.ingest.kind import Kind, Made, Raw, table_of, text_of
from mmtrain.data.ingest.records import read_records

JSON_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zip", ".json.zip")


class JsonKind(Kind):
    """A kind whose files are JSON records."""

    endings = JSON_FILES

    def records(self, file: SourceFile, skip: int) -> Iterator[Raw]:
        """Entries of the array, or lines."""
        for record in read_records(file.path, skip):
            fault = Dropped(Reason.syntax, record.fault) if record.fault else None
            own = record.value.get("id") if isinstance(record.value, dict) else None
            name = str(own) if isinstance(own, str | int) else ""
            yield Raw(record.number, record.value, name, fault)


class Text(JsonKind):
    """Documents of one text part."""

    name = "text"
    advice = "Is --text the key of the text?"
    options = ("text",)

    def document(self, file: SourceFile, raw: Raw) -> Made:
        """The text; raises Dropped."""
        key = self.given.text or "text"
        table = table_of(raw.content, key)
        text = text_of(table.get(key), key)
        meta = {"id": raw.name} if raw.name else {}
        return Made("text", (Part(modality=Modality.text, text=text),), meta, Counter())
