"""Plans of many images: the label and the seed of each, and the units of work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mar.config import ConfigError

SEED_STRIDE = 2**32
"""Distance between the image seeds of one base seed and the next; no plan is longer."""


@dataclass(frozen=True)
class WorkUnit:
    """Images that are drawn and written together, or not at all."""

    number: int
    first: int
    """Number of its first image."""
    labels: tuple[int, ...]
    """Class numbers; -1 for none."""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Images 0, 1, 2, ...: image i has class `labels[i]` and the seed `seed * 2**32 + i`.

    An image depends on (seed, i) and its label alone. With seed 0, `mar sample --seed i` draws the same one. Raises
    ConfigError for no images, or a seed outside 0 to 2**32 - 1.
    """

    labels: tuple[int, ...]
    """Class numbers; -1 for none."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.labels) <= SEED_STRIDE:
            raise ConfigError(f"pictures: got {len(self.labels)}, expected at least 1")
        if not 0 <= self.seed < SEED_STRIDE:
            raise ConfigError(f"seed: got {self.seed}, expected 0 to {SEED_STRIDE - 1}")

    @classmethod
    def per_class(cls, count: int, classes: Sequence[int], seed: int = 0) -> Plan:
        """Plans `count` images of each class, in turns: every beginning of the plan is balanced."""
        if count < 1:
            raise ConfigError(f"pictures of each class: got {count}, expected at least 1")
        return cls(tuple(classes) * count, seed)

    @classmethod
    def total(cls, count: int, classes: Sequence[int], seed: int = 0) -> Plan:
        """Plans `count` images in all: image i has class i % len(classes) of `classes`."""
        if count < 1:
            raise ConfigError(f"count: got {count}, expected at least 1")
        rounds, rest = divmod(count, len(classes))
        return cls(tuple(classes) * rounds + tuple(classes[:rest]), seed)

    def __len__(self) -> int:
        return len(self.labels)

    def units(self, size: int) -> Iterator[WorkUnit]:
        """Yields the plan in units of `size` images; the last unit may be smaller."""
        if size < 1:
            raise ConfigError(f"batch: got {size}, expected at least 1")
        for number, first in enumerate(range(0, len(self), size)):
            labels = self.labels[first : first + size]
            yield WorkUnit(number, first, labels, self.seeds(first, first + len(labels)))

    def seeds(self, first: int, end: int) -> tuple[int, ...]:
        """Returns the seeds of images [first, end)."""
        return tuple(self.seed * SEED_STRIDE + i for i in range(first, end))

    def fingerprint(self) -> str:
        """Returns the sha256, in hex, of the labels in their order."""
        return hashlib.sha256(np.asarray(self.labels, dtype="<i8").tobytes()).hexdigest()


def read_labels(path: Path) -> list[str | None]:
    """Reads a file of labels, one line for each image (`none`: no class); empty lines are skipped.

    Raises ConfigError for a file that is not text, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text, expected a label a line, class numbers or names") from None
    labels = [None if line.lower() == "none" else line for line in lines if line]
    if not labels:
        raise ConfigError(f"{path} has no labels, expected one a line, class numbers or names")
    return labels
