"""Latents <-> tokens, and gathering and scattering tokens by position.

Letters of shapes: n images, c channels, h x w latent cells, p patch size, L tokens, d = c*p*p values of a token.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn


def patchify(latents: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "n L d"]:
    """Cut latents into tokens: row-major over the grid, channel-major inside a patch."""
    n, c, h, w = latents.shape
    p = patch_size
    cells = latents.reshape(n, c, h // p, p, w // p, p)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // p) * (w // p), c * p**2)


def unpatchify(tokens: Float[Tensor, "n L d"], patch_size: int, grid: tuple[int, int]) -> Float[Tensor, "n c h w"]:
    """Put tokens together to latents of `grid` = (h, w) cells: the inverse of `patchify`."""
    n, _, d = tokens.shape
    h, w = grid
    p = patch_size
    cells = tokens.reshape(n, h // p, w // p, d // p**2, p, p)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(n, d // p**2, h, w)


def gather_tokens(sequence: Float[Tensor, "n L e"], index: Int[Tensor, "n v"]) -> Float[Tensor, "n v e"]:
    """Return sequence[i, index[i, j]] for every image i; index L, the padding, gives zeros."""
    padded = nn.functional.pad(sequence, (0, 0, 0, 1))
    return padded.gather(1, index.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))


def scatter_tokens(
    background: Float[Tensor, "n L e"], index: Int[Tensor, "n v"], values: Float[Tensor, "n v e"]
) -> Float[Tensor, "n L e"]:
    """Return `background` with values[i, j] at index[i, j]; index L, the padding, is dropped."""
    padded = nn.functional.pad(background, (0, 0, 0, 1))
    return padded.scatter(1, index.unsqueeze(-1).expand_as(values), values)[:, :-1]
