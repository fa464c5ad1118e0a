"""The contract of all sinks: units written whole, resumption, and a manifest of the settings.

A unit's files follow from the plan, the batch size and the settings alone. Each is written to a temporary file and
renamed. A run that was killed at any moment and started again ends with the same bytes.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mar import distributed
from mar.checkpoint.files import check_writable, write_text
from mar.config import ConfigError, SamplingConfig, later_defaults, rename_old_keys
from mar.sampling.generate import BrokenLatents
from mar.sampling.plan import Plan, WorkUnit
from mar.sampling.progress import Advance, rank_meter

MANIFEST = "generate.json"
IGNORED_SETTINGS = ("mar",)
"""Settings of a manifest that are only for people: another version may go on with a run."""

MAX_PNG_THREADS = 16
"""Threads that encode PNGs, at most; a process of a cluster may see many more processors than are its own."""

Draw = Callable[[WorkUnit, Advance], UInt8[np.ndarray, "n c h w"]]
"""Draws a unit's images. It calls its second argument with the number of images drawn so far."""

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


@dataclass(frozen=True)
class Job:
    """The images to write, and their place."""

    out: Path
    plan: Plan
    batch: int
    """Images of a unit."""
    shape: tuple[int, int, int]
    """Channels (1 or 3), height and width of an image."""
    classes: tuple[str, ...]
    """Names of the classes; may be empty."""
    settings: dict[str, Any]
    """Everything that the files depend on, for JSON: the manifest."""
    facts: dict[str, Any]
    """Metadata of each PNG, beside its label or prompt, and seed."""

    def __post_init__(self) -> None:
        if self.shape[0] not in (1, 3):
            raise ConfigError(f"pictures: got {self.shape[0]} channels, expected 1 (gray) or 3 (RGB)")

    def name(self, index: int) -> str:
        """Formats an image's number with the plan's digits, at least six."""
        return f"{index:0{max(6, len(str(len(self.plan) - 1)))}}"


class Sink(ABC):
    """An output of one format."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.units = list(job.plan.units(job.batch))

    @property
    def folder(self) -> Path:
        """Returns the folder that belongs to this output alone."""
        return self.job.out

    @property
    def manifest(self) -> Path:
        """Returns the file of the output's settings."""
        return self.folder / MANIFEST

    @abstractmethod
    def names(self) -> set[str]:
        """Returns all files that a run ever writes, relative to the folder."""

    @abstractmethod
    def missing(self, existing: set[str]) -> list[WorkUnit]:
        """Returns the units still to be drawn, given the existing files.

        Raises CheckpointError if the disk has no room for them.
        """

    @abstractmethod
    def complete(self, existing: set[str]) -> bool:
        """Tells whether the output is finished, given the existing files."""

    @abstractmethod
    def write(self, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> None:
        """Writes a unit's images."""

    @abstractmethod
    def finish(self, rank: int, world: int) -> None:
        """Assembles the output from all units: this rank's part of it."""

    @abstractmethod
    def tidy(self) -> None:
        """Removes the leftovers of a finished output; one rank does it, after all have finished."""

    def obstacle(self) -> Path | None:
        """Returns a file outside the folder that blocks a new output."""
        return None


# ---- A whole run


def write_all(sink: Sink, draw: Draw, check: Callable[[], None]) -> int | None:
    """Draws and writes all missing images of an output, with all ranks.

    Args:
        sink: the output, new or begun.
        draw: draws the images of a unit.
        check: is called after every reveal step; may raise to stop.

    Returns:
        The number of images drawn by all ranks; None if the output was finished already.

    Raises:
        ConfigError: on rank 0, if the output can't be gone on with (`prepare`).
        BrokenLatents: for latents that are no image.
    """
    units = None
    with distributed.collective_errors():
        if distributed.rank() == 0:
            units = prepare(sink)
            if units is None:
                sink.tidy()
    units = distributed.all_gather_object(units)[0]
    if units is None:
        return None
    _write_units(sink, units, draw, check)
    distributed.barrier()
    with distributed.collective_errors():
        sink.finish(distributed.rank(), distributed.world_size())
    if distributed.rank() == 0:
        sink.tidy()
    return _count(units)


def _write_units(sink: Sink, units: Sequence[WorkUnit], draw: Draw, check: Callable[[], None]) -> None:
    """Draws and writes this rank's share of the units."""
    own = units[distributed.rank() :: distributed.world_size()]
    total, done = len(sink.job.plan), 0
    with rank_meter(_count(own), total, total - _count(units), check) as show:

        def advance(part: float) -> None:
            show(done + part)

        for unit in own:
            try:
                images = draw(unit, advance)
            except BrokenLatents as error:
                raise BrokenLatents(f"pictures from {unit.first}: {error}") from error
            sink.write(unit, images)
            done += len(unit)


def _count(units: Sequence[WorkUnit]) -> int:
    return sum(len(unit) for unit in units)


# ---- Resumption


def prepare(sink: Sink) -> list[WorkUnit] | None:
    """Prepares an output, new or begun: returns the units still to be drawn, None if it is finished.

    Raises ConfigError, and changes nothing, if the output was begun with other settings or holds other files. A run
    that left only its manifest has not begun: its memory did not suffice, say.
    """
    out = sink.job.out
    if sink.folder.exists() and not sink.folder.is_dir():
        raise ConfigError(f"{sink.folder} is a file, expected a folder for pictures; take another --out")
    existing, leftovers, foreign = _list_files(sink)
    in_use = bool(existing or foreign or sink.obstacle())
    begun = sink.manifest.is_file() and (in_use or not _is_manifest(sink))
    if begun:
        _check_same_settings(sink)
    else:
        foreign = foreign or next(iter(sorted(existing)), None)
        obstacle = sink.obstacle() or (None if foreign is None else sink.folder / foreign)
        if obstacle is not None:
            raise ConfigError(f"{obstacle} is there, but not from a run of `mar generate`; take another --out")
    if foreign is not None:
        raise ConfigError(f"{out} holds {foreign}, which this run did not write; move it away or take another --out")
    missing = None if sink.complete(existing) else sink.missing(existing)
    if missing is not None:
        check_writable(sink.manifest.parent, is_file=False)
    for path in leftovers:
        path.unlink(missing_ok=True)
    if not begun or (_read_manifest(sink) or {}).get("allow_broken") != sink.job.settings.get("allow_broken"):
        write_text(sink.manifest, json.dumps(sink.job.settings, indent=1) + "\n")
    return missing


def _list_files(sink: Sink) -> tuple[set[str], list[Path], str | None]:
    """Returns the output's files, temporary files of killed runs, and one file that is neither.

    Hidden files of other programs are ignored.
    """
    names = sink.names() | {MANIFEST}
    existing: set[str] = set()
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
                existing.add(name)
            elif temporary and (inside / temporary[1]).as_posix() in names:
                leftovers.append(Path(parent, file))
            elif not file.startswith("."):
                foreign.append(name)
    return existing - {MANIFEST}, leftovers, min(foreign, default=None)


def _read_manifest(sink: Sink) -> dict[str, Any] | None:
    """Reads a manifest under today's names of settings; None for anything else."""
    try:
        content = json.loads(sink.manifest.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    later = {name: value for name, value in later_defaults(SamplingConfig).items() if name in sink.job.settings}
    settings: dict[str, Any] = json.loads(json.dumps(later | rename_old_keys(SamplingConfig, content)))
    return settings


def _is_manifest(sink: Sink) -> bool:
    """Tells a manifest from a file of someone's own, by the names of its settings."""
    return (_read_manifest(sink) or {}).keys() == sink.job.settings.keys()


def _check_same_settings(sink: Sink) -> None:
    """Raises ConfigError for the manifest of a run with other settings."""
    path, ours = sink.manifest, json.loads(json.dumps(sink.job.settings))
    begun = _read_manifest(sink)
    if begun is None:
        raise ConfigError(f"{path} is damaged, so that its run can't go on; take another --out")
    keys = [key for key in (*ours, *begun) if key not in IGNORED_SETTINGS and begun.get(key) != ours.get(key)]
    if {*keys} == {"allow_broken"} and ours["allow_broken"]:
        return  # as BrokenLatents advises; what was drawn before would be the same
    if keys:
        changes = [f"{key} {_short(begun.get(key))}, not {_short(ours.get(key))}" for key in dict.fromkeys(keys)]
        raise ConfigError(
            f"{sink.job.out} was begun with {', '.join(changes)}; give the same settings, or take another --out"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


# ---- Files


def png(image: UInt8[np.ndarray, "c h w"], facts: dict[str, Any]) -> bytes:
    """Encodes an 8-bit gray or RGB image as a PNG.

    `facts` are JSON in its metadata, under the key `mar`.
    """
    info = PngInfo()
    info.add_text("mar", json.dumps(facts))
    buffer = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def pngs(job: Job, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> list[bytes]:
    """Encodes a unit's images as PNGs, in threads: zlib lets them run side by side.

    Their metadata are settings, label or prompt (null for none), and seed.
    """
    facts = [
        {**job.facts, **condition_metadata(ask), "seed": seed} for ask, seed in zip(unit.asks, unit.seeds, strict=True)
    ]
    assert len(images) == len(facts)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_PNG_THREADS), thread_name_prefix="mar-png") as pool:
        return list(pool.map(png, images, facts))


def condition_metadata(ask: int | str) -> dict[str, Any]:
    """Returns what an image's metadata say of its class number or prompt."""
    return {"prompt": ask or None} if isinstance(ask, str) else {"label": None if ask < 0 else ask}
