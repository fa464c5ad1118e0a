"""Single reverse steps of the trained tiny model, at unit scale, plain and guided.

The end-to-end cases let through what these catch: a temperature forgotten, noise at the last step, the other half's
variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mar.diffusion.gaussian import Coefficients, p_mean_variance
from mar.diffusion.head import CFGDenoiser
from mar.diffusion.schedule import Schedule, cosine, respace
from mar.diffusion.solvers import ancestral
from tests.parity.support import golden, relative, trained_tiny, under

SCHEDULE = respace(cosine(1000), 25)
STEPS = [0, 1, 2, 12, 24]
HEAD = trained_tiny().head


@dataclass(frozen=True)
class Case:
    scale: float | None
    temperature: float


CASES = {"plain": Case(None, 0.9), "guided": Case(2.5, 1.1)}


def network(case: str) -> CFGDenoiser:
    """The head at the golden conditions: plain, or guided by eps = u + s (c - u)."""
    g = golden("mar_tiny_trained_samples")
    cond, uncond, scale = g["one_step/z_cond"], g["one_step/z_uncond"], CASES[case].scale
    if scale is None:
        return CFGDenoiser(HEAD, cond, SCHEDULE.timesteps)
    return CFGDenoiser(HEAD, torch.cat([cond, uncond]), SCHEDULE.timesteps, torch.full((len(cond), 1), scale))


def one_step(of: Callable[[Tensor, int], Tensor], x: Tensor, noise: Tensor, index: int, temperature: float) -> Tensor:
    """x_{t-1} of the sampler itself: it starts at `index`, and what the network gets next is what the step gave."""
    start = Schedule(SCHEDULE.betas[: index + 1], SCHEDULE.timesteps[: index + 1])
    seen: list[Tensor] = []

    def watched(x: Tensor, i: int) -> Tensor:
        seen.append(x)
        return of(x, i)

    draws = torch.stack([x, noise, *[torch.zeros_like(x)] * index][: index + 1])
    end = ancestral(watched, draws, start, temperature=temperature)
    return [*seen, end][1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("index", STEPS)
@torch.no_grad()
def test_reverse_step_matches_the_reference(case: str, index: int) -> None:
    theirs = under(golden("mar_tiny_trained_samples"), f"one_step/step{index}/")
    assert int(SCHEDULE.timesteps[index]) == int(theirs["timestep"])
    x, expected = theirs["x"], under(theirs, f"{case}/")
    of = network(case)
    eps, variance = of(x, index).chunk(2, dim=-1)
    assert relative(eps, expected["eps"]) < 1e-5
    # A rounding of eps grows by up to 20,000 on its way to x0, and processors round differently: from here on, theirs.
    output = torch.cat([expected.pop("eps"), variance], dim=-1)
    p = p_mean_variance(output, x, Coefficients(*Coefficients.table(SCHEDULE).T.tolist()[index]), "noise")
    assert relative(p.log_variance, expected.pop("log_variance")) < 1e-5
    assert relative(p.x0, expected.pop("x0")) < 1e-5
    assert relative(p.mean, expected.pop("mean")) < 1e-5
    ours = one_step(lambda x, i: output if i == index else of(x, i), x, theirs["noise"], index, CASES[case].temperature)
    assert relative(ours, expected.pop("x_prev")) < 1e-5
    assert not expected


def test_reverse_step_only_the_last_is_without_noise() -> None:
    theirs = under(golden("mar_tiny_trained_samples"), "one_step/")
    for index in STEPS:
        step = under(theirs, f"step{index}/plain/")
        assert torch.equal(step["x_prev"], step["mean"]) == (index == 0)
