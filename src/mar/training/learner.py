"""What is trained, as the loop sees it: a model, what learns it, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from mar.data.loader import Batch
from mar.training.ema import EMA
from mar.training.optim import Pace

WATCHED = "watched"
"""A file in a run's folder that says after how many images its hooks last came to their end."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    images: int = 0
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Time spent in steps, over all sessions of the run."""
    watched: int = 0
    """Images up to which all hooks that were due have come to their end."""

    @classmethod
    def resumed(cls, folder: Path, saved: dict[str, Any]) -> Progress:
        """That of a saved state, and what was done after it was saved: hooks of the step that came with it."""
        progress, note = cls(**saved), folder / WATCHED
        watched = int(note.read_text(encoding="utf-8")) if note.is_file() else 0
        progress.watched = max(progress.watched, min(watched, progress.images))
        return progress


@dataclass(frozen=True)
class Hook:
    """What a run does now and then beside learning; it must not change the run."""

    every: int
    """Images between calls; 0 never calls."""
    call: Callable[[Any], object]
    """Gets the run."""


@runtime_checkable
class Schedule(Pace, Protocol):
    """The settings of a run that `train` follows (`TrainConfig` tells what they are)."""

    @property
    def clip(self) -> float: ...
    @property
    def log_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...


@runtime_checkable
class Learner(Protocol):
    """What `train` brings to its end, step by step."""

    folder: Path
    progress: Progress
    hooks: list[Hook]
    parts: dict[str, float]
    """What else the last step has to tell the log."""
    ema: EMA
    optimizers: tuple[torch.optim.Optimizer, ...]

    @property
    def config(self) -> Schedule: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        ...

    def batches(self) -> Iterator[Batch]:
        """From where the run has come to, without end."""
        ...

    def step(self, batch: Batch) -> tuple[float, float]:
        """Learns from a batch by `descend`; this process's loss, and the gradient's norm."""
        ...

    def save(self) -> None:
        """Stores the state."""
        ...
