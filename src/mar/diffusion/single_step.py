"""DPM-Solver++ of order 3 in single steps: its table and schedule.

It is the solver of eMIGM (arXiv 2503.07197). Source: DPM-Solver++ (arXiv 2211.01095, algorithm 1 and appendix); the
table's arithmetic is that of its authors' code. Time t goes from 1 to 1/N, log alpha and log sigma are interpolated
between the N entries, and the network receives fractional timesteps: t - 1/N times the steps of its training, 1,000 in
eMIGM. With lambda = log(alpha / sigma), a step of order 3 from s to t has its inner times at a third and two thirds of
the way in lambda. The variance of the head is unused.

All arithmetic of the table is float32, as in the published samples: near t = 1/N it loses digits of sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mar.config import HeadConfig, SamplingConfig
from mar.diffusion.gaussian import Coefficients
from mar.diffusion.schedule import Schedule, training_schedule

MIN_LOG_SNR = -5.1
"""Timesteps of the training schedule below this are not used."""


class LogAlphaTable:
    """log alpha, piecewise linear in time; outermost segments continue."""

    def __init__(self, schedule: Schedule) -> None:
        log_alpha = 0.5 * torch.log(1 - schedule.betas).cumsum(0)
        log_snr = log_alpha - 0.5 * torch.log(1 - torch.exp(2 * log_alpha))
        kept = int((log_snr >= MIN_LOG_SNR).sum())
        self.log_alpha = log_alpha[:kept].float()
        self.times = torch.linspace(0, 1, kept + 1)[1:]

    def __len__(self) -> int:
        return len(self.times)

    def log_alpha_at(self, t: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Interpolate log alpha at times."""
        return _interpolate(t, self.times, self.log_alpha)

    def log_snr_at(self, t: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Compute lambda = log(alpha / sigma) at times."""
        log_alpha = self.log_alpha_at(t)
        return log_alpha - 0.5 * torch.log(1 - torch.exp(2 * log_alpha))

    def time_at(self, log_snr: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Invert `log_snr_at`."""
        log_alpha = -0.5 * torch.logaddexp(torch.zeros(1), -2 * log_snr)
        return _interpolate(log_alpha, self.log_alpha.flip(0), self.times.flip(0))


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Interpolate linearly through ascending `xs`, and beyond along the outermost segments."""
    index = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left, right = xs[index - 1], xs[index]
    return ys[index - 1] + (x - left) * (ys[index] - ys[index - 1]) / (right - left)


class SolverStep(NamedTuple):
    """A step over several evaluations."""

    order: int
    u: float
    """Position of the second evaluation, as a share of the step in lambda; 0 for order 1."""
    v: float
    """Position of the third; 0 for orders 1 and 2."""


@dataclass(frozen=True)
class SingleStepSchedule:
    """Times of all evaluations, the noisiest at the end.

    Index 0 is the result's time, where the network is not evaluated.
    """

    timesteps: Float[Tensor, " t"]
    """The network's input, a fraction."""
    times: Float[Tensor, " t"]
    log_alpha: Float[Tensor, " t"]
    steps: tuple[SolverStep, ...]

    def __len__(self) -> int:
        return len(self.times)

    @cached_property
    def alpha(self) -> list[float]:
        """Factors of the signal."""
        return self.log_alpha.exp().tolist()

    @cached_property
    def sigma(self) -> list[float]:
        """Factors of the noise."""
        return (1 - (2 * self.log_alpha).exp()).sqrt().tolist()

    @cached_property
    def log_snr(self) -> list[float]:
        """lambda: half the logarithm of the signal-to-noise ratio."""
        return (self.log_alpha - 0.5 * torch.log(1 - torch.exp(2 * self.log_alpha))).tolist()

    @cached_property
    def coefficients(self) -> list[Coefficients]:
        """Coefficients of x_0 at each time; the posterior's are not used."""
        pairs = zip(self.alpha, self.sigma, strict=True)
        return [Coefficients(alpha, sigma, 1 / alpha, sigma / alpha, 0, 0, 0, 0) for alpha, sigma in pairs]


def orders(evaluations: int) -> list[int]:
    """Split evaluations into steps: of order 3, and a rest of lower orders at the end."""
    count, rest = divmod(evaluations, 3)
    return [3] * (count - 1) + [2, 1] if rest == 0 else [3] * count + [rest]


def single_step_schedule(head: HeadConfig, evaluations: int, sampling: SamplingConfig) -> SingleStepSchedule:
    """Create the schedule of so many evaluations of the head.

    `start_t` of `sampling` is the time it starts from. The steps are even in lambda.
    """
    table = LogAlphaTable(training_schedule(head))
    of_steps = orders(evaluations)
    ends = torch.tensor([max(sampling.start_t, 2 / len(table)), 1 / len(table)])
    first, last = table.log_snr_at(ends).tolist()
    boundaries = table.time_at(torch.linspace(first, last, len(of_steps) + 1))

    times, steps = [], []
    for (s, t), order in zip(pairwise(boundaries.split(1)), of_steps, strict=True):
        # the inner times, once even in lambda, and once at the shares of lambda that those times have
        start, end = table.log_snr_at(torch.cat([s, t])).tolist()
        inner = table.log_snr_at(table.time_at(torch.linspace(start, end, order + 1)))
        shares = ((inner - inner[0]) / (inner[-1] - inner[0]))[1:-1]
        h = torch.tensor(end) - torch.tensor(start)
        times += [s, table.time_at(start + shares * h)]
        steps.append(SolverStep(order, *[*shares.tolist(), 0.0, 0.0][:2]))
    every = torch.cat([*times, boundaries[-1:]]).flip(0)
    timesteps = (every - 1 / len(table)) * head.diffusion_steps
    return SingleStepSchedule(timesteps, every, table.log_alpha_at(every), tuple(steps))
