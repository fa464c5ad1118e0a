"""Learned positions of another grid of tokens.

Letters of shapes: b buffer tokens, L tokens of the old grid, M tokens of the new one, e width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def resize_positions(
    position: Float[Tensor, "b_and_L e"], buffer_size: int, old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "b_and_M e"]:
    """Interpolate learned positions, bicubic; those of buffer tokens stay.

    The corners of both grids' images coincide, not the centers of their first tokens.

    Args:
        position: of the buffer tokens, then of the grid's, row by row.
        buffer_size: number of buffer tokens.
        old, new: rows and columns of tokens.
    """
    cells = position[buffer_size:].T.unflatten(1, old).unsqueeze(0)
    cells = functional.interpolate(cells, new, mode="bicubic", align_corners=False)
    return torch.cat([position[:buffer_size], cells[0].flatten(1).T])
