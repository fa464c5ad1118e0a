"""Plans of many images: label and seed of each, cut into units of work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mar.config import ConfigError

SEED_STRIDE = 2**32
"""Seeds of pictures of neighbouring base seeds are so far apart; no plan is longer."""


@dataclass(frozen=True)
class WorkUnit:
    """Pictures that are drawn and written together, or not at all."""

    number: int
    first: int
    """Number of its first picture."""
    labels: tuple[int, ...]
    """Class numbers; -1 for none."""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Pictures 0, 1, 2, ...: picture i has class `labels[i]` and the seed `seed * 2**32 + i`.

    So a picture follows from (seed, i) and its label alone, and with seed 0 it is the one that `mar sample --seed i`
    draws. Raises ConfigError for no pictures, or a seed that is not from 0 to 2**32 - 1.
    """

    labels: tuple[int, ...]
    """Class numbers; -1 for none."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.labels) <= SEED_STRIDE:
            raise ConfigError(f"pictures: got {len(self.labels)}, expected at least 1")
        if not 0 <= self.seed < SEED_STRIDE:
            raise ConfigError(f"seed is {self.seed}, but it must be from 0 to {SEED_STRIDE - 1}")

    @classmethod
    def per_class(cls, count: int, classes: Sequence[int], seed: int = 0) -> Plan:
        """Plan `count` images of each class, in turns: every beginning of the plan is balanced."""
        if count < 1:
            raise ConfigError(f"pictures of each class: got {count}, expected at least 1")
        return cls(tuple(classes) * count, seed)

    @classmethod
    def total(cls, count: int, classes: Sequence[int], seed: int = 0) -> Plan:
        """Plan `count` images in all: image i has class i % len(classes) of `classes`."""
        if count < 1:
            raise ConfigError(f"count is {count}, but it must be at least 1")
        rounds, rest = divmod(count, len(classes))
        return cls(tuple(classes) * rounds + tuple(classes[:rest]), seed)

    def __len__(self) -> int:
        return len(self.labels)

    def units(self, size: int) -> Iterator[WorkUnit]:
        """Cut the plan after every `size` images; the last unit may be smaller."""
        if size < 1:
            raise ConfigError(f"batch is {size}, but it must be at least 1")
        for number, first in enumerate(range(0, len(self), size)):
            labels = self.labels[first : first + size]
            seeds = tuple(self.seed * SEED_STRIDE + i for i in range(first, first + len(labels)))
            yield WorkUnit(number, first, labels, seeds)

    def fingerprint(self) -> str:
        """Hash (sha256, hex) the labels in their order."""
        return hashlib.sha256(np.asarray(self.labels, dtype="<i8").tobytes()).hexdigest()


def read_labels(path: Path) -> list[str | None]:
    """Read a file of labels, one a line (`none` for no class); empty lines are skipped.

    Raises ConfigError for a file that is not text, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text: expected a label a line, class numbers or names") from None
    labels = [None if line.lower() == "none" else line for line in lines if line]
    if not labels:
        raise ConfigError(f"{path} has no labels: expected one a line, class numbers or names")
    return labels
