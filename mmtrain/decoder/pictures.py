"""Latents of all pictures of every document, for families that diffuse inside their trunk.

The same cache as that of conditions (`data.latents`), without conditions: mean and log variance
that a frozen VAE gives for each picture of a document, in stored order. What a sequence takes of a
document is chosen later, so one cache serves every rule and length. Mean and deviation of each
channel stand in its manifest once all parts are there; they are recorded once.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmtrain.data import images, latent_statistics, latents
from mmtrain.data.folders import storage_errors
from mmtrain.data.images import DecodeError
from mmtrain.data.latent_statistics import Sums
from mmtrain.data.latents import Cache, Form, Known, KnownSource, Origin
from mmtrain.data.mixture import Source
from mmtrain.data.tokens import SequenceFormat
from mmtrain.decoder.caching import Encoded, Share, write_parts
from mmtrain.encoders import vae as vaes
from mmtrain.encoders.vae import Vae
from mmtrain.errors import ContentError, MissingError
from mmtrain.models.spec import StoredLatents

log = logging.getLogger(__name__)

_BATCH = 64  # documents whose pictures the VAE sees at a time


def encode_pictures(
    wanted: StoredLatents,
    layout: SequenceFormat,
    sources: Sequence[Source],
    *,
    part_documents: int,
    share: Share,
    device: torch.device,
) -> Encoded:
    """Write the moments of all pictures of some sources.

    Args:
        wanted: the folder to make or to go on with, and what it shall hold.
        layout: how pictures become pixels.
        sources: training and held-out ones.
        part_documents: documents of a part.
        share: which parts are made here.
        device: of the VAE.

    Raises:
        ContentError: the folder was made by another VAE, or this one makes another form.
        StorageError: it cannot be written.
    """
    vae = Vae(wanted.vae, device)
    side = layout.image_size // vae.facts.factor
    made = (2 * vae.facts.channels, side, side)
    if made != wanted.form:
        raise ContentError(
            f"{wanted.vae}: makes moments {made} of pictures of {layout.image_size} pixels, the "
            f"recipe's are {wanted.form}; set model.image to its channels and factor"
        )
    form = Form(kind="fp32", conditions=(0, 0), latents=wanted.form)
    cache = latents.begin(wanted.folder, _origin(wanted), form, torch.zeros(0, 0))
    keyed = [(latents.picture_key(source), source) for source in sources]
    done = write_parts(
        cache,
        keyed,
        lambda source: _Part(vae, layout, source),
        part_documents=part_documents,
        share=share,
    )
    _record(cache, keyed)
    return done


def _record(cache: Cache, keyed: Sequence[tuple[str, Source]]) -> None:
    """Put the statistics of all latents into the manifest, once all parts are there."""
    try:
        for key, source in keyed:
            cache.source(key, len(source.lengths))
    except MissingError:
        log.info("statistics of latents: recorded by the process that writes the last part")
        return
    parts = [path for key, source in keyed for path in cache.folders(key, len(source.lengths))]
    with storage_errors(cache.folder):
        found = latent_statistics.record(cache.folder, parts)
    if found is None:
        log.warning(
            "%s: no statistics of latents recorded, its parts are older than those; latents are "
            "not normalised. To have them, make the folder anew",
            cache.folder,
        )
        return
    log.info(
        "latents of %d pictures: mean %s, deviation %s",
        found.pictures,
        " ".join(f"{value:.3f}" for value in found.mean),
        " ".join(f"{value:.3f}" for value in found.std),
    )


def open_pictures(
    wanted: StoredLatents | None, sources: Sequence[Source]
) -> dict[str, KnownSource]:
    """Moments of every picture that were made before, by source; none where none are wanted.

    Raises:
        MissingError: not all documents of a source are there.
        ContentError: another VAE made them, or they have another form.
    """
    if wanted is None:
        return {}
    cache = Cache(wanted.folder)
    differs = cache.stale(_origin(wanted))
    if cache.form.latents != wanted.form:
        differs.append(f"form: made as {cache.form.latents}, the recipe has {wanted.form}")
    if differs:
        raise ContentError(
            f"model.image.latents {cache.folder} is stale: {'; '.join(differs)}; make it again "
            "with tools/encode_latents.py, or set model.image.latents=null"
        )
    return {
        source.name: cache.source(latents.picture_key(source), len(source.lengths))
        for source in sources
    }


def _origin(wanted: StoredLatents) -> Origin:
    return Origin(
        language="",
        model="",
        tokenizer="",
        condition="",
        unconditional="",
        vae=f"moments {vaes.identity(wanted.vae)}",
        fit="crop",
    )


class _Part:
    """The documents of one part, counted; those without pictures count as made."""

    def __init__(self, vae: Vae, layout: SequenceFormat, source: Source) -> None:
        self.vae, self.layout, self.source = vae, layout, source
        self.made = self.left_out = 0
        self._sums = Sums.none(vae.facts.channels)

    def sums(self) -> Sums | None:
        """Of the latents of all rows so far."""
        return self._sums

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, Known | None]]:
        """(sample id, moments of its pictures or None) of documents start .. stop - 1."""
        for first in range(start, stop, _BATCH):
            numbers = range(first, min(first + _BATCH, stop))
            decoded = [self._pixels(number) for number in numbers]
            counts = [0 if pixels is None else len(pixels) for pixels in decoded]
            found = [picture for pixels in decoded for picture in pixels or ()]
            moments = self.vae.encode(torch.stack(found)).cpu() if found else torch.zeros(0)
            if found:
                self._sums = self._sums + Sums.of(moments)
            parts = torch.split(moments, counts)
            for number, pixels, part in zip(numbers, decoded, parts, strict=True):
                self.made += pixels is not None
                self.left_out += pixels is None
                known = None if pixels is None else Known(torch.zeros(0), part)
                yield self.source.lengths.document(number).sample_id, known

    def _pixels(self, number: int) -> list[Tensor] | None:
        document = self.source.documents.document(number)
        blobs = [blob for part in document.parts for blob in part.media]
        try:
            return [images.decode(blob, self.layout) for blob in blobs]
        except DecodeError as error:
            name = f"{self.source.name}/{document.sample_id}"
            log.warning("%s left out: %s", name, error)
            return None
