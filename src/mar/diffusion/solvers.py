"""Samplers of the diffusion head: each a pure function from noise to tokens, given a network.

Letters of shapes: s diffusion steps, r rows (tokens), d values of a token.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from mar.config import Prediction
from mar.diffusion.gaussian import Coefficients, reverse
from mar.diffusion.schedule import Schedule

Network = Callable[[Tensor, int], Tensor]
"""(x (r, d), index of the step in the schedule) -> output (r, 2d)."""


def ancestral(
    network: Network,
    noise: Float[Tensor, "s r d"],
    schedule: Schedule,
    prediction: Prediction = "noise",
    *,
    temperature: float = 1.0,
    x0_bound: float | None = None,
) -> Float[Tensor, "r d"]:
    """DDPM's algorithm 2: from noise[0] to clean tokens, with noise[j] added after the j-th step.

    The temperature is the factor of the noise of each step (paper, section 3.2), not of the first noise.
    """
    coefficients = Coefficients.table(schedule).T.tolist()
    x = noise[0]
    for drawn, index in enumerate(reversed(range(len(schedule))), start=1):
        p = reverse(network(x, index), x, Coefficients(*coefficients[index]), prediction, x0_bound)
        x = p.mean
        if index > 0:
            # The reference's order of roundings: what is one rounding here may be a tenth of a deviation at the end.
            x = x + (0.5 * p.log_variance).exp() * noise[drawn] * temperature
    return x
