"""Samplers of the diffusion head: each a pure function from noise to tokens, given a network.

`ancestral` and `dpm++2m-sde` draw noise at every step. The others follow the probability flow, an ordinary differential
equation with the same marginals (arXiv 2011.13456, section 4.3), and depend on the noise they start from alone. With
alpha and sigma the factors of signal and noise, lambda = log(alpha / sigma), and h the step in lambda from s to t, it
is solved by

    x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) D,    D: x_0, averaged over the step

and they differ in D. Each asks the network once at every timestep of the schedule, the noisiest first, and ends with
the x_0 that it sees at the last. Letters of shapes: s diffusion steps, r rows (tokens), d values of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from mar.config import Prediction, Solver
from mar.diffusion.gaussian import Coefficients, p_mean_variance, predict_x0
from mar.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, int], Tensor]
"""(x (r, d), index of the step in the schedule) -> output (r, 2d)."""


def ancestral(
    network: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """DDPM's algorithm 2: from noise[0] to clean tokens, with noise[j] added after the j-th step.

    The temperature is the factor of the noise of each step (paper, section 3.2), not of the first noise. Where x_0 is
    predicted, its error at little noise is far beyond the variances of single steps, and the learned one grows out of
    its range to account for it: what was learned of a thousand small steps would be extrapolated to few large ones.
    """
    coefficients = Coefficients.table(schedule).T.tolist()
    between = prediction == "x0"
    x = noise[0]
    for drawn, index in enumerate(reversed(range(len(schedule))), start=1):
        p = p_mean_variance(
            network(x, index), x, Coefficients(*coefficients[index]), prediction, x0_bound, between=between
        )
        x = p.mean
        if index > 0:
            # The reference's order of roundings: what is one rounding here may be a tenth of a deviation at the end.
            x = x + (0.5 * p.log_variance).exp() * noise[drawn] * temperature
    return x


def ddim(
    network: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """DDIM without noise (arXiv 2010.02502, equation 12 with eta = 0): D is the step's first x_0. Of first order.

    Only noise[0] is read, and the temperature is its factor: with a perfect network of a Gaussian, that of the standard
    deviation of what is drawn.
    """
    flow = _Integrator(network, schedule, prediction, x0_bound)
    x = temperature * noise[0]
    for index in reversed(range(1, len(schedule))):
        x = flow.step(x, flow.predict_x0(x, index), index, index - 1)
    return flow.predict_x0(x, 0)


def dpm_2m(
    network: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): D is extrapolated from this and the last x_0. Of second order.

    Noise and temperature as in `ddim`, which the first step is.
    """
    flow = _Integrator(network, schedule, prediction, x0_bound)
    x = temperature * noise[0]
    before: Tensor | None = None
    for index in reversed(range(1, len(schedule))):
        x0 = flow.predict_x0(x, index)
        x = flow.step(x, flow.extrapolated(x0, before, index), index, index - 1)
        before = x0
    return flow.predict_x0(x, 0)


def dpm_2m_sde(
    network: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 5): D as in `dpm_2m`, and noise[j] comes in at the j-th step.

    What it follows is the process that `ancestral` follows, whose noise mends the errors of earlier steps; of second
    order for the mean and the deviation of what is drawn. The temperature is that of `ancestral`.
    """
    process = _Integrator(network, schedule, prediction, x0_bound)
    x = noise[0]
    before: Tensor | None = None
    for drawn, index in enumerate(reversed(range(1, len(schedule))), start=1):
        x0 = process.predict_x0(x, index)
        x = process.noisy_step(x, process.extrapolated(x0, before, index), index, index - 1, temperature * noise[drawn])
        before = x0
    return process.predict_x0(x, 0)


def dpm_2s(
    network: Denoiser,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1): D from the step's start and a point within. Of second order.

    A step covers two intervals of the schedule, whose middle timestep is that point; an interval left over at the end
    is a step of `ddim`. Noise and temperature as there.
    """
    flow = _Integrator(network, schedule, prediction, x0_bound)
    x = temperature * noise[0]
    index = len(schedule) - 1
    while index > 0:
        x0 = flow.predict_x0(x, index)
        if index == 1:
            x, index = flow.step(x, x0, 1, 0), 0
            continue
        within = flow.predict_x0(flow.step(x, x0, index, index - 1), index - 1)
        weight = 0.5 * flow.h(index, index - 2) / flow.h(index, index - 1)
        x, index = flow.step(x, x0 + weight * (within - x0), index, index - 2), index - 2
    return flow.predict_x0(x, 0)


class _Integrator:
    """What the solvers but `ancestral` share, which are exponential integrators: x_0, and a step between timesteps."""

    def __init__(self, network: Denoiser, schedule: Schedule, prediction: Prediction, x0_bound: float | None) -> None:
        self.network, self.prediction, self.x0_bound = network, prediction, x0_bound
        self.at = [Coefficients(*column) for column in Coefficients.table(schedule).T.tolist()]
        self.log_snr = [math.log(c.signal / c.noise) for c in self.at]

    def predict_x0(self, x: Float[Tensor, "r d"], index: int) -> Float[Tensor, "r d"]:
        """x_0 as the network sees it at this timestep."""
        predicted, _ = self.network(x, index).chunk(2, dim=-1)
        x0 = predict_x0(predicted, x, self.at[index], self.prediction)
        return x0 if self.x0_bound is None else x0.clamp(-self.x0_bound, self.x0_bound)

    def h(self, start: int, end: int) -> float:
        """The step in lambda."""
        return self.log_snr[end] - self.log_snr[start]

    def step(
        self, x: Float[Tensor, "r d"], average: Float[Tensor, "r d"], start: int, end: int
    ) -> Float[Tensor, "r d"]:
        """x at `end` from x at `start`, given the average D of x_0."""
        noise = self.at[end].noise / self.at[start].noise
        return noise * x - self.at[end].signal * math.expm1(-self.h(start, end)) * average

    def noisy_step(
        self,
        x: Float[Tensor, "r d"],
        average: Float[Tensor, "r d"],
        start: int,
        end: int,
        noise: Float[Tensor, "r d"],
    ) -> Float[Tensor, "r d"]:
        """The same along the process with noise: what is left of x shrinks by e^-h more, and noise takes its place."""
        h = self.h(start, end)
        kept = self.at[end].noise / self.at[start].noise * math.exp(-h)
        gone = -math.expm1(-2 * h)
        return kept * x + self.at[end].signal * gone * average + self.at[end].noise * math.sqrt(gone) * noise

    def extrapolated(
        self, x0: Float[Tensor, "r d"], before: Float[Tensor, "r d"] | None, index: int
    ) -> Float[Tensor, "r d"]:
        """x_0 as it will be half a step after `index`, by its change since the step `before`; at first, as it is."""
        if before is None:
            return x0
        return x0 + 0.5 * self.h(index, index - 1) / self.h(index + 1, index) * (x0 - before)


Sampler = Callable[..., Tensor]
"""(network, noise, schedule, prediction, temperature=..., x0_bound=...) -> tokens (r, d)."""

SOLVERS: dict[Solver, Sampler] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm++2m": dpm_2m,
    "dpm++2m-sde": dpm_2m_sde,
    "dpm++2s": dpm_2s,
}
"""Solvers by the name that a user gives."""
STOCHASTIC: tuple[Solver, ...] = ("ancestral", "dpm++2m-sde")
"""Those that take noise at every step."""


def num_noises(solver: Solver, steps: int) -> int:
    """How many noises a token takes in `steps` diffusion steps."""
    return steps if solver in STOCHASTIC else 1
