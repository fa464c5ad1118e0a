"""The settings of each reveal step: its guidance scale, its diffusion steps, and whether the trunk runs twice.

Guidance itself is applied in `mar.diffusion.head.CFGDenoiser`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from mar.config import SamplingConfig


class StepSettings(NamedTuple):
    """Settings of one reveal step of one image."""

    diffusion_steps: int
    scale: float
    """Guidance scale; 1 is none."""
    run_uncond: bool
    """Whether the trunk also runs without the class."""

    @property
    def guided(self) -> bool:
        """Whether the head runs with and without the class."""
        return self.scale != 1.0


@lru_cache(maxsize=1024)
def step_settings(sampling: SamplingConfig, schedule: tuple[int, ...], tokens: int) -> tuple[StepSettings, ...]:
    """Return the settings of every reveal step of an image.

    `schedule` tells how many of the image's `tokens` stay masked after each step. Diffusion steps go linearly from the
    first number to the last (DiSA, arXiv 2505.20297). Of the guided steps, the first and then every
    `uncond_interval`-th run the trunk without the class (LazyMAR, arXiv 2503.12450).
    """
    first = sampling.diffusion_steps
    last = first if sampling.diffusion_steps_end is None else sampling.diffusion_steps_end
    settings, guided = [], 0
    for step, masked in enumerate(schedule):
        diffusion_steps = round(first + (last - first) * step / max(len(schedule) - 1, 1))
        scale = guidance_scale(sampling, masked, tokens)
        run_uncond = scale != 1.0 and guided % sampling.uncond_interval == 0
        guided += scale != 1.0
        settings.append(StepSettings(diffusion_steps, scale, run_uncond))
    return tuple(settings)


def guidance_scale(sampling: SamplingConfig, masked: int, tokens: int) -> float:
    """Return the scale of a reveal step after which `masked` of `tokens` tokens stay masked.

    The last step counts as 1 masked token. `linear` rises with the share of known tokens (paper, appendix B);
    `constant` is the same at every step. Where that share lies outside the guidance interval, the scale is 1: none.
    """
    known = (tokens - max(masked, 1)) / tokens
    start, end = sampling.guidance_interval
    if not start <= known <= end:
        return 1.0
    if sampling.guidance_schedule == "constant":
        return sampling.guidance_scale
    return 1 + (sampling.guidance_scale - 1) * (tokens - max(masked, 1)) / tokens
