"""Mean and standard deviation of a tokenizer's raw latents, by one pass over images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mar.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Statistics:
    """Of raw latents: one number each, or one for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    """How many images were measured."""


def measure(tokenizer: Tokenizer, batches: Iterable[Tensor], per_channel: bool = False) -> Statistics:
    """The statistics of what `tokenizer` makes of `batches` of images (n, c, H, W) in [-1, 1], on its device.

    They are those of sampled latents, without sampling: the variance is that of the posterior's mean plus the mean of
    the posterior's variance. Sums are in float64. The tokenizer is not changed: `set_statistics` does that. Raises
    ValueError without images.
    """
    sums = torch.zeros(2, tokenizer.channels, dtype=torch.float64)
    values = images = 0
    with torch.no_grad():
        for batch in batches:
            posterior = tokenizer.encode(batch.to(tokenizer.mean.device))
            mean = tokenizer.denormalise(posterior.mean).double()
            std = posterior.std.double() * tokenizer.std.double().view(-1, 1, 1)
            sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))]).cpu()
            values += mean[:, 0].numel()
            images += len(batch)
    if not images:
        raise ValueError("tokenizer statistics: there are no images to measure")
    first, second = (sums if per_channel else sums.mean(1, keepdim=True)) / values
    std = (second - first.square()).clamp(min=0).sqrt()
    return Statistics(tuple(first.tolist()), tuple(std.tolist()), images)
