"""Dropout that is cheap on a CPU.

PyTorch's draws a float for every value and keeps it; that took a tenth of a training step's time (docs/performance.md).
Here a draw is 16 bits of a random word, and a byte is kept. Other devices have kernels of their own for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

_LEVELS = 2**16


class Dropout(nn.Module):
    """In training: values zeroed at random, at `rate`, the others divided by the share that stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if not self.training or self.rate == 0:
            return x
        if not use_cpu_kernel(x):
            return functional.dropout(x, self.rate)
        return (x * dropout_mask(x.shape, self.rate)).mul_(1 / keep_prob(self.rate))


def use_cpu_kernel(x: Float[Tensor, "..."]) -> bool:
    """Whether x is where we do better: on a CPU, and not compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def keep_prob(rate: float) -> float:
    """What stays: 1 - rate, to the nearest 1/65,536."""
    return 1 - round(rate * _LEVELS) / _LEVELS


def dropout_mask(shape: Sequence[int], rate: float) -> Bool[Tensor, "..."]:
    """True where a value stays, drawn from PyTorch's global generator on the CPU."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    lowest = round(rate * _LEVELS) - _LEVELS // 2
    return (words.view(torch.int16)[:count] >= lowest).view(*shape)
