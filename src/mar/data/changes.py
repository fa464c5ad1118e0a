"""What is changed of a picture before it is learned from, at random: it may be mirrored, and moved by a few pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mar.data.order import flipped, moved


@dataclass(frozen=True)
class Change:
    """What is changed of one picture."""

    flip: bool = False
    down: int = 0
    """Pixels that it is moved by, of what it was cut to; negative ones are upwards."""
    right: int = 0

    def __call__(self, pixels: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """The changed picture: moved, its edges repeated where nothing else is, and then mirrored."""
        if self.down or self.right:
            height, width = pixels.shape[-2:]
            rows = (torch.arange(height) - self.down).clamp(0, height - 1)
            columns = (torch.arange(width) - self.right).clamp(0, width - 1)
            pixels = pixels[:, rows][:, :, columns]
        return pixels.flip(-1) if self.flip else pixels


PLAIN = Change()
"""Nothing."""


@dataclass(frozen=True)
class Changes:
    """What is changed of the picture at every position of an order, keyed by its seed."""

    seed: int
    flip: bool
    """Whether every other picture is mirrored."""
    shift: int
    """Pixels that a picture is moved by each way, at most."""

    def at(self, position: int) -> Change:
        """That of the picture at a position."""
        down, right = moved(self.seed, position, self.shift) if self.shift else (0, 0)
        return Change(self.flip and flipped(self.seed, position), down, right)
