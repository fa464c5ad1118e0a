"""Rotary position embeddings in two dimensions.

Half of the angles follow the row of a token and half its column: attention depends on the distance of two tokens.
Source: Su et al. (arXiv 2104.09864). Letters of shapes: n images, s tokens, h heads, d features of a head, b buffer
tokens, L tokens of the grid.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BASE = 100.0
"""Base of the frequencies. The slowest angle has a period of nearly 2 pi BASE rows, far more than grids have."""


def rope_cache(
    buffer_size: int, grid: tuple[int, int], head_width: int, *, trained: tuple[int, int] | None = None
) -> Float[Tensor, "b_and_L half_d two"]:
    """Compute cosine and sine of every token's angles; buffer tokens have angle 0.

    The table is real even on the meta device, since no weights file has it.

    Args:
        buffer_size: number of buffer tokens.
        grid: rows and columns of tokens.
        head_width: features of a head.
        trained: rows and columns to spread the tokens over (arXiv 2306.15595; None: those of `grid`).
    """

    def count(end: int) -> Tensor:
        return torch.arange(end, dtype=torch.float64, device="cpu")

    inv_freq = BASE ** -(count(head_width // 4) / (head_width // 4))
    places = [count(end) for end in grid]
    if trained is not None:  # centers of tokens, as `resize_positions` has them
        places = [(place + 0.5) * (old / len(place)) - 0.5 for place, old in zip(places, trained, strict=True)]
    rows, columns = torch.meshgrid(*places, indexing="ij")
    angles = torch.cat([coordinate.reshape(-1, 1) * inv_freq for coordinate in (rows, columns)], dim=1)
    angles = torch.cat([angles.new_zeros(buffer_size, head_width // 2), angles])
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def apply_rope(x: Float[Tensor, "n s h d"], rope: Float[Tensor, "#n s half_d two"]) -> Float[Tensor, "n s h d"]:
    """Rotate features i and i + d/2 of every head by the token's i-th angle."""
    cos, sin = rope.to(x.dtype).unsqueeze(2).unbind(-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
