"""The noise schedules are the reference's to the last digits of float64."""

from __future__ import annotations

import pytest
import torch

from mar.diffusion.schedule import Schedule, cosine, respace
from tests.parity.support import golden, under


def ours(steps: int) -> Schedule:
    return cosine(1000) if steps == 1000 else respace(cosine(1000), steps)


@pytest.mark.parametrize("steps", [1000, 100, 25, 10])
def test_schedule_matches_the_reference(steps: int) -> None:
    theirs = under(golden("mar_tiny"), f"schedule/{steps}/")
    schedule = ours(steps)
    assert schedule.betas.dtype == torch.float64
    for name, value in {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "posterior_log_variance_clipped": schedule.posterior_log_variance,
    }.items():
        torch.testing.assert_close(value, theirs.pop(name), rtol=1e-12, atol=0)
    assert schedule.timesteps.tolist() == theirs.pop("timestep_map").tolist()
    assert not theirs  # nothing of the golden schedule was left uncompared
