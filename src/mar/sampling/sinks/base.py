"""The base of all outputs: units written whole, files that exist already, and the manifest of a run.

A unit's files follow from the plan, the batch size and the settings alone. Each is written to a temporary file and
renamed. A run that is killed at any moment and started again ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mar.checkpoint.files import write_atomically, write_text
from mar.config import ConfigError, SamplingConfig, rename_old_keys
from mar.sampling.plan import Plan, WorkUnit

MANIFEST = "generate.json"
FOR_PEOPLE = ("mar",)
"""Entries of a manifest for people only: another version may go on with a run."""

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


@dataclass(frozen=True)
class Job:
    """A plan, its output folder and its settings."""

    out: Path
    plan: Plan
    batch: int
    """Pictures of a unit."""
    shape: tuple[int, int, int]
    """Channels (1 or 3), height and width of a picture."""
    classes: tuple[str, ...]
    """Names of the classes; may be empty."""
    settings: dict[str, Any]
    """Everything that the files depend on, JSON-able: the manifest."""
    facts: dict[str, Any]
    """Metadata of each PNG, beside its label and seed."""

    def __post_init__(self) -> None:
        if self.shape[0] not in (1, 3):
            raise ConfigError(f"pictures of {self.shape[0]} channels can't be written: expected 1 (grey) or 3 (RGB)")

    def name(self, picture: int) -> str:
        """Format an image's number with the plan's number of digits, at least six."""
        return f"{picture:0{max(6, len(str(len(self.plan) - 1)))}}"


class Sink(ABC):
    """An output of one format."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.units = list(job.plan.units(job.batch))

    @property
    def folder(self) -> Path:
        """The folder that is this output's alone."""
        return self.job.out

    @property
    def manifest(self) -> Path:
        """The file that says what the output was made of."""
        return self.folder / MANIFEST

    @abstractmethod
    def names(self) -> set[str]:
        """List all files that a run ever writes, relative to the folder."""

    @abstractmethod
    def missing(self, there: set[str]) -> list[WorkUnit]:
        """List the units still to be drawn, given the files that are there.

        Raises CheckpointError where it is known beforehand that the disk has no room for them.
        """

    @abstractmethod
    def complete(self, there: set[str]) -> bool:
        """Return whether the output is finished, given the files that are there."""

    @abstractmethod
    def write(self, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> None:
        """Writes a unit's pictures."""

    @abstractmethod
    def finish(self, rank: int, world: int) -> None:
        """Puts the output together, once all units are there: this process's part of it."""

    @abstractmethod
    def tidy(self) -> None:
        """Takes away what a finished output does not need; one process does it, after all have finished."""

    def others(self) -> Path | None:
        """Return a path outside the folder that is in the way of a new output."""
        return None


def prepare(sink: Sink) -> list[WorkUnit] | None:
    """Makes an output ready to be written or gone on with: the units still to be drawn; None where it is finished.

    Raises ConfigError, and touches nothing, where the output was begun with other settings or holds other files. A run
    that left nothing but its manifest, as one for which memory did not suffice, has not begun.
    """
    out = sink.job.out
    if sink.folder.exists() and not sink.folder.is_dir():
        raise ConfigError(f"{sink.folder} is a file, but pictures go into a folder; take another --out")
    there, leftovers, foreign = _survey(sink)
    held = bool(there or foreign or sink.others())
    begun = sink.manifest.is_file() and (held or not _is_manifest(sink))
    if begun:
        _compare(sink)
    else:
        foreign = foreign or next(iter(sorted(there)), None)
        in_the_way = sink.others() or (None if foreign is None else sink.folder / foreign)
        if in_the_way is not None:
            raise ConfigError(f"{in_the_way} is there, but not from a run of `mar generate`; take another --out")
    if foreign is not None:
        raise ConfigError(f"{out} holds {foreign}, which this run did not write; move it away or take another --out")
    to_draw = None if sink.complete(there) else sink.missing(there)
    for path in leftovers:
        path.unlink(missing_ok=True)
    if not begun:
        write_text(sink.manifest, json.dumps(sink.job.settings, indent=1) + "\n")
    return to_draw


def _survey(sink: Sink) -> tuple[set[str], list[Path], str | None]:
    """List the output's files, leftovers of killed runs, and a file that is neither.

    Hidden files of other programs are nobody's business.
    """
    names = sink.names() | {MANIFEST}
    there: set[str] = set()
    leftovers = [
        p for p in sink.manifest.parent.glob(f".{glob.escape(sink.manifest.name)}.*") if _TEMPORARY.fullmatch(p.name)
    ]
    foreign = []
    for parent, folders, files in os.walk(sink.folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(sink.folder)
        for file in files:
            temporary = _TEMPORARY.fullmatch(file)
            if (name := (inside / file).as_posix()) in names:
                there.add(name)
            elif temporary and (inside / temporary[1]).as_posix() in names:
                leftovers.append(Path(parent, file))
            elif not file.startswith("."):
                foreign.append(name)
    return there - {MANIFEST}, leftovers, min(foreign, default=None)


def _read(manifest: Path) -> dict[str, Any] | None:
    """Read a manifest; None where there is none."""
    try:
        begun = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(begun, dict):
        return None
    renamed: dict[str, Any] = json.loads(json.dumps(rename_old_keys(SamplingConfig, begun)))
    return renamed


def _is_manifest(sink: Sink) -> bool:
    """Return whether the file is a manifest, by the names of its settings."""
    return (_read(sink.manifest) or {}).keys() == sink.job.settings.keys()


def _compare(sink: Sink) -> None:
    """Raises ConfigError where a manifest is not that of this run."""
    path, ours = sink.manifest, json.loads(json.dumps(sink.job.settings))
    begun = _read(path)
    if begun is None:
        raise ConfigError(f"{path} is damaged, so what is there can't be gone on with; take another --out")
    keys = [key for key in (*ours, *begun) if key not in FOR_PEOPLE and begun.get(key) != ours.get(key)]
    if keys:
        differences = ", ".join(
            f"{key} {_short(begun.get(key))}, not {_short(ours.get(key))}" for key in dict.fromkeys(keys)
        )
        raise ConfigError(f"{sink.job.out} was begun with {differences}; give the same settings, or take another --out")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write, len(data))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def png(image: UInt8[np.ndarray, "c h w"], facts: dict[str, Any]) -> bytes:
    """Encode an 8-bit gray or RGB image as a PNG, with `facts` as JSON in its metadata under `mar`."""
    info = PngInfo()
    info.add_text("mar", json.dumps(facts))
    buffer = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def pngs(job: Job, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> list[bytes]:
    """Encode a unit's images as PNGs with their settings, label (null for none) and seed."""
    return [
        png(image, {**job.facts, "label": None if label < 0 else label, "seed": seed})
        for image, label, seed in zip(images, unit.labels, unit.seeds, strict=True)
    ]
