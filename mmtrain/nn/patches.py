"""Squares of a picture or of its latents as rows, and back.

N pictures   C channels, h x w size   k side of a square   n = (h / k) (w / k) squares
"""

import math

from torch import Tensor


def patchify(x: Tensor, k: int) -> Tensor:
    """`[N, C, h, w]` to `[N, n, k k C]`: squares from left to right, then from top to bottom.

    Inside a row stand the k x k places of the square, C numbers each.
    """
    count, channels, height, width = x.shape
    squares = x.view(count, channels, height // k, k, width // k, k)
    return squares.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, k * k * channels)


def unpatchify(rows: Tensor, k: int) -> Tensor:
    """Undo `patchify` of a square picture: `[N, n, k k C]` to `[N, C, h, h]`."""
    count, squares, values = rows.shape
    side = math.isqrt(squares)
    grid = rows.view(count, side, side, k, k, values // k**2)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(count, -1, side * k, side * k)
