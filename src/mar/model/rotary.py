"""Rotary position embeddings on a grid: queries and keys are turned by angles that follow from where a token stands,
so that attention sees how far two tokens are apart, in rows and in columns.

Source: Su et al. (arXiv 2104.09864); in two dimensions, half of the angles follow the row and half the column. Letters
of shapes: n images, s tokens, h heads, d features of a head, b buffer tokens, L tokens of the grid.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BASE = 100.0
"""The slowest angle makes a turn in about 2 pi times as many rows: far more than grids have."""


def rope_cache(buffer: int, grid: tuple[int, int], width: int) -> Float[Tensor, "b_and_L half_d two"]:
    """Cosine and sine for each pair of a head's `width` features; `buffer` tokens stand nowhere and are not turned.

    On the CPU also where weights are still to come (on the meta device): no file has this table.
    """

    def count(to: int) -> Tensor:
        return torch.arange(to, dtype=torch.float64, device="cpu")

    speeds = BASE ** -(count(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*map(count, grid), indexing="ij")
    angles = torch.cat([place.reshape(-1, 1) * speeds for place in (rows, columns)], dim=1)
    angles = torch.cat([angles.new_zeros(buffer, width // 2), angles])
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def apply_rope(x: Float[Tensor, "n s h d"], by: Float[Tensor, "#n s half_d two"]) -> Float[Tensor, "n s h d"]:
    """Features i and i + d/2 of every head, turned by the i-th angle of their token."""
    cos, sin = by.to(x.dtype).unsqueeze(2).unbind(-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
