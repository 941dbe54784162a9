"""Opening a data source: its shards, its length index, its rule."""

from collections.abc import Mapping
from pathlib import Path

from mmtrain.data.cache import ShardCache
from mmtrain.data.mixture import Source
from mmtrain.data.rules import RuleOptions
from mmtrain.data.shards import load_lengths, open_shards
from mmtrain.data.vocabulary import Vocabulary


def open_source(
    name: str,
    path: Path,
    vocabulary: Vocabulary,
    options: RuleOptions,
    *,
    weight: float = 1.0,
    weight_steps: Mapping[int, float] | None = None,
    epochs: float | None = None,
    remote: str | None = None,
    cache: ShardCache | None = None,
) -> Source:
    """Open a dataset written by `write_shards` and indexed by `build_index`.

    Args:
        name: of the source; seeds its order.
        path: folder of the shards; with `remote`, the cache of its files.
        vocabulary: the tokenizer whose lengths are planned with.
        options: how documents become sequences.
        weight: its share, relative to the other sources.
        weight_steps: optimizer step -> weight from there on.
        epochs: how often its documents may come; None = without end.
        remote: where files are fetched from (s3://, gs://, https://, ..., a folder).
        cache: bounds what `path` and the caches of other sources hold.

    Raises:
        MissingError: shards or their length index are not there; says what to run.
        ContentError: they are damaged or stale.
        StorageError, ServiceError: they cannot be read or fetched.
    """
    shards = open_shards(path, remote, cache)
    lengths = load_lengths(shards, vocabulary)
    return Source(
        name=name,
        lengths=lengths,
        documents=shards,
        options=options,
        weight=weight,
        weight_steps=dict(weight_steps or {}),
        epochs=epochs,
    )
