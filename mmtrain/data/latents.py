"""Conditions and latents of a visual decoder, or latents alone, made once and kept as shards.

What the frozen models make of a document does not change while the decoder is trained; 32 rows of
5,120 in bf16 are 320 KiB a sample (specs of Emu, section 3.3). A cache is a folder:

    manifest.json               what it was made by and of; a run with anything else is refused;
                                of latents of all pictures also their statistics
    null.safetensors            the rows that stand for no condition
    KEY/START-STOP/             MDS shards: one row for each document START .. STOP - 1 of a source
                                in stored order, so that a document is found by its number; the
                                key is the source's name, the hash of its shards and `max_tokens`

Parts of a source may be written by several processes; each appears whole or not at all.

Q condition rows a picture   D their width   C channels, h x w size of what is diffused
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from streaming.base.format.mds.writer import MDSWriter
from torch import Tensor

from mmtrain.data.fetch import HASH
from mmtrain.data.folders import storage_errors, temporary_folder
from mmtrain.data.images import DecodeError
from mmtrain.data.latent_statistics import MANIFEST, Sums
from mmtrain.data.mixture import Source
from mmtrain.data.rows import Rows, open_rows
from mmtrain.errors import ContentError, MissingError, StorageError

COLUMNS = {"id": "str", "conditions": "bytes", "latents": "bytes"}
NULL = "null.safetensors"
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PART = re.compile(r"(\d{12})-(\d{12})")
_SHARD_BYTES = 1 << 26


@dataclass(frozen=True)
class Known:
    """What the frozen models made of a document: conditions `[Q, D]`, latents or moments."""

    conditions: Tensor
    latents: Tensor


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a cache was made by and of; all of it decides what the numbers are.

    Attributes:
        language: hash of the frozen model's weights.
        model: its sizes, as JSON.
        tokenizer: fingerprint.
        condition: rollout or encoder.
        unconditional: prompt or zeros.
        vae: hash of the VAE, or "" for pixels.
        fit: how pictures become squares.
    """

    language: str
    model: str
    tokenizer: str
    condition: str
    unconditional: str
    vae: str
    fit: str


@dataclass(frozen=True, kw_only=True)
class Form:
    """How numbers lie in a cache.

    Attributes:
        kind: fp32, bf16 or fp16, of the conditions; latents are fp32.
        conditions: Q, D; 0, 0 where only pictures are known.
        latents: shape of what is kept for a picture: C, h, w of pixels, 2C, h, w of moments.
    """

    kind: str
    conditions: tuple[int, int]
    latents: tuple[int, int, int]


@dataclass(frozen=True)
class KnownSource:
    """Random access to what is known of the documents of one source."""

    form: Form
    starts: tuple[int, ...]
    parts: tuple[Rows, ...]

    @property
    def blank(self) -> Known:
        """What stands in for a missing sample."""
        return Known(torch.zeros(self.form.conditions), torch.zeros(self.form.latents))

    def read(self, number: int, sample_id: str) -> Known:
        """What is known of document `number`, float32.

        Raises:
            DecodeError: its picture could not be read when the cache was made.
            ContentError: the cache holds another document there.
        """
        row = self._row(number, sample_id)
        return Known(
            _numbers(row["conditions"], KINDS[self.form.kind], self.form.conditions),
            _numbers(row["latents"], torch.float32, self.form.latents),
        )

    def pictures(self, number: int, sample_id: str) -> Tensor:
        """Latents (or moments) of every picture of document `number`, float32 `[n, C, h, w]`.

        Raises:
            DecodeError: one of its pictures could not be read when the cache was made.
            ContentError: the cache holds another document there.
        """
        content = self._row(number, sample_id)["latents"]
        return _numbers(content, torch.float32, (-1, *self.form.latents))

    def _row(self, number: int, sample_id: str) -> dict[str, Any]:
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        row: dict[str, Any] = self.parts[part].row(number - self.starts[part])
        if row["id"] != sample_id:
            raise ContentError(
                f"{self.parts[part].folder.local}: holds {row['id']!r} where document {number} is "
                f"{sample_id!r}; the cache is of other documents, make it again"
            )
        if not row["latents"]:
            raise DecodeError("its picture could not be read when latents were made")
        return row


def _numbers(content: bytes, kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    flat = torch.frombuffer(bytearray(content), dtype=kind)
    return flat.float().view(shape)


class Cache:
    """A folder of conditions and latents."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest.

        Raises:
            MissingError: there is none.
            ContentError: it is damaged.
        """
        self.folder = folder
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
            self.origin = Origin(**content["origin"])
            form = content["form"]
            self.form = Form(
                kind=form["kind"],
                conditions=tuple(form["conditions"]),
                latents=tuple(form["latents"]),
            )
        except FileNotFoundError as error:
            raise MissingError(
                f"{path}: not found; make the folder with tools/encode_latents.py RECIPE {folder}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ContentError(f"{path} is no manifest of a cache ({error!r})") from error

    @property
    def null_QD(self) -> Tensor:
        """The rows that stand for no condition, float32."""
        with safe_open(self.folder / NULL, framework="pt") as file:
            found: Tensor = file.get_tensor("null")
            return found.float()

    def stale(self, origin: Origin) -> list[str]:
        """What differs between the cache and what a run needs, in words."""
        has, needs = asdict(self.origin), asdict(origin)
        return [
            f"{key}: made with {_short(has[key])}, the recipe has {_short(needs[key])}"
            for key in needs
            if has[key] != needs[key]
        ]

    def source(self, key: str, documents: int) -> KnownSource:
        """Everything known of a source of so many documents.

        Raises:
            MissingError: parts are missing; says which documents.
        """
        found = sorted(self._parts(key))
        reached = 0
        for start, stop, _ in found:
            if start == reached:
                reached = stop
        if reached != documents:
            raise MissingError(
                f"{self.folder / key}: documents from {reached} on are not there ({documents} in "
                "the source); run tools/encode_latents.py again, it makes what is missing"
            )
        parts = tuple(open_rows(path, COLUMNS) for _, _, path in found)
        return KnownSource(self.form, tuple(start for start, _, _ in found), parts)

    def _parts(self, key: str) -> Iterator[tuple[int, int, Path]]:
        folder = self.folder / key
        for path in folder.iterdir() if folder.is_dir() else ():
            match = _PART.fullmatch(path.name)
            if match:
                yield int(match[1]), int(match[2]), path

    def folders(self, key: str, documents: int) -> list[Path]:
        """Folders of the parts of a source with so many documents; fewer if some are missing."""
        return [path for start, _, path in sorted(self._parts(key)) if start < documents]

    def has(self, key: str, start: int, stop: int) -> bool:
        """Whether a part is there."""
        return self._place(key, start, stop).is_dir()

    def write(
        self,
        key: str,
        start: int,
        stop: int,
        rows: Iterable[tuple[str, Known | None]],
        sums: Callable[[], Sums | None],
    ) -> None:
        """Write the part of documents start .. stop - 1.

        Args:
            key: of the source.
            start: first document.
            stop: the one behind the last.
            rows: (sample id, what is known or None) of each.
            sums: what is kept beside them, once all are written.

        Raises:
            StorageError: it cannot be written; nothing half-written stays.
        """
        with temporary_folder(self._place(key, start, stop)) as partial:
            with storage_errors(partial):
                writer = MDSWriter(
                    columns=COLUMNS, out=str(partial), hashes=[HASH], size_limit=_SHARD_BYTES
                )
            try:
                for sample_id, known in rows:
                    with storage_errors(partial):
                        writer.write(self._row(sample_id, known))
                with storage_errors(partial):
                    writer.finish()
                    if (found := sums()) is not None:
                        found.write(partial)
            except BaseException:
                writer.cancel_future_jobs()
                raise

    def _place(self, key: str, start: int, stop: int) -> Path:
        return self.folder / key / f"{start:012d}-{stop:012d}"

    def _row(self, sample_id: str, known: Known | None) -> dict[str, Any]:
        if known is None:
            return {"id": sample_id, "conditions": b"", "latents": b""}
        return {
            "id": sample_id,
            "conditions": _bytes(known.conditions, KINDS[self.form.kind]),
            "latents": _bytes(known.latents, torch.float32),
        }


def _bytes(tensor: Tensor, kind: torch.dtype) -> bytes:
    return tensor.to("cpu", kind).contiguous().view(torch.uint8).numpy().tobytes()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def begin(folder: Path, origin: Origin, form: Form, null_QD: Tensor) -> Cache:
    """Make an empty cache, or open the one that is there and was made by the same.

    Raises:
        ContentError: a cache of another origin or form is there.
        StorageError: the folder cannot be written.
    """
    if (folder / MANIFEST).exists():
        cache = Cache(folder)
        differs = cache.stale(origin)
        if cache.form != form:
            differs.append(f"form: made with {cache.form}, asked for {form}")
        if differs:
            raise ContentError(
                f"{folder} was made by something else; name another folder. {'; '.join(differs)}"
            )
        return cache
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(f"{folder}: is not empty and holds no {MANIFEST}; name a new folder")
    content = {"origin": asdict(origin), "form": asdict(form)}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"null": null_QD.to("cpu", torch.float32).contiguous()}, folder / NULL)
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.rename(folder / MANIFEST)
    return Cache(folder)


def key_of(source: Source) -> str:
    """Folder of a source: what it is called, its documents, and where sequences are cut."""
    return f"{source.name}-{source.lengths.dataset[:12]}-{source.options.max_positions}"


def picture_key(source: Source) -> str:
    """Folder of a source of which all pictures are kept, whatever a sequence takes of them."""
    return f"{source.name}-{source.lengths.dataset[:12]}"


def known_sources(cache: Cache, sources: Sequence[Source]) -> dict[str, KnownSource]:
    """What a cache knows of sources, by name.

    Raises:
        MissingError: it does not know all documents of a source.
    """
    return {source.name: cache.source(key_of(source), len(source.lengths)) for source in sources}
