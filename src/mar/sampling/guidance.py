"""Settings of each reveal step: guidance scale, diffusion steps, unconditional runs.

`mar.diffusion.head.CFGDenoiser` applies the guidance.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from mar.config import SamplingConfig
from mar.model.masking import step_times


class StepSettings(NamedTuple):
    """Settings of one reveal step of one image."""

    diffusion_steps: int
    scale: float
    """Guidance scale; 1: no guidance."""
    run_uncond: bool
    """True if the trunk also runs without the class."""

    @property
    def guided(self) -> bool:
        """True if the head runs with and without the class."""
        return self.scale != 1.0


@lru_cache(maxsize=1024)
def step_settings(
    sampling: SamplingConfig, schedule: tuple[int, ...], tokens: int, unknown: int | None = None
) -> tuple[StepSettings, ...]:
    """Return the settings of every reveal step of an image.

    Diffusion steps go linearly from the first number to the last (DiSA, arXiv 2505.20297). Of the guided steps, the
    first and then every `uncond_interval`-th run the trunk without the class (LazyMAR, arXiv 2503.12450).

    Args:
        sampling: the settings of sampling.
        schedule: number of tokens that are still masked after each step.
        tokens: of the image.
        unknown: number of tokens masked before the first step; None: all.
    """
    first = sampling.diffusion_steps
    last = first if sampling.diffusion_steps_end is None else sampling.diffusion_steps_end
    settings, guided = [], 0
    is_whole = unknown is None or unknown == tokens
    # by the binomial rule an image may be done before time is up: a whole one, as published, keeps its times
    times = step_times(sampling.steps if sampling.reveal == "binomial" and is_whole else len(schedule))
    for step, masked in enumerate(schedule):
        diffusion_steps = round(first + (last - first) * step / max(len(schedule) - 1, 1))
        scale = guidance_scale(sampling, masked, tokens)
        if not sampling.guidance_time[0] < times[step + 1] <= sampling.guidance_time[1]:
            scale = 1.0
        run_uncond = scale != 1.0 and guided % sampling.uncond_interval == 0
        guided += scale != 1.0
        settings.append(StepSettings(diffusion_steps, scale, run_uncond))
    return tuple(settings)


def guidance_scale(sampling: SamplingConfig, masked: int, tokens: int) -> float:
    """Return the guidance scale of a step that leaves `masked` tokens masked.

    `linear` rises with the share of known tokens (paper, appendix B); `constant` is the same at every step. Outside
    the guidance interval of that share the scale is 1: no guidance. The last step counts as leaving one masked token,
    except by the binomial rule.
    """
    known = tokens - max(masked, sampling.reveal == "counted")
    start, end = sampling.guidance_interval
    if not start <= known / tokens <= end:
        return 1.0
    if sampling.guidance_schedule == "constant":
        return sampling.guidance_scale
    return 1 + (sampling.guidance_scale - 1) * known / tokens
