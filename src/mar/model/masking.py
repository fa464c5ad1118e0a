"""Which tokens are hidden when: random orders, the mask ratio of training, the reveal schedule of sampling.

Pure functions. Letters: n images, L tokens, K reveal steps, M unknown tokens.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor


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


def split(order: Int[Tensor, "n L"], masked: int) -> tuple[Int[Tensor, "n m"], Int[Tensor, "n v"]]:
    """Positions (hidden, visible), each ascending, when the first `masked` of each order are hidden."""
    return order[:, :masked].sort(dim=1).values, order[:, masked:].sort(dim=1).values


def reveal_schedule(unknown: int, steps: int) -> list[int]:
    """How many tokens stay hidden after each step (MaskGIT's cosine; paper, section 4.2).

    n_k = max(1, min(n_{k-1} - 1, floor(M cos(pi/2 (k+1)/K)))), and 0 after the last step, which draws all that are
    left. Every step reveals at least one token, so that K > M means K = M; without unknown tokens there is no step.
    """
    if not unknown:
        return []
    steps = min(steps, unknown)
    remaining, schedule = unknown, []
    for k in range(steps):
        remaining = max(1, min(remaining - 1, math.floor(unknown * math.cos(math.pi / 2 * (k + 1) / steps))))
        schedule.append(remaining)
    return [*schedule[:-1], 0]


def unknown_order(order: Int[Tensor, " L"], unknown: Bool[Tensor, " L"]) -> Int[Tensor, " M"]:
    """The part of an order that is to be generated."""
    return order[unknown[order]]
