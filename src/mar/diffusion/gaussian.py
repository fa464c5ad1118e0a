"""The Gaussian diffusion of one token: forward (q), reverse (p), training loss.

Source: DDPM (arXiv 2006.11239); improved DDPM (arXiv 2102.09672) for the learned variance and the hybrid loss; paper,
section 3.2, equation 1. Letters of shapes: r rows (tokens), d values of a token, T timesteps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar.config import Prediction
from mar.diffusion.schedule import Schedule

HALF_BIN = 1 / 255
"""Half the width of a bin of the discretized Gaussian at the first timestep."""


class Coefficients(NamedTuple):
    """Coefficients of one timestep t, or (r, 1) tensors for a t of each row."""

    sqrt_alphas_cumprod: Tensor | float
    sqrt_one_minus_alphas_cumprod: Tensor | float
    sqrt_recip_alphas_cumprod: Tensor | float
    sqrt_recipm1_alphas_cumprod: Tensor | float
    posterior_mean_coef1: Tensor | float
    """Coefficient of x_0 in the posterior mean."""
    posterior_mean_coef2: Tensor | float
    """Coefficient of x_t in the posterior mean."""
    log_beta: Tensor | float
    posterior_log_variance: Tensor | float

    @classmethod
    def table(cls, schedule: Schedule) -> Float[Tensor, "8 T"]:
        """Return all coefficients of a schedule in float64, fields as rows."""
        return torch.stack(
            [
                schedule.alphas_cumprod.sqrt(),
                (1 - schedule.alphas_cumprod).sqrt(),
                (1 / schedule.alphas_cumprod).sqrt(),
                (1 / schedule.alphas_cumprod - 1).sqrt(),
                schedule.posterior_mean_coef1,
                schedule.posterior_mean_coef2,
                schedule.betas.log(),
                schedule.posterior_log_variance,
            ]
        )

    @classmethod
    def at(cls, table: Float[Tensor, "8 T"], t: Int[Tensor, " r"]) -> Coefficients:
        """Return the coefficients of each row's timestep, as (r, 1) tensors."""
        return cls(*table[:, t].unsqueeze(-1))


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t), and the predicted x_0."""

    x0: Float[Tensor, "r d"]
    mean: Float[Tensor, "r d"]
    log_variance: Float[Tensor, "r d"]


def q_sample(x0: Float[Tensor, "r d"], noise: Float[Tensor, "r d"], c: Coefficients) -> Float[Tensor, "r d"]:
    """Draw x_t ~ q(x_t | x_0): DDPM, equation 4."""
    return c.sqrt_alphas_cumprod * x0 + c.sqrt_one_minus_alphas_cumprod * noise


def p_mean_variance(
    output: Float[Tensor, "r two_d"],
    x: Float[Tensor, "r d"],
    c: Coefficients,
    prediction: Prediction,
    x0_bound: float | None = None,
    *,
    clamp_variance: bool = False,
) -> PMeanVariance:
    """Compute mean and variance of p(x_{t-1} | x_t) from the network's output.

    Args:
        output: the prediction, then the variance values v.
        x: x_t.
        c: coefficients of t.
        prediction: the quantity that the network predicts.
        x0_bound: clips the predicted x_0 (None: no clipping).
        clamp_variance: keep the variance between the posterior variance and beta.
    """
    predicted, v = output.chunk(2, dim=-1)
    x0 = predict_x0(predicted, x, c, prediction)
    if x0_bound is not None:
        x0 = x0.clamp(-x0_bound, x0_bound)
    # improved DDPM, equation 15: from the posterior variance (v = -1) to beta (v = 1), in log space
    fraction = (v + 1) / 2
    if clamp_variance:
        fraction = fraction.clamp(0, 1)
    log_variance = fraction * c.log_beta + (1 - fraction) * c.posterior_log_variance
    return PMeanVariance(x0, c.posterior_mean_coef1 * x0 + c.posterior_mean_coef2 * x, log_variance)


def predict_x0(
    predicted: Float[Tensor, "r d"], x: Float[Tensor, "r d"], c: Coefficients, prediction: Prediction
) -> Float[Tensor, "r d"]:
    """Compute x_0 from x_t and the network's prediction.

    Args:
        predicted: the network's output for x_t.
        x: x_t.
        c: coefficients of t.
        prediction: the quantity that `predicted` is.
    """
    match prediction:
        case "noise":
            # factors up to 20,000: keep the reference's order of operations, or rounding errors differ visibly
            return c.sqrt_recip_alphas_cumprod * x - c.sqrt_recipm1_alphas_cumprod * predicted
        case "v":
            return c.sqrt_alphas_cumprod * x - c.sqrt_one_minus_alphas_cumprod * predicted
        case "x0":
            return predicted
        case "flow":  # x_t = a x_0 + b (x_0 + flow), with a, b the factors of signal and noise
            a, b = c.sqrt_alphas_cumprod, c.sqrt_one_minus_alphas_cumprod
            return (x - b * predicted) / (a + b)


def training_target(
    x0: Float[Tensor, "r d"], noise: Float[Tensor, "r d"], c: Coefficients, prediction: Prediction
) -> Float[Tensor, "r d"]:
    """Return the target of the network's prediction.

    Args:
        x0: clean tokens.
        noise: the noise in x_t.
        c: coefficients of t.
        prediction: the quantity to predict.
    """
    match prediction:
        case "noise":
            return noise
        case "v":
            return c.sqrt_alphas_cumprod * noise - c.sqrt_one_minus_alphas_cumprod * x0
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
    """Compute the hybrid loss of each row: squared error plus variational bound.

    The bound is in bits, and its gradient trains the variance only. Source: improved DDPM, equation 16.

    Args:
        output: the network's, for x.
        x0: clean tokens.
        x: x_t of `q_sample`.
        noise: the noise in x.
        first: true for rows at timestep 0, whose bound is a negative log-likelihood.
        c: coefficients of each row's timestep.
        prediction: the quantity that the network predicts.
    """
    # squared error of the prediction
    predicted, v = output.chunk(2, dim=-1)
    error = (training_target(x0, noise, c, prediction) - predicted).square().mean(-1)
    # variational bound
    p = p_mean_variance(torch.cat([predicted.detach(), v], dim=-1), x, c, prediction)
    posterior_mean = c.posterior_mean_coef1 * x0 + c.posterior_mean_coef2 * x
    kl = _normal_kl(posterior_mean, torch.as_tensor(c.posterior_log_variance), p.mean, p.log_variance)
    log_likelihood = _discretized_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    bound = torch.where(first, -log_likelihood.mean(-1), kl.mean(-1))
    return error + bound / math.log(2)


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Compute KL(N1 || N2), elementwise, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2).square() * (-log_variance2).exp())


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the standard normal's distribution function by tanh."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute the log-probability of x +- 1/255 under N(mean, std), in nats; one-sided beyond +-0.999."""
    inverse_std = (-log_std).exp()
    below = _normal_cdf(inverse_std * (x - mean + HALF_BIN))
    above = _normal_cdf(inverse_std * (x - mean - HALF_BIN))
    floor = 1e-12
    inside = (below - above).clamp(min=floor).log()
    left = below.clamp(min=floor).log()
    right = (1 - above).clamp(min=floor).log()
    return torch.where(x < -0.999, left, torch.where(x > 0.999, right, inside))
