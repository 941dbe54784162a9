"""Which implementation of an op runs on a device.

One place decides, so that a kernel that comes later is one more row here and nothing else
changes. Every implementation of an op has the same contract as its torch reference.
"""

from enum import Enum

import torch


class AttentionBackend(Enum):
    """Implementations of `ops.attention.interval_attention`."""

    TILES = "tiles"  # tiles of query rows over scaled_dot_product_attention; the reference
    FLEX = "flex"  # FlexAttention with a block mask; needs Triton


def attention_backend(device: torch.device) -> AttentionBackend:
    """The fastest attention over key intervals on `device`."""
    return AttentionBackend.FLEX if device.type == "cuda" else AttentionBackend.TILES
