"""A folder of PNGs in folders of classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from mar.sampling.plan import WorkUnit
from mar.sampling.sinks.base import Job, Sink, pngs, write_bytes


class PngFolder(Sink):
    """`CLASS/000123.png`: picture 123. A class's folder is called by its name, or by its number."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        names = class_folders(job.classes)
        self.paths = [f"{names.get(label, str(label))}/{job.name(i)}.png" for i, label in enumerate(job.plan.labels)]

    def names(self) -> set[str]:
        return set(self.paths)

    def complete(self, there: set[str]) -> bool:
        return len(there) == len(self.paths)

    def missing(self, there: set[str]) -> list[WorkUnit]:
        return [unit for unit in self.units if not there.issuperset(self._of(unit))]

    def write(self, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> None:
        for name, data in zip(self._of(unit), pngs(self.job, unit, images), strict=True):
            write_bytes(self.folder / name, data)

    def finish(self, rank: int, world: int) -> None:
        """Nothing: each picture is where it belongs."""

    def tidy(self) -> None:
        """Nothing: no file is written that does not stay."""

    def _of(self, unit: WorkUnit) -> list[str]:
        return self.paths[unit.first : unit.first + len(unit.labels)]


def slug(name: str) -> str:
    """A name as a file's or a folder's: letters, digits, underscores and hyphens; empty where it has none of these."""
    return re.sub(r"\W+", "-", name).strip("-")[:80]


def class_folders(classes: Sequence[str]) -> dict[int, str]:
    """A folder's name for each class; one that two classes share gets the number too."""
    names = [slug(name) or str(i) for i, name in enumerate(classes)]
    while True:  # a name with its number may be another one's, which then gets its number as well
        count = Counter([*(name.casefold() for name in names), "none"])
        if max(count.values()) == 1:
            return {**dict(enumerate(names)), -1: "none"}
        names = [name if count[name.casefold()] == 1 else f"{name}-{i}" for i, name in enumerate(names)]
