"""Data sets that go wrong in a worker, which imports them from here."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from mar.data.images import Example


class Killed(Dataset[Any]):
    """Gives indices; its process ends at number 2."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __getitem__(self, index: int) -> int:
        if index == 2:
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), getattr(signal, self.how))
            time.sleep(60)
        return index


class Threaded(Dataset[Any]):
    """Multiplies with two threads: a forked child of a process that has done so waits for threads it lacks."""

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(2)
        return torch.ones(400, 400) @ torch.ones(400, 400)


class Facts(Dataset[Any]):
    """Gives process, number of threads, and blocked signals."""

    def __getitem__(self, index: int) -> tuple[int, set[int]]:
        return os.getpid(), set(signal.pthread_sigmask(signal.SIG_BLOCK, set()))


@dataclass
class Stuck:
    """A source whose pictures come at once up to a number, and then never."""

    first: int
    seconds: float = 600.0
    classes: tuple[str, ...] = ("a", "b")
    flips: bool = False
    given: int = 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Example:
        if self.given >= self.first:
            time.sleep(self.seconds)
        self.given += 1
        return Example(Image.new("L", (8, 8), index), index % 2, str(index))
