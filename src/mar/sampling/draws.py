"""Where the randomness of sampling comes from: one generator per image, so that a picture depends on its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar import runtime
from mar.model.masking import random_order


@runtime_checkable
class Draws(Protocol):
    """A source of draws: for each image first its order, then its noise at each reveal step."""

    def order(self, image: int, length: int) -> Int[Tensor, " L"]:
        """The order of an image's tokens; they are revealed from its end."""
        ...

    def noise(self, image: int, steps: int, count: int, width: int) -> Float[Tensor, "steps count width"]:
        """For `count` tokens, by ascending position: the noise that each starts from, then that of each step."""
        ...


class SeededDraws:
    """Draws of CPU generators, one per image, from its seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [runtime.generator(seed) for seed in seeds]

    def order(self, image: int, length: int) -> Tensor:
        return random_order(length, self.generators[image])

    def noise(self, image: int, steps: int, count: int, width: int) -> Tensor:
        return torch.randn(steps, count, width, generator=self.generators[image])
