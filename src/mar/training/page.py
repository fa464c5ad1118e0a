"""Write a run's page, `index.html` in its folder: pictures, curves and the time left.

It is opened as a file, without a server, and renews itself until the run ends. `Page` is a writer of the log: it keeps
what the page shows, and `mar.training.page_html.render` makes the text. Nothing here can end a run: a disk that refuses
is noted once, and damaged files of earlier sessions are left out.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from mar.checkpoint.files import CheckpointError, check_regular, write_text
from mar.training.curves import Curve
from mar.training.page_html import Command, Sheet, Stage, StageKind, render

PAGE_FILE = "index.html"
"""File in a run's folder."""
WRITE_INTERVAL_S = 5.0
"""The page is written at most so often, but for new pictures and validations."""
STRIP_SHEETS = 5
"""Earlier sheets shown beside the newest."""
CURVES = ("loss", "val_loss", "psnr", "ema_distance", "raw_distance")
"""Numbers of the log that are kept."""


class Page:
    """Writes a log as a page, now and then.

    Args:
        root: folder of the page.
        stages: the steps of the run, in order.
        commands: uses of the result.
    """

    def __init__(self, root: Path, stages: Sequence[Stage], commands: Sequence[Command]) -> None:
        self.root, self.stages, self.commands = root, list(stages), tuple(commands)
        self.current = 0
        self.finished = False
        """The current stage has reached its end; `close` shows it."""
        self.deadline: float | None = None
        """`time.monotonic()` when the last stage is to end, whatever the earlier ones take."""
        self.note: Callable[[str], None] = functools.partial(print, file=sys.stderr)
        """Tells people that the page can't be written."""
        self._can_write = True
        self._first_image, self._start, self._written = 0, time.monotonic(), -math.inf

    @property
    def uri(self) -> str:
        """The page's address."""
        return (self.root.resolve() / PAGE_FILE).as_uri()

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.current]

    def open(self, kind: StageKind) -> None:
        """Show that a stage is getting ready, and earlier ones are finished."""
        self._enter(kind)
        self._set(state="opening")
        self._write()

    def expect(self, kind: StageKind, seconds: float) -> None:
        """Set the time that a later stage takes."""
        self.stages = [replace(s, seconds_expected=seconds) if s.kind == kind else s for s in self.stages]

    def begin(self, kind: StageKind, images: int, total: int, **facts: Any) -> None:
        """Show that a stage runs, after `images` images of `total`.

        Args:
            kind: of the stage.
            images: seen before; what later ones left is not shown.
            total: its length in images.
            facts: further fields of the stage.
        """
        self._enter(kind)
        self.stages[self.current] = self._read(replace(self.stage, total=total, **facts), images)
        self._set(state="running", images=images, seconds_left=None, images_per_second=None)
        self._first_image, self._start = images, time.monotonic()
        self._write()

    def show_latents(self, images: int, total: int) -> None:
        """Show how many latents are cached."""
        if self.stage.state == "running":
            self.advance(images)
        else:
            self.begin("latents", images, total)

    def advance(self, images: int) -> None:
        """Show how far the current stage is."""
        seconds, new = time.monotonic() - self._start, images - self._first_image
        left, speed = None, self.stage.images_per_second
        if new > 0 and seconds > 0:
            left = max(self.stage.total - images, 0) * seconds / new
            if "loss" not in self.stage.curves:  # the log has it more precisely: without callbacks
                speed = new / seconds
        self._set(images=images, seconds_left=left, images_per_second=speed)
        if self.deadline is not None and left is not None and self.stage is not self.stages[-1]:
            self.expect(self.stages[-1].kind, max(self.deadline - time.monotonic() - left, 0.0))
        if time.monotonic() - self._written >= WRITE_INTERVAL_S:
            self._write()

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """Add a line of the log."""
        _add(self.stage.curves, images, numbers)
        if is_number(speed := numbers.get("images_per_second")):
            self._set(images_per_second=speed)
        if {"val_loss", "psnr"} & numbers.keys():
            self._write()
        else:
            self.advance(max(images, self.stage.images))

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Show the new sheet, a file of `samples/`."""
        self._set(sheets=find_sheets(self.stage.folder, self.root, images))
        self._write()

    def close(self) -> None:
        """Show that the current stage is finished, or was stopped."""
        if self.stage.state in ("opening", "running"):
            self._set(state="finished" if self.finished else "stopped", seconds_left=None)
            self._write()

    def _enter(self, kind: StageKind) -> None:
        self.current = [stage.kind for stage in self.stages].index(kind)
        self.finished = False
        for i, stage in enumerate(self.stages[: self.current]):
            if stage.state != "finished":
                self.stages[i] = replace(self._read(stage), state="finished")

    def _read(self, stage: Stage, images: int | None = None) -> Stage:
        """Read what earlier sessions left of a stage, up to `images`."""
        curves: dict[str, Curve] = {}
        seen = 0
        for line in read_log(stage.folder / "log.jsonl"):
            seen = max(seen, line["images"])
            _add(curves, line["images"], line)
        sheets = find_sheets(stage.folder, self.root, images)
        return replace(stage, images=seen if images is None else images, curves=curves, sheets=sheets)

    def _set(self, **changes: Any) -> None:
        self.stages[self.current] = replace(self.stage, **changes)

    def _write(self) -> None:
        """Write the file; a disk that refuses is noted once, and the run goes on."""
        text = render(self.root, self.stages, self.commands, datetime.now())
        try:
            write_text(self.root / PAGE_FILE, text, durable=False)
            self._can_write = True
        except CheckpointError as error:
            if self._can_write:
                self.note(f"the page is not renewed: {error}")
            self._can_write = False
        self._written = time.monotonic()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a log that have a number of images; damaged ones are skipped."""
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8", errors="replace")
    except (OSError, CheckpointError):
        return
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("images"), int):
            yield values


def is_number(value: object) -> bool:
    """Return whether a value of a log can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _add(curves: Any, images: int, numbers: Mapping[str, Any]) -> None:
    for name in CURVES:
        if is_number(value := numbers.get(name)):
            curves.setdefault(name, Curve()).add(images, value)


def find_sheets(folder: Path, root: Path, images: int | None) -> tuple[Sheet, ...]:
    """Choose sheets of a run for its page: the newest, and earlier ones from the first on.

    Args:
        folder: of the run.
        root: of the page.
        images: later sheets are those of a session that was killed; None: all.
    """
    try:
        names = sorted(name for name in os.listdir(folder / "samples") if re.fullmatch(r"\d{12}\.png", name))
    except OSError:
        return ()
    if images is not None:
        names = [name for name in names if int(name[:12]) <= images]
    last, count = len(names) - 2, min(len(names) - 1, STRIP_SHEETS)
    chosen = [names[round(i * last / max(count - 1, 1))] for i in range(count)] + names[-1:]
    prefix = Path(os.path.relpath(folder, root), "samples").as_posix()
    sheets = []
    for name in chosen:
        if (size := _png_size(folder / "samples" / name)) is not None:
            sheets.append(Sheet(f"{prefix}/{name}", int(name[:12]), *size))
    return tuple(sheets)


def _png_size(path: Path) -> tuple[int, int] | None:
    """Return width and height by a PNG's header; None if it is damaged or gone."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            header = file.read(24)
    except (OSError, CheckpointError):
        return None
    if len(header) < 24 or header[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    return (width, height) if width and height else None
