"""What a run tells: numbers and pictures by images seen, and a line or a bar of progress with the time left.

Numbers go to `log.jsonl` in the run's folder, and to what `TrainConfig.log_to` names (`mar.training.writers`). Each
line of `log.jsonl` has `images`, the images seen so far, and of these:

- every `log_every` steps and at the end: `step`; `loss`, the mean since the last such line; `gradient_norm` before
  clipping; `lr`; `images_per_second` since the last such line, looks at the run left out; `skipped_steps`, whose
  gradient was not finite, in the whole run; `skipped_share`, their share since the last such line; `seconds` spent in
  steps, over all sessions; and a tokenizer's terms of its loss;
- before the first step: `tokenizer_psnr`;
- every `validate_every` images: `val_loss` of held-out pictures, and `val_loss_00` to `val_loss_09`, by tenths of the
  timesteps from the least noise to the most (`mar.training.validation`);
- every `--eval-every` images: `ema_distance`, `raw_distance` and what else the network gives; a tokenizer's `psnr`.

What is not finite is null. Pictures, called `samples` and `samples-raw`, are files in `samples/` first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mar import runtime
from mar.config import to_dict
from mar.training.writers import Writer, open_writers


class Log:
    """What a run tells where there is nobody to listen: the log of all processes but the first."""

    def __init__(self) -> None:
        self.skipped_pictures: set[str] = set()

    def write(self, images: int, **numbers: Any) -> None:
        """Numbers by images seen."""

    def picture(self, images: int, name: str, picture: Image.Image) -> None:
        """A picture by images seen."""

    def advance(self, images: int, loss: float) -> None:
        """How far the run has come."""

    def note(self, text: str) -> None:
        """A line for people."""

    def close(self) -> None:
        """Ends what is shown, and writes out what is held back."""


class RunLog(Log):
    """The log of a run of `total_images` that begins or goes on at `images`, by default in its folder alone."""

    def __init__(self, folder: Path, total_images: int, images: int, writers: Sequence[Writer] | None = None) -> None:
        super().__init__()
        self.writers = open_writers(["tensorboard"], folder, config={}, images=images) if writers is None else writers
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

    def write(self, images: int, **numbers: Any) -> None:
        """Numbers, to every writer."""
        for writer in self.writers:
            writer.write(images, numbers)
        if not sys.stderr.isatty() and "loss" in numbers:
            print(self._line(images, numbers), file=sys.stderr, flush=True)

    def picture(self, images: int, name: str, picture: Image.Image) -> None:
        """A picture, to every writer that takes some."""
        for writer in self.writers:
            writer.picture(images, name, picture)

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
        # as it is: the brackets of a path or a pattern are no markup
        self.progress.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar and writes out what is held back."""
        self.progress.stop()
        for writer in self.writers:
            writer.close()


def open_log(run: Any) -> Log:
    """The log of a run, of a model or a tokenizer, on the first process; on the others one that says nothing.

    ConfigError where something that it is to go to is not installed, or refuses.
    """
    if runtime.rank() != 0:
        return Log()
    config, progress = run.config, run.progress
    writers = open_writers(
        config.log_to, run.folder, config=to_dict(config), images=progress.images, watched=progress.watched
    )
    return RunLog(run.folder, config.images, progress.images, writers)
