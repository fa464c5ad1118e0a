"""Orders of training: endless, shuffled, known at any position without the ones before it."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch

from mar.config import ConfigError
from mar.random import make_generator, permutation

_CLASS_ORDER = 0xC1A5
"""Separates the orders within classes from other uses of a seed."""


def labels_of(source: object) -> np.ndarray | None:
    """Return the class number of each image of a source, -1 for none; None if it can't tell without reading them."""
    labels: np.ndarray | None = getattr(source, "labels", None)
    return labels


@dataclass(frozen=True)
class InfiniteSampler:
    """An endless sequence of `length` images, shuffled anew each epoch.

    `batch` counts the images of all ranks. A rank takes the `rank`-th of `world` equal slices of each batch.
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
        """Return the index of the image at a position."""
        return self.indices(position, 1)[0]

    def indices(self, first: int, count: int) -> list[int]:
        """Return the indices of the images at `count` positions from `first` on."""
        indices: list[int] = []
        while count > len(indices):
            epoch, within = divmod(first + len(indices), self.length)
            places = permutation(self.length, self.seed, epoch)[within : within + count - len(indices)].numpy()
            indices += self.images_at(epoch, places).tolist()
        return indices

    def images_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the images that have these places in an unshuffled epoch."""
        return places

    def batches(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of (position, index), beginning with the batch at `start`."""
        share = self.batch // self.world
        first = start + self.rank * share
        while True:
            yield list(zip(range(first, first + share), self.indices(first, share), strict=True))
            first += self.batch


@dataclass(frozen=True, eq=False)
class BalancedSampler(InfiniteSampler):
    """A sequence in which images of small classes come more often.

    An epoch has as many places as there are images. Each class has one place, and the others in proportion to
    n ** (1 - balance), for n images. A class goes through its images in laps: none comes again before all have.
    """

    labels: np.ndarray = field(kw_only=True)
    """Class number of each image; those without (-1) are a class too."""
    balance: float = field(kw_only=True)
    """From 0, about as often as there are images, to 1, all classes equally often."""

    @cached_property
    def _classes(self) -> list[np.ndarray]:
        """Indices of the images of each class."""
        _, counts = np.unique(self.labels, return_counts=True)
        return np.split(np.argsort(self.labels, kind="stable"), counts.cumsum()[:-1])

    @cached_property
    def _ends(self) -> np.ndarray:
        """End of the places of each class in an epoch, before it is shuffled."""
        shares = np.cumsum([len(images) ** (1 - self.balance) for images in self._classes])
        others = self.length - len(shares)
        return np.rint(others * shares / shares[-1]).astype(np.int64) + np.arange(1, len(shares) + 1)

    def images_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the images that have these places in an unshuffled epoch."""
        numbers = np.searchsorted(self._ends, places, side="right")
        images = np.empty_like(places)
        for number in np.unique(numbers).tolist():
            of_class, end = self._classes[number], int(self._ends[number])
            begin = int(self._ends[number - 1]) if number else 0
            rows = np.flatnonzero(numbers == number)
            laps, within = np.divmod(epoch * (end - begin) + places[rows] - begin, len(of_class))
            for lap in np.unique(laps).tolist():
                order = _class_order(len(of_class), self.seed, number, lap)
                images[rows[laps == lap]] = of_class[order[within[laps == lap]]]
        return images


@lru_cache(maxsize=4096)
def _class_order(length: int, seed: int, number: int, lap: int) -> np.ndarray:
    """Return a shuffled order of the images of class `number`."""
    generator = make_generator(seed, _CLASS_ORDER, number, lap)
    return torch.randperm(length, generator=generator).numpy()


def order_of(
    source: Sized, seed: int, batch: int, rank: int = 0, world: int = 1, balance: float = 0.0
) -> InfiniteSampler:
    """Return the order of a source's images.

    Args:
        source: whose images are ordered.
        seed: key of the order.
        batch: images of a batch of all ranks.
        rank: number of this process.
        world: number of processes; divides `batch`.
        balance: how evenly classes are drawn, from 0 (as often as they have images) to 1.

    Raises:
        ConfigError: A balance is given, but the source does not know its labels.
    """
    if not balance:
        return InfiniteSampler(len(source), seed, batch, rank, world)
    labels = labels_to_balance(source, balance)
    return BalancedSampler(len(source), seed, batch, rank, world, labels=labels, balance=balance)


def labels_to_balance(source: object, balance: float) -> np.ndarray:
    """Return the labels of a source. Raises ConfigError if it does not know them."""
    labels = labels_of(source)
    if labels is None:
        raise ConfigError(
            f"balance is {balance}, but the data does not tell its labels before it is read, as stream: never does; "
            "set --balance 0, or leave stream: out"
        )
    return labels
