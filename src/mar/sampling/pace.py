"""What each reveal step of an image takes: its diffusion steps, its guidance, and whether the trunk runs twice."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from mar.config import SamplingConfig
from mar.sampling.guidance import guidance_scale


class Pace(NamedTuple):
    """One reveal step of one image."""

    diffusion_steps: int
    scale: float
    """Of guidance; 1 for none."""
    refresh: bool
    """Whether the trunk is also run without the class."""

    @property
    def guided(self) -> bool:
        """Whether the head is run with and without the class."""
        return self.scale != 1.0


@lru_cache(maxsize=1024)
def paces(sampling: SamplingConfig, schedule: tuple[int, ...], tokens: int) -> tuple[Pace, ...]:
    """The steps of an image of which `schedule` says how many of its `tokens` stay hidden after each.

    It depends on the image alone: in a batch, others may be elsewhere. Diffusion steps go linearly from the first
    number to the last (DiSA, arXiv 2505.20297); of the guided steps, the first and then every `guidance_refresh`-th
    runs the trunk without the class (LazyMAR, arXiv 2503.12450).
    """
    first = sampling.diffusion_steps
    end = first if sampling.diffusion_steps_end is None else sampling.diffusion_steps_end
    found, guided = [], 0
    for step, hidden in enumerate(schedule):
        diffusion_steps = round(first + (end - first) * step / max(len(schedule) - 1, 1))
        scale = guidance_scale(sampling, hidden, tokens)
        refresh = scale != 1.0 and guided % sampling.guidance_refresh == 0
        guided += scale != 1.0
        found.append(Pace(diffusion_steps, scale, refresh))
    return tuple(found)
