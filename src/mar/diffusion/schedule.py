"""The noise schedule of the diffusion head, in float64: cosine betas or a linear path, respaced to fewer steps.

Source: improved DDPM (arXiv 2102.09672), equations 17 and 10 (posterior variance); the paper's section 4.1. Spacing by
log-SNR: DPM-Solver (arXiv 2206.00927), section 3. The linear path: flow matching (arXiv 2210.02747), example II.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar.config import HeadConfig, TimestepSpacing

MAX_BETA = 0.999
"""Upper limit of beta in the cosine schedule."""


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
    def log_snr(self) -> Float[Tensor, " T"]:
        """lambda_t = log(sqrt(alpha-bar_t) / sqrt(1 - alpha-bar_t)): falls with t; half the logarithm of the SNR."""
        return 0.5 * (self.alphas_cumprod.log() - (-self.alphas_cumprod).log1p())

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


def linear(steps: int) -> Schedule:
    """The path (1 - u) x_0 + u noise, u = (t + 1/2) / T, of flow matching, divided by its standard deviation.

    Divided, it is a process like the other one, of the same signal-to-noise ratio at every t: sum of squares 1.
    """
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return _from_alphas((1 - u).square() / ((1 - u).square() + u.square()), torch.arange(steps))


def training_schedule(head: HeadConfig) -> Schedule:
    """The schedule that a head is trained on."""
    return (cosine if head.path == "cosine" else linear)(head.diffusion_steps)


def _from_alphas(alphas_cumprod: Float[Tensor, " T"], timesteps: Int[Tensor, " T"]) -> Schedule:
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(1 - alphas_cumprod / previous, timesteps)


def respace(schedule: Schedule, steps: int, spacing: TimestepSpacing = "time", noisiest: float = 1.0) -> Schedule:
    """The schedule of `steps` timesteps of a longer one, with the same alpha-bar.

    They reach from its first to the share `noisiest` of its length (a single step is that last one), evenly in time or
    in log-SNR. ValueError for more steps than there are timesteps.
    """
    last = last_timestep(len(schedule), noisiest)
    if not 1 <= steps <= last + 1:
        reach = f"the timesteps up to the share {noisiest} of the trained schedule's {len(schedule)}"
        raise ValueError(f"diffusion steps: got {steps}, expected 1 to {last + 1}, {reach}")
    if steps == len(schedule):
        return schedule
    kept = torch.tensor([last]) if steps == 1 else _SPACINGS[spacing](schedule, steps, last)
    return _from_alphas(schedule.alphas_cumprod[kept], schedule.timesteps[kept])


def last_timestep(length: int, noisiest: float) -> int:
    """The noisiest timestep that is used, of a schedule of `length` steps counted from 0."""
    return round(noisiest * (length - 1))


def _evenly_in_time(schedule: Schedule, steps: int, last: int) -> Int[Tensor, " steps"]:
    stride = last / (steps - 1)
    return torch.tensor([round(stride * i) for i in range(steps)])


def _evenly_in_log_snr(schedule: Schedule, steps: int, last: int) -> Int[Tensor, " steps"]:
    """The timesteps nearest to even steps of log-SNR, each taken once: neighbours move up, or down at the noisy end."""
    log_snr = schedule.log_snr[: last + 1]
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), steps, dtype=torch.float64)
    nearest = (log_snr - wanted.unsqueeze(1)).abs().argmin(1)
    place = torch.arange(steps)
    distinct = (nearest - place).cummax(0).values + place
    return torch.minimum(distinct, last - place.flip(0))


_SPACINGS = {"time": _evenly_in_time, "log-snr": _evenly_in_log_snr}
