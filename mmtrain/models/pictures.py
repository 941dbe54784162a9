"""Where the pictures of a micro-batch stand, for families that draw something for each of them.

N pictures   n rows a picture   T packed rows
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Pictures of a micro-batch, those that stand in for none included.

    Attributes:
        begins_N: int64, row of each begin token; 0 for stand-ins.
        real_N: boolean, false for stand-ins.
        seeds_N: int64, row number of each begin token, which the document's draw and the position
            in it decide (`nn.noise`); 0 for stand-ins.
    """

    begins_N: Tensor
    real_N: Tensor
    seeds_N: Tensor

    @classmethod
    def of(cls, fields: Mapping[str, Tensor], rows: int) -> Self:
        """Read them off the fields of the loader; a picture takes `rows` rows."""
        first_N = fields["slots"].view(-1, rows)[:, 0]
        real_N = first_N < len(fields["tokens"])
        begins_N = torch.where(real_N, first_N - 1, 0)
        return cls(begins_N, real_N, torch.where(real_N, fields["noise"][begins_N], 0))


def an_image_each(pairs_P: Tensor, count: int) -> Tensor:
    """One entry for each of `count` images, where the loader gives one for each of its pairs."""
    return pairs_P.view(count, -1)[:, 0].contiguous()
