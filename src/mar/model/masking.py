"""Orders of tokens, the mask ratio of training, and the mask schedule of sampling.

Pure functions. Letters: n images, L tokens, K reveal steps, M unknown tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mar.config import MaskSchedule, Order

EXPONENT = 5.0
"""Exponent of the exponential mask schedule, from eMIGM (arXiv 2503.07197)."""


def random_order(length: int, generator: torch.Generator) -> Int[Tensor, " L"]:
    """Draw a permutation of the token positions; tokens are revealed from its end to its start."""
    return torch.randperm(length, generator=generator)


def draw_mask_ratio(minimum: float, generator: torch.Generator) -> float:
    """Draw from a normal(1, 0.25) truncated to [minimum, 1], by inverting its CDF.

    The range is the paper's (section 4.2), the distribution that of the released code.
    """
    if minimum >= 1:
        return 1.0
    normal = torch.distributions.Normal(1.0, 0.25)
    low, high = normal.cdf(torch.tensor([minimum, 1.0], dtype=torch.float64))
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return float(normal.icdf(low + (high - low) * uniform).clamp(minimum, 1.0))


def masked_count(length: int, ratio: float) -> int:
    """Return how many of `length` tokens a mask ratio masks: ceil(L * ratio)."""
    return min(length, math.ceil(length * ratio))


def split_by_mask(order: Int[Tensor, "n L"], masked: int) -> tuple[Int[Tensor, "n m"], Int[Tensor, "n v"]]:
    """Return the positions (masked, visible), each ascending: the first `masked` of each order are masked."""
    return order[:, :masked].sort(dim=1).values, order[:, masked:].sort(dim=1).values


def apply_order(order: Int[Tensor, " L"], grid: tuple[int, int], kind: Order) -> Int[Tensor, " L"]:
    """Turn a random order into one of another kind, for tokens on a grid; no other randomness is used."""
    if kind == "checkerboard":
        return checkerboard_first(order, grid)
    return halton_order(order, grid) if kind == "halton" else order


def checkerboard_first(order: Int[Tensor, " L"], grid: tuple[int, int]) -> Int[Tensor, " L"]:
    """Reveal the black squares of a checkerboard before the white ones (GtR, arXiv 2510.17171)."""
    white = (order // grid[1] + order % grid[1]) % 2 == 1
    return torch.cat([order[white], order[~white]])


def halton_order(order: Int[Tensor, " L"], grid: tuple[int, int]) -> Int[Tensor, " L"]:
    """Reveal tokens far from each other, by the Halton sequence of bases 2 and 3 (arXiv 2503.17076).

    The sequence begins at the token that `order` reveals first, and wraps around the grid.
    """
    rows, columns = grid
    row, column = halton_places(rows, columns).unbind(1)
    down, right = divmod(int(order[-1]), columns)
    places = (row + down - row[0]) % rows * columns + (column + right - column[0]) % columns
    return places.flip(0).to(order.device)


@lru_cache(maxsize=16)
def halton_places(rows: int, columns: int) -> Int[Tensor, "L 2"]:
    """Return row and column of every cell of a grid, in the order of the Halton sequence."""
    places: dict[tuple[int, int], None] = {}
    index = 0
    while len(places) < rows * columns:
        index += 1
        places.setdefault((int(van_der_corput(index, 2) * rows), int(van_der_corput(index, 3) * columns)))
    return torch.tensor(list(places))


def van_der_corput(index: int, base: int) -> float:
    """Mirror the digits of `index` at the point: 1, 2, 3 in base 2 give 1/2, 1/4, 3/4."""
    value, weight = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        weight /= base
        value += digit * weight
    return value


def mask_schedule(unknown: int, steps: int, kind: MaskSchedule = "cosine") -> list[int]:
    """Return how many tokens stay masked after each step (MaskGIT's cosine; paper, section 4.2).

    n_k = max(1, min(n_{k-1} - 1, floor(M masked_fraction((k+1)/K)))), and 0 after the last step, which draws all that
    are left. Every step reveals at least one token, so that K > M means K = M. Without unknown tokens there is no step.
    """
    if not unknown:
        return []
    steps = min(steps, unknown)
    remaining, schedule = unknown, []
    for k in range(steps):
        fraction = masked_fraction(k + 1, steps, kind)
        remaining = max(1, min(remaining - 1, math.floor(unknown * fraction)))
        schedule.append(remaining)
    return [*schedule[:-1], 0]


def masked_fraction(done: int, steps: int, kind: MaskSchedule) -> float:
    """Return cos(pi/2 u), or (1 - e^(-5 (1-u))) / (1 - e^-5), with u = done / steps: both fall from 1 to 0."""
    if kind == "exponential":
        return math.expm1(-EXPONENT * (1 - done / steps)) / math.expm1(-EXPONENT)
    return math.cos(math.pi / 2 * done / steps)


def unknown_order(order: Int[Tensor, " L"], unknown: Bool[Tensor, " L"]) -> Int[Tensor, " M"]:
    """Return the part of an order that is to be generated."""
    return order[unknown[order]]
