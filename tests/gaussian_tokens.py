"""Tokens from N(M, S^2), of which all is known: what a perfect network says of them, for the tests of solvers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mar.config import Prediction
from mar.diffusion.gaussian import Coefficients, training_target
from mar.diffusion.schedule import Schedule
from mar.diffusion.solvers import Denoiser

M, S = 0.7, 0.5


def even_schedule(intervals: int, noisiest: float = -4.0, cleanest: float = 4.0) -> Schedule:
    """Timesteps at even steps of log-SNR, cleanest first."""
    log_snr = torch.linspace(cleanest, noisiest, intervals + 1, dtype=torch.float64)
    alphas_cumprod = torch.sigmoid(2 * log_snr)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(1 - alphas_cumprod / before, torch.arange(intervals + 1))


def alpha_sigma(schedule: Schedule, index: int) -> tuple[float, float]:
    alpha_bar = float(schedule.alphas_cumprod[index])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def denoiser_of(
    schedule: Schedule, prediction: Prediction, x0: Callable[[Tensor, float, float], Tensor], asked: list[int]
) -> Denoiser:
    """Predicts what comes to this `x0(x, alpha, sigma)`, and notes the steps it was asked for."""
    table = Coefficients.table(schedule)

    def predict(x: Tensor, index: int) -> Tensor:
        asked.append(index)
        alpha, sigma = alpha_sigma(schedule, index)
        clean = x0(x, alpha, sigma)
        said = training_target(clean, (x - alpha * clean) / sigma, Coefficients(*table[:, index].tolist()), prediction)
        return torch.cat([said, torch.zeros_like(said)], -1)

    return predict


def gaussian_x0(mean: float) -> Callable[[Tensor, float, float], Tensor]:
    """E[x_0 | x_t] for tokens from N(mean, S^2)."""

    def x0(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return mean + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x - alpha * mean)

    return x0


def nonlinear_x0(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """No data's, but not linear."""
    return torch.tanh(x) + 0.1 * sigma * x**2
