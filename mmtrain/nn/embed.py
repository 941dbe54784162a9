"""Token embeddings with visual rows spliced in.

T tokens   D width   M = N * Q visual rows   P carried rows
"""

import torch
from torch import Tensor, nn

from mmtrain.nn.flow import CARRY, Flow


def splice(rows_TD: Tensor, slots_M: Tensor, visual_MD: Tensor) -> Tensor:
    """Overwrite row `slots[m]` by visual row m; slot T is a trash row.

    Dummy images go to the trash row, which is cut off again: their gradients are exactly zero and
    those of the text are bit-equal to a batch without images.
    """
    rows = torch.cat([rows_TD, rows_TD.new_zeros(1, rows_TD.shape[-1])])
    return torch.index_put(rows, (slots_M,), visual_MD.to(rows.dtype))[:-1]


class SplicedEmbedding(nn.Module):
    """The first trunk layer: visual rows in, token rows out.

    Where nothing is carried yet, rows named by the field `carry` are copied, detached, into
    `Flow.carried`: the regression targets of the last layer. Under sequence parallelism `scatter`
    keeps this rank's rows; the carried rows stay whole.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        """Allocate the token table `[vocabulary, width]`."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.scatter = nn.Identity()

    def forward(self, flow: Flow) -> Flow:
        """`hidden [N, Q, D]` (or `[N Q, D]`) to `hidden [T, D]` and `carried [P, D]`."""
        fields = flow.fields
        visual_MD = flow.hidden.reshape(-1, flow.hidden.shape[-1])
        rows_TD = splice(self.tokens(fields["tokens"]), fields["slots"], visual_MD)
        carried_PD = rows_TD.detach()[fields[CARRY]] if flow.carried is None else flow.carried
        return Flow(self.scatter(rows_TD), fields, carried_PD, flow.derived)
