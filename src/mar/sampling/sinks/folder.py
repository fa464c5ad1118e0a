"""PNGs in folders of classes, or beside a file of prompts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from mar.checkpoint.files import write_bytes, write_text
from mar.sampling.plan import WorkUnit
from mar.sampling.sinks.base import Job, Sink, pngs

METADATA = "metadata.jsonl"
"""File of the prompts, as captions in Hugging Face's imagefolder have it."""
MAX_NAME = 255
"""Bytes of a name in most file systems."""
MAX_SLUG = 240
"""Bytes of a class's folder, whose number may follow."""
PROMPT_SLUG = 60
"""Letters of a prompt in the name of a file."""


class PngFolder(Sink):
    """`CLASS/000123.png`: image 123. A class's folder has its name, or its number.

    Images of prompts are `000123.png` beside METADATA: a folder with captions, as `mar train` reads it.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.plan.has_prompts:
            self.paths = [f"{job.name(i)}.png" for i in range(len(job.plan))]
            self.others = {METADATA}
        else:
            folders = class_folders(job.classes)
            labels = job.plan.labels
            self.paths = [f"{folders.get(label, str(label))}/{job.name(i)}.png" for i, label in enumerate(labels)]
            self.others = set()

    def names(self) -> set[str]:
        return {*self.paths, *self.others}

    def complete(self, existing: set[str]) -> bool:
        return len(existing) == len(self.paths) + len(self.others)

    def missing(self, existing: set[str]) -> list[WorkUnit]:
        return [unit for unit in self.units if not existing.issuperset(self._unit_files(unit))]

    def write(self, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> None:
        names, files = self._unit_files(unit), pngs(self.job, unit, images)
        write_bytes({self.folder / name: data for name, data in zip(names, files, strict=True)}, self.folder)

    def finish(self, rank: int, world: int) -> None:
        """Writes the prompts; each image is in its place."""
        if rank == 0 and self.others:
            rows = ({"file_name": name, "text": ask} for name, ask in zip(self.paths, self.job.plan.asks, strict=True))
            write_text(self.folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows))

    def tidy(self) -> None:
        """Does nothing: every file stays."""

    def _unit_files(self, unit: WorkUnit) -> list[str]:
        return self.paths[unit.first : unit.first + len(unit)]


def slug(name: str, limit: int = MAX_SLUG) -> str:
    """Turns a name into one for files: letters, digits, underscores and hyphens; may be empty.

    One of more than `limit` bytes ends with a hash of the whole name.
    """
    words = re.sub(r"\W+", "-", name).strip("-")[:80]
    if len(words.encode()) <= limit:
        return words
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{words.encode()[: limit - 9].decode(errors='ignore').strip('-')}-{digest}"


def prompt_slug(prompt: str) -> str:
    """Turns a prompt into a name for files; a shortened one ends with a hash of the whole prompt."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-") or "prompt"
    if len(words) <= PROMPT_SLUG and len(words.encode()) <= 2 * PROMPT_SLUG:
        return words
    short = words[:PROMPT_SLUG].encode()[: 2 * PROMPT_SLUG].decode(errors="ignore")  # file names have 255 bytes
    return f"{short.strip('-')}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def class_folders(classes: Sequence[str]) -> dict[int, str]:
    """Returns a folder's name for each class; shared names get the number."""
    names = [slug(name) or str(i) for i, name in enumerate(classes)]
    while True:  # a name with its number may be that of another class: this gets its number as well
        count = Counter([*(name.casefold() for name in names), "none"])
        if max(count.values()) == 1:
            return {**dict(enumerate(names)), -1: "none"}
        names = [name if count[name.casefold()] == 1 else f"{name}-{i}" for i, name in enumerate(names)]
