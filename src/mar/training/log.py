"""What a run tells: `log.jsonl`, TensorBoard, and a line or a bar of progress with the time left."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Log:
    """What a run tells where there is nobody to listen: the log of all processes but the first."""

    def __init__(self) -> None:
        self.skipped_pictures: set[str] = set()

    def write(self, images: int, **numbers: Any) -> None:
        """Numbers by images seen."""

    def advance(self, images: int, loss: float) -> None:
        """How far the run has come."""

    def note(self, text: str) -> None:
        """A line for people."""

    def close(self) -> None:
        """Ends what is shown, and writes out what is held back."""


class RunLog(Log):
    """Numbers of a run, by images seen. Lines past the image count that a run resumes from are dropped."""

    def __init__(self, folder: Path, total_images: int, images: int) -> None:
        super().__init__()
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard.writer import SummaryWriter

        self.path = folder / "log.jsonl"
        self._forget_after(images)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=images)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self.task: TaskID = self.progress.add_task("training", total=total_images, completed=images)
        self.total, self.first, self.begun = total_images, images, time.monotonic()
        self.progress.start()

    def _forget_after(self, images: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("images", 0) <= images]
        if len(kept) < len(lines):
            self.path.write_text("".join(kept), encoding="utf-8")

    def write(self, images: int, **numbers: Any) -> None:
        """One line of the log; a number that is not finite is null there, as JSON has no other word for it."""
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in numbers.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images, **finite}, allow_nan=False) + "\n")
        for name, number in numbers.items():
            if isinstance(number, int | float):
                self.board.add_scalar(name, number, images)
        if not sys.stderr.isatty() and "loss" in numbers:
            print(self._line(images, numbers), file=sys.stderr, flush=True)

    def _line(self, images: int, numbers: dict[str, Any]) -> str:
        seconds = time.monotonic() - self.begun
        left = seconds * (self.total - images) / max(images - self.first, 1)
        return (
            f"{images:,}/{self.total:,} images, loss {numbers['loss']:.4f}, "
            f"{numbers['images_per_second']:.0f} images/s, {left / 60:.0f} min left"
        )

    def advance(self, images: int, loss: float) -> None:
        """Moves the bar."""
        self.progress.update(self.task, completed=images, description=f"loss {loss:.4f}")

    def note(self, text: str) -> None:
        """A line for people."""
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar and writes out what TensorBoard holds back."""
        self.progress.stop()
        self.board.close()
