"""The head as the diffusion loop sees it: guided, with all that does not depend on x computed outside of the loop.

Letters of shapes: r rows (tokens to draw), t diffusion steps, d values of a token, f width of z, w width of the head.

What each reveal step of an image takes: its diffusion steps, its guidance, and whether the trunk runs twice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar.backends.cpu.packed_head import PackedHead
from mar.config import SamplingConfig
from mar.diffusion.head import DiffusionHead, Modulations

MODULATION_BYTES = 128 * 2**20
"""How much memory shift, scale and gate of one chunk of diffusion steps may take."""


def guidance_scale(sampling: SamplingConfig, hidden: int, tokens: int) -> float:
    """The scale of a reveal step after which `hidden` of `tokens` tokens stay hidden (the last step counts as 1).

    `linear` rises with the share of tokens that are known (paper, appendix B); `constant` is the same at every step.
    Where that share is outside of the interval of guidance, the scale is 1: none.
    """
    known = (tokens - max(hidden, 1)) / tokens
    if not sampling.guidance_from <= known <= sampling.guidance_until:
        return 1.0
    if sampling.guidance_schedule == "constant":
        return sampling.guidance
    return 1 + (sampling.guidance - 1) * (tokens - max(hidden, 1)) / tokens


class CFGDenoiser:
    """Network of a sampler: (x (r, d), index of the step) -> output (r, 2d), at the conditions of one reveal step.

    With a `scale`, `z` holds the rows' conditions and then their unconditional ones; both are evaluated at the same x,
    the prediction is uncond + scale (cond - uncond), and the variance is the conditional one's.
    """

    def __init__(
        self,
        head: DiffusionHead | PackedHead,
        z: Float[Tensor, "rows f"],
        timesteps: Int[Tensor, " t"],
        scale: Float[Tensor, "r 1"] | None = None,
        budget: int = MODULATION_BYTES,
    ) -> None:
        self.head = head
        self.scale = scale
        self.times = head.embed_times(timesteps.to(z.device))
        self.z = head.embed_conditions(z)
        width, depth = head.config.width, head.config.depth
        step_bytes = len(z) * width * (3 * depth + 2) * self.z.element_size()
        self.chunk = max(1, budget // max(step_bytes, 1))
        self.first = self.end = 0  # steps [first, end) have their modulations in `ready`
        self.ready: Modulations = []

    def modulations(self, index: int) -> Modulations:
        """Those of one diffusion step, computed for a chunk of steps at once; steps come from last to first."""
        if not self.first <= index < self.end:
            self.first, self.end = max(0, index + 1 - self.chunk), index + 1
            times = self.times[self.first : self.end]
            self.ready = []  # frees the last chunk before the next is made
            self.ready = self.head.modulations(DiffusionHead.condition(times.unsqueeze(1), self.z.unsqueeze(0)))
        return [layer[index - self.first] for layer in self.ready]

    def __call__(self, x: Float[Tensor, "r d"], index: int) -> Float[Tensor, "r two_d"]:
        embedded = self.head.embed_tokens(x)
        if self.scale is None:
            return self.head.denoise_embedded(embedded, self.modulations(index))
        conditional, unconditional = self.head.denoise_embedded(
            torch.cat([embedded, embedded]), self.modulations(index)
        ).chunk(2)
        predicted, variance = conditional.chunk(2, dim=-1)
        base = unconditional[:, : predicted.shape[-1]]
        return torch.cat([base + self.scale * (predicted - base), variance], dim=-1)


class StepSettings(NamedTuple):
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
def step_settings(sampling: SamplingConfig, schedule: tuple[int, ...], tokens: int) -> tuple[StepSettings, ...]:
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
        found.append(StepSettings(diffusion_steps, scale, refresh))
    return tuple(found)
