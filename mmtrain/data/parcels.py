"""What a data worker hands to its rank, as bytes for a pipe.

Plain pickles of plain objects; tensors go as numpy arrays, one copy on each side.
"""

import io
import pickle
from typing import Any

import torch
from torch import Tensor


class _Packer(pickle.Pickler):
    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, Tensor) and found.dtype is not torch.bfloat16:
            return torch.from_numpy, (found.detach().numpy(),)
        return NotImplemented


def packed(result: Any) -> bytes:
    """A result of a worker as bytes."""
    buffer = io.BytesIO()
    _Packer(buffer, protocol=5).dump(result)
    return buffer.getvalue()


def unpacked(parcel: bytes) -> Any:
    """Undo `packed`; for bytes of a worker of this process alone, as a pickle may run code."""
    return pickle.loads(parcel)  # noqa: S301 made by this program, a moment ago
