"""Solvers of the reverse diffusion: pure functions from noise to tokens.

`ancestral` and `dpm++2m-sde` add noise at every step. The others follow the probability flow, an ordinary differential
equation with the same marginals (arXiv 2011.13456, section 4.3), and depend on the first noise alone. With alpha and
sigma the factors of signal and noise, lambda = log(alpha / sigma) and h the step in lambda, a step from s to t is

    x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) D,    D: x_0, averaged over the step

and the solvers differ in D. Each evaluates the denoiser once at every timestep of the schedule, the noisiest first, and
returns the x_0 predicted at the last; `dpm++3s` returns x there. Letters of shapes: s noises, r rows (tokens), d values
of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from mar.config import HeadConfig, Prediction, SamplingConfig, Solver
from mar.diffusion.gaussian import Coefficients, p_mean_variance, predict_x0
from mar.diffusion.schedule import Schedule
from mar.diffusion.single_step import SingleStepSchedule, SolverStep, single_step_schedule

Denoiser = Callable[[Tensor, int], Tensor]
"""(x (r, d), index of the step) -> output (r, 2d): prediction and variance values."""


def ancestral(
    denoiser: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """Sample by DDPM's algorithm 2 (arXiv 2006.11239).

    It starts from noise[0] and adds noise[j] after the j-th step.

    Args:
        denoiser: the network.
        noise: one for each step of the schedule.
        schedule: the timesteps.
        prediction: the quantity that the network predicts. For x0, the learned variance is clamped to its range:
            trained on small steps, it leaves the range to account for errors of x_0 (docs/decisions).
        temperature: factor of the noise of each step (paper, section 3.2), not of the first noise.
        x0_bound: clips the predicted x_0.
    """
    coefficients = Coefficients.table(schedule).T.tolist()
    x = noise[0]
    for j, index in enumerate(reversed(range(len(schedule))), start=1):
        c = Coefficients(*coefficients[index])
        x = ancestral_update(
            denoiser(x, index), x, c, noise[j] if index > 0 else None, prediction, temperature, x0_bound
        )
    return x


def ancestral_update(
    output: Float[Tensor, "r two_d"],
    x: Float[Tensor, "r d"],
    c: Coefficients,
    noise: Float[Tensor, "r d"] | None,
    prediction: Prediction,
    temperature: float,
    x0_bound: float | None,
) -> Float[Tensor, "r d"]:
    """Return x after one step of `ancestral`.

    Args:
        output: the network's, for x.
        x: before the step.
        c: coefficients of the step.
        noise: to add (None: the last step adds none).
        prediction, temperature, x0_bound: as in `ancestral`.
    """
    p = p_mean_variance(output, x, c, prediction, x0_bound, clamp_variance=prediction == "x0")
    if noise is None:
        return p.mean
    # The reference's order of operations: a rounding error here may grow to a tenth of a standard deviation.
    return p.mean + (0.5 * p.log_variance).exp() * noise * temperature


def ddim(
    denoiser: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """Sample by DDIM without noise (arXiv 2010.02502, equation 12, eta = 0).

    D is x_0 at the step's start. Order 1.

    Args:
        denoiser, schedule, prediction, x0_bound: as in `ancestral`.
        noise: only noise[0] is read.
        temperature: factor of noise[0]; for a perfect denoiser of a Gaussian, of the samples' standard deviation.
    """
    integrator = _Integrator(denoiser, schedule, prediction, x0_bound)
    x = temperature * noise[0]
    for index in reversed(range(1, len(schedule))):
        x = integrator.step(x, integrator.predict_x0(x, index), index, index - 1)
    return integrator.predict_x0(x, 0)


def dpm_2m(
    denoiser: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """Sample by DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2).

    D extrapolates x_0 from two steps. Order 2.

    Args:
        denoiser, noise, schedule, prediction, temperature, x0_bound: as in `ddim`.
    """
    integrator = _Integrator(denoiser, schedule, prediction, x0_bound)
    x = temperature * noise[0]
    prev_x0: Tensor | None = None
    for index in reversed(range(1, len(schedule))):
        x0 = integrator.predict_x0(x, index)
        x = integrator.step(x, integrator.extrapolate(x0, prev_x0, index), index, index - 1)
        prev_x0 = x0
    return integrator.predict_x0(x, 0)


def dpm_2m_sde(
    denoiser: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """Sample by SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 5).

    D as in `dpm_2m`, with noise[j] added after the j-th step, as in `ancestral`. The noise corrects errors of earlier
    steps. Mean and standard deviation of the samples are of order 2.

    Args:
        denoiser, noise, schedule, prediction, temperature, x0_bound: as in `ancestral`.
    """
    integrator = _Integrator(denoiser, schedule, prediction, x0_bound)
    x = noise[0]
    prev_x0: Tensor | None = None
    for j, index in enumerate(reversed(range(1, len(schedule))), start=1):
        x0 = integrator.predict_x0(x, index)
        average = integrator.extrapolate(x0, prev_x0, index)
        x = integrator.noisy_step(x, average, index, index - 1, temperature * noise[j])
        prev_x0 = x0
    return integrator.predict_x0(x, 0)


def dpm_2s(
    denoiser: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """Sample by DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1).

    D is of the step's start and its midpoint. A step covers two intervals of the schedule, with the midpoint between
    them. An interval left over at the end is a step of `ddim`. Order 2.

    Args:
        denoiser, noise, schedule, prediction, temperature, x0_bound: as in `ddim`.
    """
    integrator = _Integrator(denoiser, schedule, prediction, x0_bound)
    x = temperature * noise[0]
    index = len(schedule) - 1
    while index > 0:
        x0 = integrator.predict_x0(x, index)
        if index == 1:
            x, index = integrator.step(x, x0, 1, 0), 0
            continue
        midpoint_x0 = integrator.predict_x0(integrator.step(x, x0, index, index - 1), index - 1)
        weight = 0.5 * integrator.h(index, index - 2) / integrator.h(index, index - 1)
        x, index = integrator.step(x, x0 + weight * (midpoint_x0 - x0), index, index - 2), index - 2
    return integrator.predict_x0(x, 0)


def dpm_3s(
    denoiser: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: SingleStepSchedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """Sample by single-step DPM-Solver++ of order 3 (arXiv 2211.01095), as eMIGM does.

    The last x is the sample, without a final denoising.

    Args:
        denoiser, noise, prediction, temperature, x0_bound: as in `ddim`.
        schedule: with an order of each step.
    """
    x, index = temperature * noise[0], len(schedule) - 1
    for step in schedule.steps:
        x = single_step(denoiser, x, index, step, schedule, prediction, x0_bound)
        index -= step.order
    return x


def single_step(
    denoiser: Denoiser,
    x: Float[Tensor, "r d"],
    start: int,
    step: SolverStep,
    schedule: SingleStepSchedule,
    prediction: Prediction = "noise",
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """Return x after one step of `dpm_3s`.

    Args:
        denoiser, schedule, prediction, x0_bound: as in `dpm_3s`.
        x: at index `start` of the schedule.
        start: index of the step's start.
        step: order and inner points; it ends at index `start - order`.
    """
    order, u, v = step
    end = start - order
    alpha, sigma = schedule.alpha, schedule.sigma
    h = schedule.log_snr[end] - schedule.log_snr[start]

    def x0_at(x: Tensor, index: int) -> Tensor:
        predicted, _ = denoiser(x, index).chunk(2, dim=-1)
        x0 = predict_x0(predicted, x, schedule.coefficients[index], prediction)
        return x0 if x0_bound is None else x0.clamp(-x0_bound, x0_bound)

    def base(share: float, index: int) -> Tensor:
        """Go `share` of the step with x_0 as it is at the start."""
        return sigma[index] / sigma[start] * x - alpha[index] * math.expm1(-share * h) * x0

    def slope(share: float) -> float:
        """Integrate a slope of x_0 over `share` of the step."""
        return math.expm1(-share * h) / (share * h) + 1

    x0 = x0_at(x, start)
    if order == 1:
        return base(1, end)
    second = x0_at(base(u, start - 1), start - 1) - x0
    if order == 2:
        return base(1, end) - alpha[end] * math.expm1(-h) / (2 * u) * second
    third = x0_at(base(v, start - 2) + v / u * alpha[start - 2] * slope(v) * second, start - 2) - x0
    return base(1, end) + alpha[end] * slope(1) / v * third


class _Integrator:
    """Exponential integrator of the probability flow: x_0, and steps between timesteps."""

    def __init__(self, denoiser: Denoiser, schedule: Schedule, prediction: Prediction, x0_bound: float | None) -> None:
        self.denoiser, self.prediction, self.x0_bound = denoiser, prediction, x0_bound
        self.coefficients = [Coefficients(*column) for column in Coefficients.table(schedule).T.tolist()]
        self.alpha = [float(c.sqrt_alphas_cumprod) for c in self.coefficients]
        self.sigma = [float(c.sqrt_one_minus_alphas_cumprod) for c in self.coefficients]
        self.log_snr = [math.log(alpha / sigma) for alpha, sigma in zip(self.alpha, self.sigma, strict=True)]

    def predict_x0(self, x: Float[Tensor, "r d"], index: int) -> Float[Tensor, "r d"]:
        """Evaluate the denoiser at a timestep."""
        predicted, _ = self.denoiser(x, index).chunk(2, dim=-1)
        x0 = predict_x0(predicted, x, self.coefficients[index], self.prediction)
        return x0 if self.x0_bound is None else x0.clamp(-self.x0_bound, self.x0_bound)

    def h(self, start: int, end: int) -> float:
        """Return the step in lambda."""
        return self.log_snr[end] - self.log_snr[start]

    def step(
        self, x: Float[Tensor, "r d"], average: Float[Tensor, "r d"], start: int, end: int
    ) -> Float[Tensor, "r d"]:
        """Return x at `end` from x at `start`, given D, the `average` of x_0."""
        ratio = self.sigma[end] / self.sigma[start]
        return ratio * x - self.alpha[end] * math.expm1(-self.h(start, end)) * average

    def noisy_step(
        self,
        x: Float[Tensor, "r d"],
        average: Float[Tensor, "r d"],
        start: int,
        end: int,
        noise: Float[Tensor, "r d"],
    ) -> Float[Tensor, "r d"]:
        """Return x at `end` along the noisy process: x shrinks by e^-h more, and `noise` replaces it."""
        h = self.h(start, end)
        ratio = self.sigma[end] / self.sigma[start] * math.exp(-h)
        replaced = -math.expm1(-2 * h)
        return ratio * x + self.alpha[end] * replaced * average + self.sigma[end] * math.sqrt(replaced) * noise

    def extrapolate(
        self, x0: Float[Tensor, "r d"], prev_x0: Float[Tensor, "r d"] | None, index: int
    ) -> Float[Tensor, "r d"]:
        """Extrapolate x_0 to half a step after `index`; the first step has no `prev_x0`."""
        if prev_x0 is None:
            return x0
        return x0 + 0.5 * self.h(index, index - 1) / self.h(index + 1, index) * (x0 - prev_x0)


Sampler = Callable[..., Tensor]
"""(denoiser, noise, schedule, prediction, temperature=..., x0_bound=...) -> tokens (r, d)."""

SOLVERS: dict[Solver, Sampler] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm++2m": dpm_2m,
    "dpm++2m-sde": dpm_2m_sde,
    "dpm++2s": dpm_2s,
    "dpm++3s": dpm_3s,
}
"""Solvers by their names in `SamplingConfig`."""
SCHEDULES: dict[Solver, Callable[[HeadConfig, int, SamplingConfig], SingleStepSchedule]] = {
    "dpm++3s": single_step_schedule
}
"""Schedules of solvers that need their own; the others have the training schedule, respaced."""
STOCHASTIC: tuple[Solver, ...] = ("ancestral", "dpm++2m-sde")
"""Solvers that add noise at every step."""


def num_noises(solver: Solver, steps: int) -> int:
    """Return how many noises a token needs for `steps` diffusion steps."""
    return steps if solver in STOCHASTIC else 1
