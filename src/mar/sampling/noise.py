"""Randomness of sampling: orders and noise of each image, drawn at each step or ahead in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar.devices import host_buffer, upload
from mar.model.masking import random_order
from mar.random import make_generator
from mar.sampling.reveal_plan import GroupPlan, NoiseWindow, RevealPlan

VECTOR = 16
"""Numbers that `torch.randn` draws at a time: chunks of a multiple of them can be drawn together."""


@runtime_checkable
class NoiseSource(Protocol):
    """Randomness of sampling: each image's order, then noise for each step."""

    def order(self, image: int, length: int) -> Int[Tensor, " L"]:
        """Draw the order of an image's tokens, revealed from its end."""
        ...

    def noise(self, image: int, noises: int, count: int, width: int) -> Float[Tensor, "noises count width"]:
        """Draw noise for the tokens that an image reveals in a step.

        Args:
            image: its index in the batch.
            noises: noises per token, the first and then one for each further diffusion step.
            count: number of tokens, in ascending order of position.
            width: values of a token.
        """
        ...


@runtime_checkable
class UniformSource(NoiseSource, Protocol):
    """Randomness of sampling by a reveal rule that draws."""

    def uniforms(self, image: int, count: int) -> Float[Tensor, " count"]:
        """Draw a uniform number for each masked token of a step."""
        ...


class SeededNoise:
    """Noise from one CPU generator per image, independent of the batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [make_generator(seed) for seed in seeds]

    def order(self, image: int, length: int) -> Tensor:
        """Draw the order of an image's tokens."""
        return random_order(length, self.generators[image])

    def noise(self, image: int, noises: int, count: int, width: int) -> Tensor:
        """Draw noise for the tokens that an image reveals in a step.

        Args:
            image, noises, count, width: as in `NoiseSource.noise`.
        """
        return torch.randn(noises, count, width, generator=self.generators[image])

    def uniforms(self, image: int, count: int) -> Tensor:
        """Draw a uniform number for each masked token of an image."""
        return torch.rand(count, generator=self.generators[image])

    def fill(self, image: int, chunks: Sequence[tuple[int, int]], width: int, out: Float[Tensor, "s d"]) -> None:
        """Draw the noise of several steps at once.

        The numbers are those of `noise`, called for one step after the other.

        Args:
            image: its index in the batch.
            chunks: (noises, count) of each step.
            width: values of a token.
            out: receives the noises, one step after the other.
        """
        if width % VECTOR == 0:
            chunks = [(sum(noises * count for noises, count in chunks), 1)]
        start = 0
        for noises, count in chunks:
            end = start + noises * count
            if end > start:
                out[start:end] = self.noise(image, noises, count, width).view(-1, width)
            start = end


class SharedUniforms(SeededNoise):
    """Noise per image, with the uniforms of image 0 for all.

    Every image reveals as many tokens, as in the code of eMIGM.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self._drawn: list[Tensor] = []
        self._used = [0] * len(self.generators)

    def uniforms(self, image: int, count: int) -> Tensor:
        """Return the uniforms of image 0 at this step."""
        step, self._used[image] = self._used[image], self._used[image] + 1
        if step == len(self._drawn):
            self._drawn.append(super().uniforms(0, count))
        return self._drawn[step]


class NoiseAhead:
    """The noise of a batch, drawn ahead by a thread.

    It draws a window of steps at once, and keeps two windows in memory.

    The source's generators run ahead of the steps: another iteration needs a source of its own.

    Args:
        source: draws the numbers.
        plan: the steps.
        width: values of a token.
    """

    def __init__(self, source: SeededNoise, plan: RevealPlan, width: int) -> None:
        self.source, self.plan, self.width = source, plan, width
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="mar-noise")
        self.next = self._draw_ahead(0)
        self.window = -1
        self.values = torch.empty(0)

    def group(self, group: GroupPlan) -> Float[Tensor, "s t d"]:
        """Return the noise of a group's tokens, on the device."""
        while self.window < self.plan.window_of[group.step]:
            assert self.next is not None
            drawn, self.window = self.next.result(), self.window + 1
            self.next = self._draw_ahead(self.window + 1)
            self.values = drawn.to(self.plan.device, non_blocking=True)
        return self._gather(group)

    def _gather(self, group: GroupPlan) -> Float[Tensor, "s t d"]:
        noises = torch.arange(self.plan.noises[group.diffusion_steps], device=self.plan.device)
        return self.values[group.noise + noises.unsqueeze(1) * group.stride]

    def close(self) -> None:
        """End the thread."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _draw_ahead(self, window: int) -> Future[Tensor] | None:
        if window == len(self.plan.windows):
            return None
        return self.pool.submit(self._draw, self.plan.windows[window])

    def _draw(self, window: NoiseWindow) -> Tensor:
        images = len(window.chunks)
        values = host_buffer((images, window.length, self.width), torch.float32, self.plan.device)
        for image, (chunks, out) in enumerate(zip(window.chunks, values, strict=True)):
            self.source.fill(image, chunks, self.width, out)
        return values.view(-1, self.width)


def group_noise(
    source: NoiseSource | NoiseAhead, group: GroupPlan, plan: RevealPlan, width: int
) -> Float[Tensor, "s t d"]:
    """Return the noise of a group's tokens on the device.

    Images follow each other, and their positions ascend.

    Args:
        source: draws it, or drew it ahead.
        group: of a step's plan.
        plan: the batch's.
        width: values of a token.
    """
    if isinstance(source, NoiseAhead):
        return source.group(group)
    noises = plan.noises[group.diffusion_steps]
    drawn = [source.noise(image, noises, count, width) for image, count in plan.counts(group)]
    return upload(torch.cat(drawn, dim=1), plan.device)
