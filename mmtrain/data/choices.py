"""What a recipe chooses about mixing and packing; standard library alone, as `data.rules`."""

from enum import Enum


class WeightsBy(Enum):
    """What the weights of sources are shares of."""

    documents = "documents"
    tokens = "tokens"  # positions of a pack, image groups included


class Packing(Enum):
    """How the documents of a window become packs (`data.packing`)."""

    first_fit = "first_fit"  # as few packs as first-fit-decreasing needs, evenly filled
    next_fit = "next_fit"  # in order; a pack is closed by the first document without room
    pad = "pad"  # one document a pack, the rest is padding
    two_sided = "two_sided"  # at most two documents a pack, as Unified-IO 2 pairs them


class Resize(Enum):
    """How pictures get the model's size (`data.resize`); bicubic and antialiased both times."""

    fast = "fast"  # torch's vector code: nearly every pixel equal, 2 to 5 times as fast
    exact = "exact"  # Pillow's, bit for bit the preprocessing of released models


class Overlong(Enum):
    """What becomes of a document that is longer than `max_tokens`."""

    cut = "cut"  # by its rule: between tokens of text, never inside an image or a turn
    drop = "drop"  # left out, counted
