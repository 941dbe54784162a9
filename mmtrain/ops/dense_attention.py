"""Dense attention: the one door to torch's `scaled_dot_product_attention`.

On a GPU the backend is forced: those of `select.dense_backends`, in that order, the first that
takes the call. Left to itself torch decides by its version, by that of cuDNN and by the
environment; on Hopper the difference is 1.7 to 2.3 times. The backward pass is of the backend that
ran forward.

Forcing takes 17 us of the host a call, less than launching attention does. A CPU has one fast
backend: nothing is forced, and the detour takes 0.8 us (a call of 2 heads, 8 rows: 7 us). Models of
diffusers call torch themselves and get its own order.

H heads   T query rows   S keys   K head width
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmtrain.ops.select import Shapes, dense_backends


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    shapes: Shapes = Shapes.REPEATED,
) -> Tensor:
    """Softmax attention of every query row over all keys, or those that a mask leaves.

    Args:
        q: queries `[..., H, T, K]`.
        k: keys `[..., H, S, K]`.
        v: values, of the keys' shape.
        mask: boolean, true where a row sees a key, or added to the logits; broadcasts to
            `[..., H, T, S]`.
        causal: row t sees keys up to t; without a mask.
        scale: factor on the logits; None for `K ** -0.5`.
        shapes: how much they vary from call to call.

    Returns:
        `[..., H, T, K]`.
    """
    backends = _forced(q, shapes)
    if not backends:
        return scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)
    with sdpa_kernel(list(backends), set_priority=True):
        return scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)


def _forced(q: Tensor, shapes: Shapes) -> tuple[SDPBackend, ...]:
    if q.device.type != "cuda":
        return ()
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    return dense_backends(q.device, dtype, q.shape[-1], shapes)
