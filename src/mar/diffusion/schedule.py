"""Noise schedules of the diffusion head, in float64.

Betas are of the cosine schedule or of a linear path, and may be respaced to fewer steps.
Source: improved DDPM (arXiv 2102.09672), equations 17 and 10 (posterior variance); paper, section 4.1. Spacing by
log-SNR: DPM-Solver (arXiv 2206.00927), section 3. The linear path: flow matching (arXiv 2210.02747), example II.
Letters of shapes: T timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar.config import HeadConfig, TimestepSpacing

MAX_BETA = 0.999
"""Upper limit of beta in the cosine schedule."""


@dataclass(frozen=True)
class Schedule:
    """Betas of a diffusion process of T steps."""

    betas: Float[Tensor, " T"]
    timesteps: Int[Tensor, " T"]
    """Timestep of the training schedule at each step: the network's input."""

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " T"]:
        """alpha-bar_t: the share of signal in the variance of x_t."""
        return torch.cumprod(1 - self.betas, 0)

    @cached_property
    def alphas_cumprod_prev(self) -> Float[Tensor, " T"]:
        """alpha-bar_{t-1}, 1 before the first step."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def log_snr(self) -> Float[Tensor, " T"]:
        """lambda_t = log(sqrt(alpha-bar_t) / sqrt(1 - alpha-bar_t)), half the logarithm of the SNR; falls with t."""
        return 0.5 * (self.alphas_cumprod.log() - (-self.alphas_cumprod).log1p())

    @cached_property
    def posterior_variance(self) -> Float[Tensor, " T"]:
        """Variance of q(x_{t-1} | x_t, x_0)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Float[Tensor, " T"]:
        """Its logarithm; the first step, of variance 0, takes the second's."""
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        return variance.log()

    @cached_property
    def posterior_mean_coef1(self) -> Float[Tensor, " T"]:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Float[Tensor, " T"]:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)


def training_schedule(head: HeadConfig) -> Schedule:
    """Return the schedule that a head is trained on."""
    return (cosine if head.path == "cosine" else linear)(head.diffusion_steps)


def cosine(steps: int) -> Schedule:
    """Return the cosine schedule.

    beta_t = 1 - f((t+1)/T) / f(t/T), at most 0.999, with f(u) = cos^2(pi/2 (u + 0.008) / 1.008).
    """
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    betas = [min(1 - after / before, MAX_BETA) for before, after in pairwise(f)]
    return Schedule(torch.tensor(betas, dtype=torch.float64), torch.arange(steps))


def linear(steps: int) -> Schedule:
    """Return the linear path of flow matching, made variance preserving.

    The path (1 - u) x_0 + u noise, u = (t + 1/2) / T, is divided by its standard deviation. That leaves the
    signal-to-noise ratio at every t the same.
    """
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return _from_alphas_cumprod((1 - u).square() / ((1 - u).square() + u.square()), torch.arange(steps))


def respace(schedule: Schedule, steps: int, spacing: TimestepSpacing = "time", start_t: float = 1.0) -> Schedule:
    """Return `steps` timesteps of a longer schedule, with the same alpha-bar.

    Args:
        schedule: the training schedule.
        steps: number of timesteps. A single one is the noisiest.
        spacing: evenly in time or in log-SNR.
        start_t: the noisiest timestep, as a share of the length of `schedule`.

    Raises ValueError for more steps than there are timesteps.
    """
    last = last_timestep(len(schedule), start_t)
    if not 1 <= steps <= last + 1:
        available = f"the training schedule's {len(schedule)} timesteps up to start_t {start_t}"
        raise ValueError(f"diffusion steps: got {steps}, expected 1 to {last + 1}, {available}")
    if steps == len(schedule):
        return schedule
    index = torch.tensor([last]) if steps == 1 else _SPACINGS[spacing](schedule, steps, last)
    return _from_alphas_cumprod(schedule.alphas_cumprod[index], schedule.timesteps[index])


def last_timestep(length: int, start_t: float) -> int:
    """Return the noisiest timestep in use; timesteps count from 0."""
    return round(start_t * (length - 1))


def _from_alphas_cumprod(alphas_cumprod: Float[Tensor, " T"], timesteps: Int[Tensor, " T"]) -> Schedule:
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(1 - alphas_cumprod / previous, timesteps)


def _evenly_in_time(schedule: Schedule, steps: int, last: int) -> Int[Tensor, " steps"]:
    stride = last / (steps - 1)
    return torch.tensor([round(stride * i) for i in range(steps)])


def _evenly_in_log_snr(schedule: Schedule, steps: int, last: int) -> Int[Tensor, " steps"]:
    """Return the timesteps nearest to even steps of log-SNR, each once.

    A timestep that is taken already moves up to the next, or down at the noisy end.
    """
    log_snr = schedule.log_snr[: last + 1]
    even = torch.linspace(float(log_snr[0]), float(log_snr[-1]), steps, dtype=torch.float64)
    nearest = (log_snr - even.unsqueeze(1)).abs().argmin(1)
    index = torch.arange(steps)
    distinct = (nearest - index).cummax(0).values + index
    return torch.minimum(distinct, last - index.flip(0))


_SPACINGS = {"time": _evenly_in_time, "log-snr": _evenly_in_log_snr}
