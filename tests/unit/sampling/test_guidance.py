"""What a reveal step takes follows from the image's own schedule: diffusion steps, guidance, refreshes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_options import sampling_options

from mar.config import SamplingConfig
from mar.model.masking import mask_schedule
from mar.sampling.guidance import step_settings

SCHEDULE = tuple(mask_schedule(256, 16))


def test_step_settings_default_differ_in_scale_only() -> None:
    found = step_settings(SamplingConfig(guidance_scale=3.0), SCHEDULE, 256)
    assert {pace.diffusion_steps for pace in found} == {100}
    assert all(pace.guided and pace.run_uncond for pace in found)
    assert [pace.scale for pace in found] == pytest.approx([1 + 2 * (256 - max(n, 1)) / 256 for n in SCHEDULE])
    none = step_settings(SamplingConfig(), SCHEDULE, 256)
    assert not any(pace.guided or pace.run_uncond for pace in none)


def test_step_settings_diffusion_steps_fall_linearly() -> None:
    sampling = SamplingConfig(diffusion_steps=50, diffusion_steps_end=5)
    counts = [pace.diffusion_steps for pace in step_settings(sampling, SCHEDULE, 256)]
    assert counts == [50, 47, 44, 41, 38, 35, 32, 29, 26, 23, 20, 17, 14, 11, 8, 5]
    assert [pace.diffusion_steps for pace in step_settings(sampling, (0,), 256)] == [50]  # a single step is the first


def test_step_settings_guidance_interval_follows_known_share() -> None:
    sampling = SamplingConfig(guidance_scale=3.0, guidance_interval=(0.3, 0.8))
    for pace, hidden in zip(step_settings(sampling, SCHEDULE, 256), SCHEDULE, strict=True):
        known = (256 - max(hidden, 1)) / 256
        assert pace.guided == (0.3 <= known <= 0.8)
        assert pace.scale == pytest.approx(1 + 2 * known if pace.guided else 1.0)
    # of an image that is nearly known, the reveal begins where guidance has long been on
    assert all(
        pace.guided
        for pace in step_settings(SamplingConfig(guidance_scale=3.0, guidance_interval=(0.8, 1.0)), (12, 4, 0), 256)
    )


def test_step_settings_uncond_runs_at_intervals() -> None:
    sampling = SamplingConfig(guidance_scale=3.0, guidance_interval=(0.3, 1.0), uncond_interval=3)
    found = step_settings(sampling, SCHEDULE, 256)
    assert [pace.run_uncond for pace in found] == [False] * 8 + [True, False, False, True, False, False, True, False]
    assert [pace.guided for pace in found] == [False] * 8 + [True] * 8


@given(way=sampling_options(), unknown=st.integers(1, 60), steps=st.integers(1, 70), start=st.integers(1, 9))
def test_step_settings_invariants_hold_for_any_config(
    way: dict[str, object], unknown: int, steps: int, start: int
) -> None:
    schedule = tuple(mask_schedule(unknown, steps))
    sampling = SamplingConfig(steps, start, **way)  # type: ignore[arg-type]
    found = step_settings(sampling, schedule, 60)
    assert len(found) == len(schedule)
    end = start if sampling.diffusion_steps_end is None else sampling.diffusion_steps_end
    counts = [pace.diffusion_steps for pace in found]
    assert counts[0] == start
    assert counts[-1] == end or len(counts) == 1
    assert counts in (sorted(counts), sorted(counts, reverse=True))
    guided = [pace.guided for pace in found]
    assert sum(before != after for before, after in pairwise([False, *guided, False])) in (0, 2)  # one stretch
    first = guided.index(True) if any(guided) else None
    for step, pace in enumerate(found):
        assert pace.run_uncond == (pace.guided and first is not None and (step - first) % sampling.uncond_interval == 0)


def test_step_settings_time_window_reaches_a_small_mask_by_the_binomial_rule() -> None:
    """At least one token a step: nine tokens would be done before a window near the end begins."""
    sampling = SamplingConfig(16, guidance_scale=3.0, guidance_time=(0.1, 0.3), reveal="binomial")
    schedule = tuple(range(8, -1, -1))
    assert not any(each.guided for each in step_settings(sampling, schedule, 64))  # a whole image of nine steps
    assert [each.guided for each in step_settings(sampling, schedule, 64, unknown=9)] == [False] * 6 + [
        True,
        True,
        False,
    ]
