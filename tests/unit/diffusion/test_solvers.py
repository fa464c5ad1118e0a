"""The sampler with a network that knows the truth: a Gaussian goes in, the same Gaussian comes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mar.config import Prediction
from mar.diffusion.gaussian import Coefficients, training_target
from mar.diffusion.schedule import Schedule, cosine, linear, respace
from mar.diffusion.solvers import ancestral
from mar.random import make_generator

MEAN, STD = 0.7, 0.5
ROWS = 20_000


def knowing(schedule: Schedule, prediction: Prediction, variance: float = -1.0) -> Callable[[Tensor, int], Tensor]:
    """The best network there can be for tokens from N(MEAN, STD^2): it predicts E[x0 | x_t]."""
    table = Coefficients.table(schedule)

    def network(x: Tensor, index: int) -> Tensor:
        c = Coefficients(*table[:, index].tolist())
        gain = c.sqrt_alphas_cumprod * STD**2 / (c.sqrt_alphas_cumprod**2 * STD**2 + c.sqrt_one_minus_alphas_cumprod**2)
        x0 = MEAN + gain * (x - c.sqrt_alphas_cumprod * MEAN)
        epsilon = (x - c.sqrt_alphas_cumprod * x0) / c.sqrt_one_minus_alphas_cumprod
        return torch.cat([training_target(x0, epsilon, c, prediction), torch.full_like(x, variance)], -1)

    return network


def draws(steps: int) -> Tensor:
    return torch.randn(steps, ROWS, 1, generator=make_generator(3), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["noise", "v", "x0", "flow"])
@pytest.mark.parametrize("path", [cosine, linear])
def test_ancestral_samples_have_the_gaussians_moments(prediction: Prediction, path: Callable[[int], Schedule]) -> None:
    schedule = respace(path(1000), 200)
    drawn = ancestral(knowing(schedule, prediction, variance=0.0), draws(200), schedule, prediction)
    # of 20,000 draws: 0.0035 and 0.0025 are one standard error
    assert abs(float(drawn.mean()) - MEAN) < 0.012
    assert abs(float(drawn.std()) - STD) < 0.012


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@pytest.mark.parametrize("path", [cosine, linear])
def test_ancestral_draws_the_same_for_all_predictions(prediction: Prediction, path: Callable[[int], Schedule]) -> None:
    schedule = respace(path(1000), 10)
    one = ancestral(knowing(schedule, "noise"), draws(10), schedule, "noise")
    other = ancestral(knowing(schedule, prediction), draws(10), schedule, prediction)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_ancestral_temperature_narrows_the_samples() -> None:
    schedule = respace(cosine(1000), 50)
    stds = [
        float(ancestral(knowing(schedule, "v"), draws(50), schedule, "v", temperature=t).std()) for t in (0.0, 0.9, 1.0)
    ]
    assert stds[0] < stds[1] < stds[2]


def test_ancestral_at_temperature_0_uses_only_the_first_noise() -> None:
    schedule, noise = respace(cosine(1000), 5), draws(5)
    cold = ancestral(knowing(schedule, "v"), noise, schedule, "v", temperature=0.0)
    other = torch.cat([noise[:1], torch.randn(4, ROWS, 1, generator=make_generator(4), dtype=torch.float64)])
    assert torch.equal(ancestral(knowing(schedule, "v"), other, schedule, "v", temperature=0.0), cold)
    other[0] += 1
    assert not torch.equal(ancestral(knowing(schedule, "v"), other, schedule, "v", temperature=0.0), cold)


def test_ancestral_x0_bound_holds() -> None:
    schedule = respace(cosine(1000), 8)
    drawn = ancestral(knowing(schedule, "v"), draws(8), schedule, "v", x0_bound=0.4)
    assert drawn.abs().max() <= 0.4 + 1e-9  # the last step's mean is x0 itself
    assert drawn.abs().max() > 0.39


def test_ancestral_calls_the_network_once_a_step() -> None:
    schedule, asked = respace(cosine(1000), 6), []
    network = knowing(schedule, "v")

    def watched(x: Tensor, index: int) -> Tensor:
        asked.append(index)
        return network(x, index)

    ancestral(watched, draws(6), schedule, "v")
    assert asked == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [10, 50])
def test_ancestral_out_of_range_variance_is_clamped_for_x0(steps: int) -> None:
    schedule = respace(cosine(1000), steps)
    far, end = (ancestral(knowing(schedule, "x0", v), draws(steps), schedule, "x0") for v in (20.0, 1.0))
    assert torch.equal(far, end)
    assert float(ancestral(knowing(schedule, "v", 20.0), draws(steps), schedule, "v").std()) > 2 * float(end.std())
