"""Orders of tokens, mask ratio of training, mask schedule of sampling.

Pure functions. Letters: n images, L tokens, K reveal steps, M unknown tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar.config import MaskDraw, MaskSchedule, ModelConfig, Order

EXPONENT = 5.0
"""Exponent of the exponential mask schedule, from eMIGM (arXiv 2503.07197)."""
END_TIME = 1e-5
"""Time after the last reveal step, from eMIGM."""
EXP_T_MIN = 0.2
"""Least time of eMIGM's training."""
EXP_P_MIN = 0.001
"""Value of p at time 0 in eMIGM's training."""


def random_order(length: int, generator: torch.Generator) -> Int[Tensor, " L"]:
    """Draw a permutation of the positions; tokens are revealed from its end."""
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


def draw_masked_count(config: ModelConfig, generator: torch.Generator) -> int:
    """Draw how many tokens a training step masks, by the model's schedule."""
    return MASK_DRAWS[config.mask_schedule](config, generator)


def _by_normal_ratio(config: ModelConfig, generator: torch.Generator) -> int:
    return masked_count(config.tokens, draw_mask_ratio(config.mask_ratio_min, generator))


def _by_exp_schedule(config: ModelConfig, generator: torch.Generator) -> int:
    """Mask each token with the probability of `exp_mask_probability` at a uniform time; redrawn below 2 tokens."""
    while True:
        t = torch.rand((), generator=generator)
        uniforms = torch.rand(config.tokens, generator=generator)
        masked = int((uniforms < exp_mask_probability(t)).sum())
        if masked >= min(2, config.tokens):
            return masked


def exp_mask_probability(t: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return 1 - e^(-5 p) with p = 0.999 t + 0.001, t at least 0.2 (eMIGM, arXiv 2503.07197)."""
    p = (1 - EXP_P_MIN) * t.clamp(min=EXP_T_MIN) + EXP_P_MIN
    return 1 - torch.exp(-EXPONENT * p)


MASK_DRAWS: dict[MaskDraw, Callable[[ModelConfig, torch.Generator], int]] = {
    "normal": _by_normal_ratio,
    "exp": _by_exp_schedule,
}
"""Training's mask schedules by their names in `ModelConfig`."""


def masked_count(length: int, ratio: float) -> int:
    """Return the number of masked tokens, ceil(L * ratio)."""
    return min(length, math.ceil(length * ratio))


def split_by_mask(order: Int[Tensor, "n L"], masked: int) -> tuple[Int[Tensor, "n m"], Int[Tensor, "n v"]]:
    """Split orders into the first `masked` positions and the rest, both ascending."""
    return order[:, :masked].sort(dim=1).values, order[:, masked:].sort(dim=1).values


def apply_order(order: Int[Tensor, " L"], grid: tuple[int, int], kind: Order) -> Int[Tensor, " L"]:
    """Turn a random order into one of another kind, without further randomness."""
    if kind == "checkerboard":
        return checkerboard_first(order, grid)
    return halton_order(order, grid) if kind == "halton" else order


def checkerboard_first(order: Int[Tensor, " L"], grid: tuple[int, int]) -> Int[Tensor, " L"]:
    """Reveal a checkerboard's black squares before its white ones (GtR, arXiv 2510.17171)."""
    white = (order // grid[1] + order % grid[1]) % 2 == 1
    return torch.cat([order[white], order[~white]])


def halton_order(order: Int[Tensor, " L"], grid: tuple[int, int]) -> Int[Tensor, " L"]:
    """Reveal tokens far from each other, by the Halton sequence (arXiv 2503.17076).

    Its bases are 2 and 3. It begins at the token that `order` reveals first, and wraps around the grid.
    """
    rows, columns = grid
    row, column = halton_cells(rows, columns).unbind(1)
    first_row, first_column = divmod(int(order[-1]), columns)
    positions = (row + first_row - row[0]) % rows * columns + (column + first_column - column[0]) % columns
    return positions.flip(0).to(order.device)


@lru_cache(maxsize=16)
def halton_cells(rows: int, columns: int) -> Int[Tensor, "L 2"]:
    """Return row and column of every cell, in Halton order."""
    cells: dict[tuple[int, int], None] = {}  # a dict keeps the order of insertion
    index = 0
    while len(cells) < rows * columns:
        index += 1
        cells.setdefault((int(van_der_corput(index, 2) * rows), int(van_der_corput(index, 3) * columns)))
    return torch.tensor(list(cells))


def van_der_corput(index: int, base: int) -> float:
    """Mirror the digits of `index` at the radix point.

    In base 2, 1, 2, 3 give 1/2, 1/4, 3/4.
    """
    value, weight = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        weight /= base
        value += digit * weight
    return value


def mask_schedule(unknown: int, steps: int, kind: MaskSchedule = "cosine") -> list[int]:
    """Return the number of tokens still masked after each step.

    n_k = max(1, min(n_{k-1} - 1, floor(M f((k+1)/K)))) with f of `masked_fraction` (paper, section 4.2), and 0 after
    the last step. Every step reveals at least one token, so K > M means K = M. Without unknown tokens there is no step.
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


def masked_fraction(done: float, steps: int, kind: MaskSchedule) -> float:
    """Return cos(pi/2 u) or (1 - e^(-5 (1-u))) / (1 - e^-5), with u = done / steps."""
    if kind == "exponential":
        return math.expm1(-EXPONENT * (1 - done / steps)) / math.expm1(-EXPONENT)
    return math.cos(math.pi / 2 * done / steps)


@lru_cache(maxsize=256)
def step_times(steps: int) -> tuple[float, ...]:
    """Return the times before the first step and after each: from 1 to nearly 0, evenly."""
    times: list[float] = torch.linspace(1, END_TIME, steps + 1).tolist()
    return tuple(times)


@lru_cache(maxsize=256)
def reveal_probabilities(steps: int, kind: MaskSchedule) -> tuple[float, ...]:
    """Return the probability with which each step reveals a masked token: 1 - f(s)/f(t), and 1 in the last step."""
    fractions = [masked_fraction(1 - time, 1, kind) for time in step_times(steps)[:-1]]
    return (*(1 - after / before for before, after in pairwise(fractions)), 1.0)


def unknown_order(order: Int[Tensor, " L"], unknown: Bool[Tensor, " L"]) -> Int[Tensor, " M"]:
    """Return the unknown tokens of an order: those to generate."""
    return order[unknown[order]]
