"""PNGs in a folder for each class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from mar.sampling.plan import WorkUnit
from mar.sampling.sinks.base import Job, Sink, pngs, write_bytes


class PngFolder(Sink):
    """`CLASS/000123.png`: image 123. A class's folder has its name, or its number."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        names = class_folders(job.classes)
        self.paths = [f"{names.get(label, str(label))}/{job.name(i)}.png" for i, label in enumerate(job.plan.labels)]

    def names(self) -> set[str]:
        return set(self.paths)

    def complete(self, existing: set[str]) -> bool:
        return len(existing) == len(self.paths)

    def missing(self, existing: set[str]) -> list[WorkUnit]:
        return [unit for unit in self.units if not existing.issuperset(self._unit_files(unit))]

    def write(self, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> None:
        for name, data in zip(self._unit_files(unit), pngs(self.job, unit, images), strict=True):
            write_bytes(self.folder / name, data)

    def finish(self, rank: int, world: int) -> None:
        """Does nothing: each image is in its place."""

    def tidy(self) -> None:
        """Does nothing: every file stays."""

    def _unit_files(self, unit: WorkUnit) -> list[str]:
        return self.paths[unit.first : unit.first + len(unit.labels)]


def slug(name: str) -> str:
    """Turns a name into one for files: letters, digits, underscores and hyphens; may be empty."""
    return re.sub(r"\W+", "-", name).strip("-")[:80]


def class_folders(classes: Sequence[str]) -> dict[int, str]:
    """Returns a folder's name for each class; shared names get the number."""
    names = [slug(name) or str(i) for i, name in enumerate(classes)]
    while True:  # a name with its number may be that of another class: this gets its number as well
        count = Counter([*(name.casefold() for name in names), "none"])
        if max(count.values()) == 1:
            return {**dict(enumerate(names)), -1: "none"}
        names = [name if count[name.casefold()] == 1 else f"{name}-{i}" for i, name in enumerate(names)]
