"""The solvers without noise, held against their papers' algorithms and against a Gaussian whose flow is known.

For tokens from N(M, S^2), x_t has the variance D_t^2 = alpha_t^2 S^2 + sigma_t^2 and the mean alpha_t M, and along the
probability flow (x_t - alpha_t M) / D_t does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from gaussian_tokens import M, S, alpha_sigma, denoiser_of, even_schedule, gaussian_x0, nonlinear_x0
from torch import Tensor

from mar.config import Prediction
from mar.diffusion.schedule import Schedule, cosine, linear, respace
from mar.diffusion.solvers import SCHEDULES, SOLVERS, Sampler, ancestral, ddim, dpm_2m, dpm_2s, num_noises
from mar.random import make_generator

RESPACED = [solver for solver in SOLVERS if solver not in SCHEDULES]
FLOWS: dict[str, Sampler] = {"ddim": ddim, "dpm++2m": dpm_2m, "dpm++2s": dpm_2s}
X = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)


def exact(schedule: Schedule, start: Tensor, mean: float = M) -> Tensor:
    """Where the flow from `start` gets to at the cleanest timestep, and then what is seen there."""
    (alpha, sigma), (alpha_0, sigma_0) = alpha_sigma(schedule, len(schedule) - 1), alpha_sigma(schedule, 0)
    ratio = math.sqrt((alpha_0**2 * S**2 + sigma_0**2) / (alpha**2 * S**2 + sigma**2))
    return gaussian_x0(mean)(alpha_0 * mean + ratio * (start - alpha * mean), alpha_0, sigma_0)


def draw(
    solver: str, schedule: Schedule, x0: Callable[[Tensor, float, float], Tensor], prediction: Prediction = "v",
    **options: float,
) -> Tensor:  # fmt: skip
    return FLOWS[solver](denoiser_of(schedule, prediction, x0, []), X.unsqueeze(0), schedule, prediction, **options)


# ---- against the papers' algorithms, number by number


def by_ddim(x: float, schedule: Schedule, x0: Callable[[float, int], float]) -> float:
    """arXiv 2010.02502, equation 12: the predicted token and the predicted noise, mixed anew."""
    for i in reversed(range(1, len(schedule))):
        alpha, sigma = alpha_sigma(schedule, i)
        clean = x0(x, i)
        noise = (x - alpha * clean) / sigma
        alpha, sigma = alpha_sigma(schedule, i - 1)
        x = alpha * clean + sigma * noise
    return x0(x, 0)


def by_2m(x: float, schedule: Schedule, x0: Callable[[float, int], float]) -> float:
    """arXiv 2211.01095, algorithm 2, in its letters: t_0 is the noisiest timestep."""
    t = [alpha_sigma(schedule, i) for i in reversed(range(len(schedule)))]
    lam = [math.log(a / s) for a, s in t]
    last = len(schedule) - 1
    q: list[float] = []
    for i in range(1, len(t)):
        q.append(x0(x, last - (i - 1)))
        h = lam[i] - lam[i - 1]
        if i == 1:
            d = q[0]
        else:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * q[i - 1] - 1 / (2 * r) * q[i - 2]
        x = t[i][1] / t[i - 1][1] * x - t[i][0] * (math.exp(-h) - 1) * d
    return x0(x, 0)


def by_2s(x: float, schedule: Schedule, x0: Callable[[float, int], float]) -> float:
    """arXiv 2211.01095, algorithm 1: from t_{i-1} by s_i to t_i."""
    i = len(schedule) - 1
    while i > 1:
        (a1, s1), (a2, s2), (a3, s3) = (alpha_sigma(schedule, at) for at in (i, i - 1, i - 2))
        h = math.log(a3 / s3) - math.log(a1 / s1)
        r = (math.log(a2 / s2) - math.log(a1 / s1)) / h
        d1 = x0(x, i)
        u = s2 / s1 * x - a2 * (math.exp(-r * h) - 1) * d1
        d = (1 - 1 / (2 * r)) * d1 + 1 / (2 * r) * x0(u, i - 1)
        x = s3 / s1 * x - a3 * (math.exp(-h) - 1) * d
        i -= 2
    if i == 1:
        (a1, s1), (a2, s2) = alpha_sigma(schedule, 1), alpha_sigma(schedule, 0)
        x = s2 / s1 * x + (a2 - a1 * s2 / s1) * x0(x, 1)
    return x0(x, 0)


ALGORITHMS = {"ddim": by_ddim, "dpm++2m": by_2m, "dpm++2s": by_2s}


@pytest.mark.parametrize("solver", FLOWS)
@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 12])
@pytest.mark.parametrize("spacing", ["time", "log-snr"])
def test_flow_solver_matches_the_papers_algorithm(
    solver: str, prediction: Prediction, steps: int, spacing: str
) -> None:
    schedule = respace(cosine(1000), steps, spacing, 0.95)  # type: ignore[arg-type]

    def x0(x: float, index: int) -> float:
        return float(nonlinear_x0(torch.tensor([[x]], dtype=torch.float64), *alpha_sigma(schedule, index)))

    expected = [ALGORITHMS[solver](float(x), schedule, x0) for x in X]
    torch.testing.assert_close(
        draw(solver, schedule, nonlinear_x0, prediction).flatten(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-9,
    )


# ---- against the flow of a Gaussian


def orders(solver: str, x0: Callable[[Tensor, float, float], Tensor], mean: float) -> Iterator[float]:
    """By how many powers of two the error falls when the steps are halved, again and again."""
    errors = [
        float((draw(solver, even_schedule(n), x0) - exact(even_schedule(n), X, mean)).abs().max())
        for n in (16, 32, 64, 128)
    ]
    assert errors[0] < 0.2
    return (math.log2(coarse / fine) for coarse, fine in pairwise(errors))


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++2m", 2), ("dpm++2s", 2)])
def test_flow_solver_order_of_convergence(solver: str, order: int) -> None:
    assert list(orders(solver, gaussian_x0(M), M)) == pytest.approx([order] * 3, abs=0.3)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++2m", 2), ("dpm++2s", 2)])
def test_flow_solver_order_of_convergence_with_guidance(solver: str, order: int) -> None:
    """Between N(M, S^2) and N(-0.2, S^2), scale 2.5: the flow of N(-0.2 + 2.5 (M + 0.2), S^2)."""
    scale, other = 2.5, -0.2

    def guided(x: Tensor, alpha: float, sigma: float) -> Tensor:
        without = gaussian_x0(other)(x, alpha, sigma)
        return without + scale * (gaussian_x0(M)(x, alpha, sigma) - without)

    assert list(orders(solver, guided, other + scale * (M - other))) == pytest.approx([order] * 3, abs=0.3)


@pytest.mark.parametrize("solver", FLOWS)
def test_flow_solver_odd_interval_costs_no_order(solver: str) -> None:
    odd, whole = (
        float((draw(solver, even_schedule(n), gaussian_x0(M)) - exact(even_schedule(n), X)).abs().max())
        for n in (65, 64)
    )
    assert odd < 1.1 * whole


@pytest.mark.parametrize(("solver", "error"), [("ddim", 0.17), ("dpm++2m", 0.025), ("dpm++2s", 0.09)])
def test_flow_solver_twelve_steps_are_accurate(solver: str, error: float) -> None:
    schedule = respace(cosine(1000), 12, "log-snr", 0.95)
    assert float((draw(solver, schedule, gaussian_x0(M)) - exact(schedule, X)).abs().max()) < error


def test_flow_solver_is_best_with_even_log_snr() -> None:
    errors = {}
    for spacing in ("time", "log-snr"):
        schedule = respace(cosine(1000), 8, spacing, 0.95)  # type: ignore[arg-type]
        errors[spacing] = float((draw("dpm++2m", schedule, gaussian_x0(M)) - exact(schedule, X)).abs().max())
    assert errors["log-snr"] < errors["time"] / 8


@pytest.mark.parametrize("solver", FLOWS)
@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_solver_draws_the_same_for_all_predictions(solver: str, prediction: Prediction) -> None:
    for schedule in (respace(cosine(1000), 10), respace(linear(1000), 10)):
        one, other = draw(solver, schedule, nonlinear_x0, "noise"), draw(solver, schedule, nonlinear_x0, prediction)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)  # unclipped: the noise's error is amplified by 20,000


def test_ddim_on_the_linear_path_is_euler() -> None:
    """x_u + (u' - u) velocity, for x at its own scale, not at unit variance."""
    schedule = respace(linear(1000), 6)
    u = (schedule.timesteps.double() + 0.5) / 1000
    x = X * ((1 - u[5]).square() + u[5].square()).sqrt()
    for index in reversed(range(6)):
        scale = ((1 - u[index]).square() + u[index].square()).sqrt()
        x0 = nonlinear_x0(x / scale, *alpha_sigma(schedule, index))
        velocity = (x - x0) / u[index]
        x = x - (u[index] - (u[index - 1] if index else 0.0)) * velocity
    torch.testing.assert_close(
        draw("ddim", schedule, nonlinear_x0, "flow").flatten(), x.flatten(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("solver", FLOWS)
def test_flow_solver_temperature_scales_the_start(solver: str) -> None:
    schedule = respace(cosine(1000), 30, "log-snr", 0.98)
    hot, cold, none = (draw(solver, schedule, gaussian_x0(M), temperature=t) for t in (1.0, 0.8, 0.0))
    assert float(cold.std() / hot.std()) == pytest.approx(0.8)  # exact, as all is linear
    assert float(none.std()) == pytest.approx(0, abs=1e-12)
    assert float(none[0]) == pytest.approx(M, abs=0.03)


# ---- what all have in common


@pytest.mark.parametrize("solver", FLOWS)
def test_flow_solver_uses_only_the_first_noise(solver: str) -> None:
    schedule = even_schedule(6)
    many = torch.cat([X.unsqueeze(0), torch.randn(6, *X.shape, generator=make_generator(0), dtype=torch.float64)])
    of = denoiser_of(schedule, "v", nonlinear_x0, [])
    assert torch.equal(FLOWS[solver](of, many, schedule, "v"), draw(solver, schedule, nonlinear_x0))
    assert num_noises(solver, 7) == 1  # type: ignore[arg-type]
    assert num_noises("ancestral", 7) == 7


@pytest.mark.parametrize("solver", RESPACED)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 9])
def test_solver_calls_the_network_once_a_step(solver: str, steps: int) -> None:
    schedule, asked = respace(cosine(1000), steps), []  # type: ignore[var-annotated]
    noise = X.expand(steps, *X.shape)
    SOLVERS[solver](denoiser_of(schedule, "v", nonlinear_x0, asked), noise, schedule, "v")  # type: ignore[index]
    assert asked == list(reversed(range(steps)))


@pytest.mark.parametrize("solver", RESPACED)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_solver_x0_bound_holds(solver: str, steps: int) -> None:
    schedule, noise = respace(cosine(1000), steps), X.expand(steps, *X.shape)
    drawn = SOLVERS[solver](denoiser_of(schedule, "v", nonlinear_x0, []), noise, schedule, "v", x0_bound=0.4)  # type: ignore[index]
    assert drawn.abs().max() <= 0.4 + 1e-12
    assert drawn.abs().max() > 0.39
    free = SOLVERS[solver](denoiser_of(schedule, "v", nonlinear_x0, []), noise, schedule, "v")  # type: ignore[index]
    assert free.abs().max() > 0.5


def test_solver_single_step_returns_predicted_x0() -> None:
    schedule = respace(cosine(1000), 1)
    expected = nonlinear_x0(X, *alpha_sigma(schedule, 0))
    for solver in FLOWS:
        torch.testing.assert_close(draw(solver, schedule, nonlinear_x0), expected, rtol=0, atol=1e-12)
    same = ancestral(denoiser_of(schedule, "v", nonlinear_x0, []), X.unsqueeze(0), schedule, "v")
    torch.testing.assert_close(same, expected, rtol=0, atol=1e-12)


def test_flow_solvers_with_two_steps_are_ddim() -> None:
    schedule = respace(cosine(1000), 2, "log-snr", 0.9)
    first = draw("ddim", schedule, nonlinear_x0)
    for solver in ("dpm++2m", "dpm++2s"):
        assert torch.equal(draw(solver, schedule, nonlinear_x0), first)
