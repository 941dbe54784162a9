"""Where the images of a micro-batch stand: their rows, rotary positions, and who sees them.

    noised, prefix_clean   [IMG] n rows [/IMG]
    copies                 [IMG] n noised rows, n clean rows [/IMG]

Both copies take the same positions and see what stands before the image, but not each other. The
keys of noised rows end with the image (`nn.masks`: `until`), so whatever stands behind sees the
clean rows. A sampler has the same rows: noised ones while it draws, clean ones when it goes on.

An image without its condition is an interval: its noised rows and its begin token see nothing
before that token. Positions stay, and rotary logits know distances alone, so to a sampler the null
condition is one begin token by itself.

N images   n rows an image   T packed rows
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from mmtrain.data.tokens import SequenceFormat
from mmtrain.models.pictures import Pictures
from mmtrain.models.transfusion.config import Positions, TransfusionConfig


@dataclass(frozen=True)
class ImageRows:
    """The images of a micro-batch, in order.

    Attributes:
        begins_N: int64, row of each begin token; 0 for images that stand in for none.
        real_N: boolean, false for those.
        starts_N: int64, first row of each one's document.
        seeds_N: int64, row number of each begin token; 0 for those that stand in for none.
        document_seeds_N: int64, row number of the document's first token.
        followed_N: boolean, whether words follow in the same document.
        rows: n.
        copies: of each image, 1 or 2.
        total: T.
        sees_whole_image: whether a row sees its whole image.
    """

    begins_N: Tensor
    real_N: Tensor
    starts_N: Tensor
    seeds_N: Tensor
    document_seeds_N: Tensor
    followed_N: Tensor
    rows: int
    copies: int
    total: int
    sees_whole_image: bool

    @classmethod
    def of(
        cls, fields: Mapping[str, Tensor], config: TransfusionConfig, layout: SequenceFormat
    ) -> Self:
        """Read them off the fields of the loader."""
        tokens_T, lo_T = fields["tokens"], fields["lo"]
        pictures = Pictures.of(fields, config.group_rows)
        begins_N, real_N = pictures.begins_N, pictures.real_N
        marks = [layout.bos, layout.eos, layout.pad]
        marks += [layout.image_begin, layout.image_slot, layout.image_end]
        words_T = ~torch.isin(tokens_T, torch.tensor(marks))
        row_T = torch.arange(len(tokens_T))
        last_T = torch.zeros_like(row_T).scatter_reduce(
            0, lo_T, torch.where(words_T, row_T, -1), "amax"
        )  # at the first row of each document: its last word
        starts_N = lo_T[begins_N]
        return cls(
            begins_N,
            real_N,
            starts_N,
            seeds_N=pictures.seeds_N,
            document_seeds_N=torch.where(real_N, fields["noise"][starts_N], 0),
            followed_N=real_N & (last_T[starts_N] > begins_N),
            rows=config.image.rows,
            copies=config.copies,
            total=len(tokens_T),
            sees_whole_image=layout.sees_whole_image,
        )

    @cached_property
    def order_N(self) -> Tensor:
        """Images before each one in its document."""
        earlier = self._beside & (self.begins_N[:, None] > self.begins_N)
        return earlier.sum(1)

    @cached_property
    def usable_N(self) -> Tensor:
        """Images of each one's document but for a last one that no words follow."""
        behind = self._beside & (self.begins_N[:, None] < self.begins_N)
        used_N = self.followed_N | behind.any(1)
        return (self._beside & used_N).sum(1)

    @property
    def _beside(self) -> Tensor:
        """Boolean `[N, N]`: of one document."""
        same = self.starts_N[:, None] == self.starts_N
        return same & self.real_N[:, None] & self.real_N

    @property
    def _noised(self) -> Tensor:
        """Rows `[n', n]` of the noised copies of the n' real images."""
        return self.begins_N[self.real_N, None] + 1 + torch.arange(self.rows)

    def without_condition(self, lo_T: Tensor, dropped_N: Tensor) -> Tensor:
        """First keys of the rows when some images see nothing before their begin token."""
        begins = self.begins_N[dropped_N & self.real_N, None]
        own = begins + torch.arange(self.rows + 1)
        return lo_T.index_put((own.flatten(),), begins.expand_as(own).flatten())

    def ends_of_views(self, hi_T: Tensor) -> Tensor:
        """One past the last key of the rows; where there are copies a noised row sees its own."""
        if self.copies == 1 or not self.sees_whole_image:
            return hi_T
        own = self._noised
        return hi_T.index_put((own.flatten(),), (own[:, -1:] + 1).expand_as(own).flatten())

    def ends_of_keys(self) -> Tensor:
        """First row that does not see a key any more, int64 `[T]`; T where keys do not end."""
        until_T = torch.full((self.total,), self.total)
        if self.copies == 1:
            return until_T
        own = self._noised
        return until_T.index_put((own.flatten(),), (own[:, -1:] + 1).expand_as(own).flatten())

    def positions(self, positions_T: Tensor, kind: Positions) -> Tensor:
        """Rotary positions out of places in documents.

        Args:
            positions_T: place of each row in its document.
            kind: what the rows of an image take; copies take the same.
        """
        group = self.copies * self.rows
        own = torch.arange(group)
        saved = own if kind is Positions.shared else own - own % self.rows
        taken = 1 if kind is Positions.shared else self.rows
        begins = self.begins_N[self.real_N]
        inside = begins[:, None] + 1 + own
        ahead_T = torch.zeros_like(positions_T).index_add(
            0, begins + 1 + group, torch.full_like(begins, group - taken)
        )  # what each image saves the rows behind it
        ahead_T = ahead_T.cumsum(0)
        row_T = torch.arange(self.total)
        saved_T = ahead_T - ahead_T[row_T - positions_T]
        saved_T = saved_T.index_add(0, inside.flatten(), saved.expand_as(inside).flatten())
        return positions_T - saved_T
