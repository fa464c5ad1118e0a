"""DPM-Solver++ of order 3 converges as its order says, and starts where it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mar.config import HeadConfig, SamplingConfig
from mar.diffusion.head import DiffusionHead
from mar.diffusion.single_step import SingleStepSchedule, orders, single_step_schedule
from mar.diffusion.solvers import SOLVERS, dpm_3s, num_noises

HEAD = HeadConfig(width=16, depth=1)
SAMPLING = SamplingConfig(solver="dpm++3s")
MEAN, STD = 0.7, 0.5


def test_orders_sum_to_the_evaluations() -> None:
    for evaluations in range(1, 40):
        assert sum(orders(evaluations)) == evaluations
        assert max(orders(evaluations)) <= 3
    assert (orders(8), orders(9), orders(14)) == ([3, 3, 2], [3, 3, 2, 1], [3, 3, 3, 3, 2])


def denoiser_of(schedule: SingleStepSchedule, asked: list[int]):  # type: ignore[no-untyped-def]
    """The perfect denoiser of a Gaussian, predicting x0."""

    def denoise(x: Tensor, index: int) -> Tensor:
        asked.append(index)
        alpha, sigma = schedule.alpha[index], schedule.sigma[index]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        return torch.cat([x0, torch.zeros_like(x0)], dim=-1)

    return denoise


def error(evaluations: int, asked: list[int]) -> float:
    schedule = single_step_schedule(HEAD, evaluations, SAMPLING)
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 64, 1)
    drawn = dpm_3s(denoiser_of(schedule, asked), noise, schedule, "x0")
    alpha, sigma = schedule.alpha, schedule.sigma
    stds = [(a**2 * STD**2 + s**2) ** 0.5 for a, s in zip(alpha, sigma, strict=True)]
    exact = alpha[0] * MEAN + stds[0] / stds[-1] * (noise[0] - alpha[-1] * MEAN)
    return float((drawn - exact).abs().max())


def test_dpm_3s_evaluates_each_time_once_and_converges() -> None:
    asked: list[int] = []
    errors = {evaluations: error(evaluations, asked) for evaluations in (8, 14)}
    assert asked == [*range(8, 0, -1), *range(14, 0, -1)]
    assert errors[14] < errors[8] / 3
    assert errors[14] < 0.02


def test_dpm_3s_start_t_skips_the_noisiest_times() -> None:
    whole = single_step_schedule(HEAD, 8, SAMPLING)
    late = single_step_schedule(HEAD, 8, replace(SAMPLING, start_t=0.9))
    assert float(whole.times[-1]) == 1
    assert float(late.times[-1]) == pytest.approx(0.9, abs=1e-5)
    assert late.times[0] == whole.times[0]
    assert late.timesteps[-1] < whole.timesteps[-1]


def test_head_samples_by_dpm_3s_with_fractional_timesteps() -> None:
    torch.manual_seed(0)
    head = DiffusionHead(4, 8, HEAD).requires_grad_(False)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    z, noise = torch.randn(5, 8), torch.randn(1, 5, 4)
    assert head.num_noises(8, SAMPLING) == num_noises("dpm++3s", 8) == 1
    drawn = head.sample(z, noise, None, 8, SAMPLING)
    assert drawn.shape == (5, 4)
    assert drawn.isfinite().all()
    assert head.sample(z, noise, None, 8, replace(SAMPLING, x0_bound=0.1)).abs().max() < 0.2
    cold = head.sample(z, noise, None, 8, replace(SAMPLING, temperature=0.0))
    assert torch.allclose(cold, head.sample(z, torch.zeros_like(noise), None, 8, SAMPLING), atol=1e-6)
    assert SOLVERS["dpm++3s"] is dpm_3s
