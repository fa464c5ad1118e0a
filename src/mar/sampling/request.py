"""What was asked for, as Python's own numbers and tensors; ValueError for what can't be drawn from."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mar.config import SamplingConfig

Images = Sequence[Image.Image] | Float[Tensor, "n c H W"] | Float[np.ndarray, "n c H W"]
Mask = Bool[Tensor, "n rows columns"] | Bool[np.ndarray, "n rows columns"] | Sequence[Any]


@dataclass(frozen=True)
class Request:
    """What to draw, looked over."""

    labels: list[int]
    seeds: list[int]
    sampling: SamplingConfig
    known: Tensor | None
    mask: Tensor | None
    first: int = 0
    """The number of its first picture in the whole request."""

    def part(self, first: int, end: int) -> Request:
        """Those of its pictures from `first` up to `end`."""
        known = None if self.known is None else self.known[first:end]
        mask = None if self.mask is None else self.mask[first:end]
        return Request(self.labels[first:end], self.seeds[first:end], self.sampling, known, mask, first)


def whole_numbers(seeds: Iterable[SupportsIndex]) -> list[int]:
    """Seeds as Python's own numbers, of which all 64 bits count; ValueError for what is no whole number."""
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds: got {reprlib.repr(seeds)}, expected whole numbers, one a picture") from None


def as_pictures(known: Images) -> Sequence[Image.Image] | Tensor:
    """Known pictures as they can be encoded; ValueError for what is none."""
    if isinstance(known, Tensor | np.ndarray):
        values = torch.as_tensor(known)
        if values.ndim == 4 and values.is_floating_point():
            if not values.isfinite().all():
                raise ValueError("known: got values that are no finite numbers, expected them in [-1, 1]")
            return values.float()
        got = f"{tuple(values.shape)} of {values.dtype}"
    elif isinstance(known, Sequence) and all(isinstance(picture, Image.Image) for picture in known):
        return known
    else:
        got = reprlib.repr(known)
    raise ValueError(f"known: got {got}, expected PIL pictures, or floats in [-1, 1], (n, channels, height, width)")


def as_mask(mask: Mask) -> Tensor:
    """A mask as a tensor, whose shape and type the generation judges; ValueError for what can be none."""
    try:
        flags = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        flags = torch.empty(())
    if not flags.ndim:
        raise ValueError(f"mask: got {reprlib.repr(mask)}, expected bools (n, rows, columns), one a token")
    return flags
