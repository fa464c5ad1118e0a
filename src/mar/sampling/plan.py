"""Plans of many images: the label or prompt and the seed of each, and the units of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mar.checkpoint.files import read_file_or_pipe
from mar.config import ConfigError

SEED_STRIDE = 2**32
"""Distance between the image seeds of one base seed and the next; no plan is longer."""


Asks = tuple[int | str, ...]
"""Class numbers of images, -1 for none; or their prompts, "" for none."""


def are_prompts(asks: Asks) -> bool:
    """Tells prompts from class numbers."""
    return bool(asks) and isinstance(asks[0], str)


def class_numbers(asks: Asks) -> tuple[int, ...]:
    """Returns the class number of each image; a prompt has none: -1."""
    return tuple(-1 if isinstance(ask, str) else ask for ask in asks)


def as_argument(asks: Asks) -> dict[str, Any]:
    """Returns the argument of `Pipeline.sample` that says what to draw: labels or prompts."""
    if are_prompts(asks):
        return {"prompts": [str(ask) for ask in asks]}
    return {"labels": [None if label < 0 else label for label in class_numbers(asks)]}


@dataclass(frozen=True)
class WorkUnit:
    """Images that are drawn and written together, or not at all."""

    number: int
    first: int
    """Number of its first image."""
    asks: Asks
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.asks)

    @property
    def labels(self) -> tuple[int, ...]:
        """Returns the class number of each image; -1 for none."""
        return class_numbers(self.asks)


@dataclass(frozen=True)
class Plan:
    """Images 0, 1, 2, ...: image i shows `asks[i]` and has the seed `seed * 2**32 + i`.

    An image depends on (seed, i) and its label or prompt alone. With seed 0, `mar sample --seed i` draws the same one.
    Raises ConfigError for no images, or a seed outside 0 to 2**32 - 1.
    """

    asks: Asks
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.asks) <= SEED_STRIDE:
            raise ConfigError(f"pictures: got {len(self.asks)}, expected at least 1")
        if not 0 <= self.seed < SEED_STRIDE:
            raise ConfigError(f"seed: got {self.seed}, expected 0 to {SEED_STRIDE - 1}")

    @classmethod
    def per_class(cls, count: int, classes: Sequence[int], seed: int = 0) -> Plan:
        """Plans `count` images of each class, in turns: every beginning of the plan is balanced."""
        if count < 1:
            raise ConfigError(f"pictures of each class: got {count}, expected at least 1")
        return cls(tuple(classes) * count, seed)

    @classmethod
    def total(cls, count: int, asks: Sequence[int | str], seed: int = 0) -> Plan:
        """Plans `count` images: image i shows class or prompt i % len(asks)."""
        if count < 1:
            raise ConfigError(f"count: got {count}, expected at least 1")
        rounds, rest = divmod(count, len(asks))
        return cls(tuple(asks) * rounds + tuple(asks[:rest]), seed)

    def __len__(self) -> int:
        return len(self.asks)

    @property
    def labels(self) -> tuple[int, ...]:
        """Returns the class number of each image; -1 for none."""
        return class_numbers(self.asks)

    @property
    def has_prompts(self) -> bool:
        """Tells a plan of prompts from one of classes."""
        return are_prompts(self.asks)

    def units(self, size: int) -> Iterator[WorkUnit]:
        """Yields the plan in units of `size` images; the last unit may be smaller."""
        if size < 1:
            raise ConfigError(f"batch: got {size}, expected at least 1")
        for number, first in enumerate(range(0, len(self), size)):
            asks = self.asks[first : first + size]
            yield WorkUnit(number, first, asks, self.seeds(first, first + len(asks)))

    def seeds(self, first: int, end: int) -> tuple[int, ...]:
        """Returns the seeds of images [first, end)."""
        return tuple(self.seed * SEED_STRIDE + i for i in range(first, end))

    def fingerprint(self) -> str:
        """Returns the sha256, in hex, of labels or prompts in order."""
        if self.has_prompts:
            return hashlib.sha256(json.dumps(self.asks).encode()).hexdigest()
        return hashlib.sha256(np.asarray(self.asks, dtype="<i8").tobytes()).hexdigest()


def read_labels(path: Path) -> list[str | None]:
    """Reads a file of labels, one line for each image (`none`: no class); empty lines are skipped.

    Raises ConfigError for a file that is not text, or has none.
    """
    return _read_lines(path, "label", ", class numbers or names")


def read_prompts(path: Path) -> list[str | None]:
    """Reads a file of prompts, one a line (`none`: no condition); empty lines are skipped.

    Raises ConfigError for a file that is not text, or has none.
    """
    return _read_lines(path, "prompt", "; a line `none` draws without")


def _read_lines(path: Path, kind: str, more: str) -> list[str | None]:
    try:
        lines = [line.strip() for line in read_file_or_pipe(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text, expected a {kind} a line{more}") from None
    asks = [None if line.lower() == "none" else line for line in lines if line]
    if not asks:
        raise ConfigError(f"{path} has no {kind}s, expected one a line{more}")
    return asks
