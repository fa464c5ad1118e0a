"""Which tokens are hidden when: orders, the mask ratio of training, the reveal schedules of sampling.

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
"""Of the exponential reveal schedule; eMIGM's (arXiv 2503.07197)."""


def random_order(length: int, generator: torch.Generator) -> Int[Tensor, " L"]:
    """A random permutation of the token positions; tokens are revealed from its end to its start."""
    return torch.randperm(length, generator=generator)


def draw_mask_ratio(minimum: float, generator: torch.Generator) -> float:
    """One draw of a normal(1, 0.25) truncated to [minimum, 1], by inverting its CDF.

    The range is the paper's (section 4.2), the distribution that of the released code.
    """
    if minimum >= 1:
        return 1.0
    normal = torch.distributions.Normal(1.0, 0.25)
    low, high = normal.cdf(torch.tensor([minimum, 1.0], dtype=torch.float64))
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return float(normal.icdf(low + (high - low) * uniform).clamp(minimum, 1.0))


def masked_count(length: int, ratio: float) -> int:
    """How many of `length` tokens a mask ratio hides: ceil(L * ratio)."""
    return min(length, math.ceil(length * ratio))


def split_by_mask(order: Int[Tensor, "n L"], masked: int) -> tuple[Int[Tensor, "n m"], Int[Tensor, "n v"]]:
    """Positions (hidden, visible), each ascending, when the first `masked` of each order are hidden."""
    return order[:, :masked].sort(dim=1).values, order[:, masked:].sort(dim=1).values


def apply_order(order: Int[Tensor, " L"], grid: tuple[int, int], kind: Order) -> Int[Tensor, " L"]:
    """A random order made one of another kind, for tokens in rows and columns; all randomness is that of `order`."""
    if kind == "checkerboard":
        return checkerboard_first(order, grid)
    return halton_order(order, grid) if kind == "halton" else order


def checkerboard_first(order: Int[Tensor, " L"], grid: tuple[int, int]) -> Int[Tensor, " L"]:
    """Reveals the black squares before the white ones, each in the order they have (GtR, arXiv 2510.17171)."""
    white = (order // grid[1] + order % grid[1]) % 2 == 1
    return torch.cat([order[white], order[~white]])


def halton_order(order: Int[Tensor, " L"], grid: tuple[int, int]) -> Int[Tensor, " L"]:
    """Reveals tokens spread out, by the Halton sequence of bases 2 and 3 (arXiv 2503.17076).

    It begins at the token that `order` reveals first, and is wrapped around the grid: one order for each token.
    """
    rows, columns = grid
    row, column = halton_places(rows, columns).unbind(1)
    down, right = divmod(int(order[-1]), columns)
    places = (row + down - row[0]) % rows * columns + (column + right - column[0]) % columns
    return places.flip(0).to(order.device)


@lru_cache(maxsize=16)
def halton_places(rows: int, columns: int) -> Int[Tensor, "L 2"]:
    """Row and column of every cell of a grid, in the order in which the Halton sequence first falls into it."""
    places: dict[tuple[int, int], None] = {}
    index = 0
    while len(places) < rows * columns:
        index += 1
        places.setdefault((int(van_der_corput(index, 2) * rows), int(van_der_corput(index, 3) * columns)))
    return torch.tensor(list(places))


def van_der_corput(index: int, base: int) -> float:
    """The digits of `index` mirrored at the point: 1, 2, 3 in base 2 are 1/2, 1/4, 3/4."""
    value, share = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        share /= base
        value += digit * share
    return value


def mask_schedule(unknown: int, steps: int, kind: MaskSchedule = "cosine") -> list[int]:
    """How many tokens stay hidden after each step (MaskGIT's cosine; paper, section 4.2).

    n_k = max(1, min(n_{k-1} - 1, floor(M hidden_share((k+1)/K)))), and 0 after the last step, which draws all that are
    left. Every step reveals at least one token, so that K > M means K = M; without unknown tokens there is no step.
    """
    if not unknown:
        return []
    steps = min(steps, unknown)
    remaining, schedule = unknown, []
    for k in range(steps):
        share = masked_fraction(k + 1, steps, kind)
        remaining = max(1, min(remaining - 1, math.floor(unknown * share)))
        schedule.append(remaining)
    return [*schedule[:-1], 0]


def masked_fraction(done: int, steps: int, kind: MaskSchedule) -> float:
    """cos(pi/2 u), or (1 - e^(-5 (1-u))) / (1 - e^-5), where u is the share of steps done: both fall from 1 to 0."""
    if kind == "exponential":
        return math.expm1(-EXPONENT * (1 - done / steps)) / math.expm1(-EXPONENT)
    return math.cos(math.pi / 2 * done / steps)


def unknown_order(order: Int[Tensor, " L"], unknown: Bool[Tensor, " L"]) -> Int[Tensor, " M"]:
    """The part of an order that is to be generated."""
    return order[unknown[order]]
