"""The Gaussian diffusion process of one token: forward (q), reverse (p), and the training loss.

Source: DDPM (arXiv 2006.11239), improved DDPM (arXiv 2102.09672) for the learned variance and the hybrid loss; paper,
section 3.2, equation 1. Letters of shapes: r rows (tokens), d values of a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar.config import Prediction
from mar.diffusion.schedule import Schedule

BIN = 1 / 255
"""Half the width of a bin of the discretised Gaussian at the first timestep."""


class Coefficients(NamedTuple):
    """What a timestep t contributes to every formula; numbers for one step, (r, 1) tensors for mixed ones."""

    signal: Tensor | float
    """sqrt(alpha-bar_t)"""
    noise: Tensor | float
    """sqrt(1 - alpha-bar_t)"""
    per_signal: Tensor | float
    """sqrt(1 / alpha-bar_t)"""
    noise_per_signal: Tensor | float
    """sqrt(1 / alpha-bar_t - 1)"""
    mean_x0: Tensor | float
    mean_xt: Tensor | float
    log_beta: Tensor | float
    posterior_log_variance: Tensor | float

    @classmethod
    def table(cls, schedule: Schedule) -> Float[Tensor, "8 T"]:
        """All coefficients of a schedule, float64, in the order of the fields."""
        return torch.stack(
            [
                schedule.alphas_cumprod.sqrt(),
                (1 - schedule.alphas_cumprod).sqrt(),
                (1 / schedule.alphas_cumprod).sqrt(),
                (1 / schedule.alphas_cumprod - 1).sqrt(),
                schedule.posterior_mean_x0,
                schedule.posterior_mean_xt,
                schedule.betas.log(),
                schedule.posterior_log_variance,
            ]
        )

    @classmethod
    def at(cls, table: Float[Tensor, "8 T"], t: Int[Tensor, " r"]) -> Coefficients:
        """The coefficients of each row's timestep, as (r, 1) tensors."""
        return cls(*table[:, t].unsqueeze(-1))


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t): what the network says of the step before."""

    x0: Float[Tensor, "r d"]
    mean: Float[Tensor, "r d"]
    log_variance: Float[Tensor, "r d"]


def q_sample(x0: Float[Tensor, "r d"], noise: Float[Tensor, "r d"], c: Coefficients) -> Float[Tensor, "r d"]:
    """x_t ~ q(x_t | x_0): DDPM, equation 4."""
    return c.signal * x0 + c.noise * noise


def p_mean_variance(
    output: Float[Tensor, "r two_d"],
    x: Float[Tensor, "r d"],
    c: Coefficients,
    prediction: Prediction,
    x0_bound: float | None = None,
    *,
    between: bool = False,
) -> PMeanVariance:
    """The reverse step from the network's output; `x0_bound` clips the predicted clean token, and `between` keeps the
    variance between the two that it is interpolated from."""
    predicted, variance = output.chunk(2, dim=-1)
    x0 = predict_x0(predicted, x, c, prediction)
    if x0_bound is not None:
        x0 = x0.clamp(-x0_bound, x0_bound)
    # improved DDPM, equation 15: between the posterior variance (v = -1) and beta (v = 1), in log space
    fraction = (variance + 1) / 2
    if between:
        fraction = fraction.clamp(0, 1)
    log_variance = fraction * c.log_beta + (1 - fraction) * c.posterior_log_variance
    return PMeanVariance(x0, c.mean_x0 * x0 + c.mean_xt * x, log_variance)


def predict_x0(
    predicted: Float[Tensor, "r d"], x: Float[Tensor, "r d"], c: Coefficients, prediction: Prediction
) -> Float[Tensor, "r d"]:
    """x_0 from what the network predicts."""
    match prediction:
        case "noise":
            # factors up to 20,000: roundings are made in the reference's order, or its numbers are not reached
            return c.per_signal * x - c.noise_per_signal * predicted
        case "v":
            return c.signal * x - c.noise * predicted
        case "x0":
            return predicted
        case "flow":  # x = signal x0 + noise (x0 + predicted)
            return (x - c.noise * predicted) / (c.signal + c.noise)


def training_target(
    x0: Float[Tensor, "r d"], noise: Float[Tensor, "r d"], c: Coefficients, prediction: Prediction
) -> Float[Tensor, "r d"]:
    """What the network is to predict."""
    match prediction:
        case "noise":
            return noise
        case "v":
            return c.signal * noise - c.noise * x0
        case "x0":
            return x0
        case "flow":
            return noise - x0


def diffusion_loss(
    output: Float[Tensor, "r two_d"],
    x0: Float[Tensor, "r d"],
    x: Float[Tensor, "r d"],
    noise: Float[Tensor, "r d"],
    first: Bool[Tensor, " r"],
    c: Coefficients,
    prediction: Prediction,
) -> Float[Tensor, " r"]:
    """The hybrid loss of each row: squared error + variational bound in bits, whose gradient trains the variance only.

    `first` marks rows at timestep 0, where the bound is a likelihood. Source: improved DDPM, equation 16.
    """
    error = (training_target(x0, noise, c, prediction) - output.chunk(2, dim=-1)[0]).square().mean(-1)
    predicted, variance = output.chunk(2, dim=-1)
    p = p_mean_variance(torch.cat([predicted.detach(), variance], dim=-1), x, c, prediction)
    posterior_mean = c.mean_x0 * x0 + c.mean_xt * x
    divergence = _normal_kl(posterior_mean, torch.as_tensor(c.posterior_log_variance), p.mean, p.log_variance)
    likelihood = _discretized_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    bound = torch.where(first, -likelihood.mean(-1), divergence.mean(-1))
    return error + bound / math.log(2)


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2), elementwise, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2).square() * (-log_variance2).exp())


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin x +- 1/255 under N(mean, std), one-sided beyond +-0.999, in nats."""
    inverse_std = (-log_std).exp()
    below = _normal_cdf(inverse_std * (x - mean + BIN))
    above = _normal_cdf(inverse_std * (x - mean - BIN))
    floor = 1e-12
    inside = (below - above).clamp(min=floor).log()
    left = below.clamp(min=floor).log()
    right = (1 - above).clamp(min=floor).log()
    return torch.where(x < -0.999, left, torch.where(x > 0.999, right, inside))
