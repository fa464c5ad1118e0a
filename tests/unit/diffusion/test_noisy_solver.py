"""`dpm++2m-sde`, held against its paper's algorithm and against a Gaussian whose draws are known.

For a Gaussian's network all is linear in the noises, so that mean and deviation of what is drawn are computed from the
answer to each noise alone, without chance.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from gaussian_tokens import M, S, alpha_sigma, denoiser_of, even_schedule, gaussian_x0, nonlinear_x0

from mar.config import Prediction
from mar.diffusion.schedule import Schedule, cosine, respace
from mar.diffusion.solvers import dpm_2m_sde, num_noises
from mar.random import make_generator

X = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)


def by_the_paper(x: float, noise: list[float], schedule: Schedule) -> float:
    """arXiv 2211.01095, section 5, SDE-DPM-Solver++(2M), in its letters: t_0 is the noisiest timestep."""

    def x0(x: float, index: int) -> float:
        return float(nonlinear_x0(torch.tensor([[x]], dtype=torch.float64), *alpha_sigma(schedule, index)))

    t = [alpha_sigma(schedule, i) for i in reversed(range(len(schedule)))]
    lam = [math.log(a / s) for a, s in t]
    q: list[float] = []
    for i in range(1, len(t)):
        q.append(x0(x, len(t) - i))
        h = lam[i] - lam[i - 1]
        gone = 1 - math.exp(-2 * h)
        drift = t[i][1] / t[i - 1][1] * math.exp(-h) * x + t[i][0] * gone * q[-1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            drift += t[i][0] * gone / (2 * r) * (q[-1] - q[-2])
        x = drift + t[i][1] * math.sqrt(gone) * noise[i]
    return x0(x, 0)


@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize("spacing", ["time", "log-snr"])
def test_sde_solver_matches_the_papers_algorithm(prediction: Prediction, steps: int, spacing: str) -> None:
    schedule = respace(cosine(1000), steps, spacing, 0.95)  # type: ignore[arg-type]
    noise = torch.randn(steps, *X.shape, generator=make_generator(1), dtype=torch.float64)
    expected = [
        by_the_paper(float(x), column.tolist(), schedule) for x, column in zip(noise[0], noise[:, :, 0].T, strict=True)
    ]
    drawn = dpm_2m_sde(denoiser_of(schedule, prediction, nonlinear_x0, []), noise, schedule, prediction)
    torch.testing.assert_close(drawn.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def drawn_mean_and_std(schedule: Schedule, temperature: float = 1.0) -> tuple[float, float]:
    """Of `dpm++2m-sde` for tokens from N(M, S^2): each noise by itself, and none."""
    steps = num_noises("dpm++2m-sde", len(schedule))
    alone = torch.cat([torch.eye(steps, dtype=torch.float64), torch.zeros(steps, 1, dtype=torch.float64)], 1)
    of = denoiser_of(schedule, "v", gaussian_x0(M), [])
    *found, none = dpm_2m_sde(of, alone.unsqueeze(-1), schedule, "v", temperature=temperature).flatten().tolist()
    return none, math.sqrt(sum((each - none) ** 2 for each in found))


def true_std(schedule: Schedule) -> float:
    """Of what the network sees at the cleanest timestep, where x has its right distribution."""
    alpha, sigma = alpha_sigma(schedule, 0)
    return alpha * S**2 / math.sqrt(alpha**2 * S**2 + sigma**2)


def test_sde_solver_converges_by_the_second_order() -> None:
    errors = []
    for n in (32, 64, 128, 256):
        mean, std = drawn_mean_and_std(even_schedule(n))
        errors.append((abs(mean - M), abs(std - true_std(even_schedule(n)))))
    assert max(errors[0]) < 0.01
    deviations = [math.log2(coarse[1] / fine[1]) for coarse, fine in pairwise(errors)]
    assert deviations == pytest.approx([2] * 3, abs=0.35)


def test_sde_solver_ten_steps_keep_the_deviation() -> None:
    """What a solver loses of it, pictures lose of their variety."""
    schedule = respace(cosine(1000), 10, "log-snr", 0.95)
    mean, std = drawn_mean_and_std(schedule)
    assert mean == pytest.approx(M, abs=0.02)
    assert std == pytest.approx(true_std(schedule), rel=0.1)


def test_sde_solver_temperature_scales_later_noise() -> None:
    schedule = respace(cosine(1000), 12, "log-snr", 0.95)
    stds = [drawn_mean_and_std(schedule, temperature)[1] for temperature in (0.0, 0.9, 1.0)]
    assert 0 < stds[0] < stds[1] < stds[2]
    noise = torch.randn(12, *X.shape, generator=make_generator(2), dtype=torch.float64)
    of, other = denoiser_of(schedule, "v", nonlinear_x0, []), torch.cat([noise[:1], noise[1:] + 1])
    cold, colder = (dpm_2m_sde(of, each, schedule, "v", temperature=0.0) for each in (noise, other))
    assert torch.equal(cold, colder)


def test_sde_solver_needs_a_noise_for_each_step() -> None:
    assert num_noises("dpm++2m-sde", 7) == 7
