"""The order in which training sees its pictures: endless, shuffled anew each epoch, and known at any position.

A position counts the pictures that all ranks together have seen. Everything random about a picture is keyed by its
position, so that a run can stop anywhere, go on with other workers or another world size, and see the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mar.runtime import generator, mixed

# Each use of a seed has a stream of its own.
_ORDER, _FLIP, _MOVE = 0x0DE4, 0xF11B, 0x30BE


@functools.lru_cache(maxsize=2)
def permutation(length: int, seed: int, epoch: int) -> Int[Tensor, "length"]:
    """The shuffled indices of an epoch."""
    return torch.randperm(length, generator=generator(seed, _ORDER, epoch))


def flipped(seed: int, position: int) -> bool:
    """Whether the picture at `position` is mirrored: a fair coin of its own."""
    return bool(mixed(seed, _FLIP, position) >> 63)


def moved(seed: int, position: int, most: int) -> tuple[int, int]:
    """By how many pixels the picture at `position` is moved down and to the right: each of -most to most alike."""
    down, right = (mixed(seed, _MOVE, position, axis) % (2 * most + 1) - most for axis in (0, 1))
    return down, right


@dataclass(frozen=True)
class Order:
    """What rank `rank` of `world` reads of an endless shuffled sequence of `length` pictures, in batches.

    `batch` pictures are a batch of all ranks together; a rank takes the `rank`-th of `world` equal slices of each.
    """

    length: int
    seed: int
    batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length: got {self.length}, expected at least one picture")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: got {self.rank}, expected 0 to {self.world - 1}")
        if self.batch < 1 or self.batch % self.world:
            raise ValueError(f"batch: got {self.batch}, expected a positive multiple of the {self.world} processes")

    def index(self, position: int) -> int:
        """The picture at a position."""
        return self.indices(position, 1)[0]

    def indices(self, first: int, count: int) -> list[int]:
        """The pictures at `count` positions from `first` on."""
        found: list[int] = []
        while count > len(found):
            epoch, within = divmod(first + len(found), self.length)
            order = permutation(self.length, self.seed, epoch)
            found += order[within : within + count - len(found)].tolist()
        return found

    def batches(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Lists of (position, index), without end, the first global batch beginning at position `start`."""
        share = self.batch // self.world
        first = start + self.rank * share
        while True:
            yield list(zip(range(first, first + share), self.indices(first, share), strict=True))
            first += self.batch
