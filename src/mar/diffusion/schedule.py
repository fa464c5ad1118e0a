"""The noise schedule of the diffusion head, in float64: cosine betas, respaced to fewer steps.

Source: improved DDPM (arXiv 2102.09672), equations 17 and 10 (posterior variance); the paper's section 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_BETA = 0.999


@dataclass(frozen=True)
class Schedule:
    """Betas of a diffusion process of T steps and, for each, the timestep number that the network was trained with."""

    betas: Float[Tensor, " T"]
    timesteps: Int[Tensor, " T"]

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " T"]:
        """alpha-bar_t: the share of the clean token's variance that is left after step t."""
        return torch.cumprod(1 - self.betas, 0)

    @cached_property
    def alphas_cumprod_prev(self) -> Float[Tensor, " T"]:
        """alpha-bar_{t-1}, 1 before the first step."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Float[Tensor, " T"]:
        """Variance of q(x_{t-1} | x_t, x_0)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Float[Tensor, " T"]:
        """Its logarithm, where the first step, whose variance is 0, takes the second's value."""
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        return variance.log()

    @cached_property
    def posterior_mean_x0(self) -> Float[Tensor, " T"]:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_xt(self) -> Float[Tensor, " T"]:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)


def cosine(steps: int) -> Schedule:
    """beta_t = 1 - f((t+1)/T) / f(t/T), f(u) = cos^2(pi/2 (u + 0.008) / 1.008), at most 0.999."""

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((t + 1) / steps) / f(t / steps), MAX_BETA) for t in range(steps)]
    return Schedule(torch.tensor(betas, dtype=torch.float64), torch.arange(steps))


def respace(schedule: Schedule, steps: int) -> Schedule:
    """The schedule of `steps` evenly spaced timesteps of a longer one, both ends included, with the same alpha-bar."""
    total = len(schedule)
    if not 1 <= steps <= total:
        raise ValueError(f"diffusion steps: got {steps}, expected 1 to {total}, the length of the trained schedule")
    stride = (total - 1) / max(steps - 1, 1)
    kept = torch.tensor([round(stride * i) for i in range(steps)] if steps > 1 else [total - 1])
    alphas_cumprod = schedule.alphas_cumprod[kept]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(1 - alphas_cumprod / previous, schedule.timesteps[kept])
