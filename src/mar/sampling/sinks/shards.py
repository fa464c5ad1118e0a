"""WebDataset shards: tar files with a `.png` and a `.cls` or `.txt` for each image."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mar.checkpoint.files import write_atomically, write_bytes
from mar.sampling.plan import WorkUnit, are_prompts
from mar.sampling.sinks.base import Job, Sink, pngs

SHARD = 1000
"""Images of a shard, about: a shard holds whole units."""
PARTS = "parts"


class Shards(Sink):
    """`000007.tar` holds `000123.png` and `000123.cls` (the class number, -1 for none) for each of its images.

    Images of prompts have `000123.txt`, the prompt, instead of a class number.
    Until a shard is whole, its units are in the folder `parts`, as pieces of tar to be joined.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        size = max(1, round(SHARD / job.batch))
        self.shards = [self.units[first : first + size] for first in range(0, len(self.units), size)]

    def names(self) -> set[str]:
        tars = {_tar(number) for number in range(len(self.shards))}
        return tars | {self._part(unit) for unit in self.units}

    def complete(self, existing: set[str]) -> bool:
        return existing.issuperset(_tar(number) for number in range(len(self.shards)))

    def missing(self, existing: set[str]) -> list[WorkUnit]:
        open_shards = [units for number, units in enumerate(self.shards) if _tar(number) not in existing]
        return [unit for units in open_shards for unit in units if self._part(unit) not in existing]

    def write(self, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> None:
        members = []
        kind = "txt" if are_prompts(unit.asks) else "cls"
        for offset, (ask, data) in enumerate(zip(unit.asks, pngs(self.job, unit, images), strict=True)):
            name = self.job.name(unit.first + offset)
            members += [_tar_member(f"{name}.png", data), _tar_member(f"{name}.{kind}", str(ask).encode())]
        write_bytes({self.folder / self._part(unit): b"".join(members)}, self.folder)

    def finish(self, rank: int, world: int) -> None:
        for number in range(rank, len(self.shards), world):
            path, parts = self.folder / _tar(number), [self.folder / self._part(unit) for unit in self.shards[number]]
            if not path.exists():
                write_atomically(path, partial(_join, parts))
            for part in parts:
                part.unlink(missing_ok=True)

    def tidy(self) -> None:
        self.finish(0, 1)  # a run may have been killed before it removed a shard's parts
        parts = self.folder / PARTS
        if parts.is_dir() and not any(parts.iterdir()):
            parts.rmdir()

    def _part(self, unit: WorkUnit) -> str:
        return f"{PARTS}/{self.job.name(unit.first)}.tar-part"


def _tar(number: int) -> str:
    return f"{number:06}.tar"


def _tar_member(name: str, data: bytes) -> bytes:
    """Formats a file of a tar without owner or date: the bytes follow from the data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _join(parts: list[Path], path: Path) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
        file.write(bytes(2 * tarfile.BLOCKSIZE))  # a tar's end, and full records, as tar itself writes them
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
