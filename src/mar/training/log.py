"""Where a log goes: `log.jsonl`, TensorBoard, Weights & Biases, trackio, behind one small interface.

The two last are packages of their own (extras `wandb` and `trackio`). What they call the run is kept in the run's
folder, so that a run that is gone on with goes on there, too. What they have of it past the state from which it goes on
is not told again.

What a run tells: numbers and pictures by images seen, and a line or a bar of progress with the time left.

Numbers go to `log.jsonl` in the run's folder, and to what `TrainConfig.log_to` names (`mar.training.log`). Each
line of `log.jsonl` has `images`, the images seen so far, and of these:

- every `log_every` steps and at the end: `step`; `loss`, the mean since the last such line; `gradient_norm` before
  clipping; `lr`; `images_per_second` since the last such line, looks at the run left out; `skipped_steps`, whose
  gradient was not finite, in the whole run; `skipped_share`, their share since the last such line; `seconds` spent in
  steps, over all sessions; and a tokenizer's terms of its loss;
- before the first step: `tokenizer_psnr`;
- every `validate_every` images: `val_loss` of held-out pictures, and `val_loss_00` to `val_loss_09`, by tenths of the
  timesteps from the least noise to the most (`mar.training.callbacks`);
- every `--eval-every` images: `ema_distance`, `raw_distance` and what else the network gives; a tokenizer's `psnr`.

What is not finite is null. Pictures, called `samples` and `samples-raw`, are files in `samples/` first.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mar import distributed
from mar.checkpoint.files import write_text
from mar.config import ConfigError, to_dict

PROJECT = "mar"
"""What runs are filed under, where the environment does not say otherwise (WANDB_PROJECT, TRACKIO_PROJECT)."""
NAMES_FILE = "trackers.json"


@runtime_checkable
class Writer(Protocol):
    """One place that a log goes to."""

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """Numbers of a run after so many images seen."""
        ...

    def picture(self, images: int, name: str, picture: Image.Image) -> None:
        """A picture of that name, such as a sample grid."""
        ...

    def close(self) -> None:
        """Writes out what is held back."""
        ...


class JsonLines:
    """`log.jsonl`: one JSON object a line. It takes numbers and texts, but no pictures.

    Of a run that goes on at `images`, with whatever else was due up to `watched` done, lines that are to come again are
    dropped. `told` is the image count of the last line that there was before.
    """

    def __init__(self, path: Path, images: int = 0, watched: int | None = None) -> None:
        self.path, self.told = path, 0
        if path.exists():
            self._forget_after(images, images if watched is None else watched)

    def _forget_after(self, images: int, watched: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = []
        for line in lines:
            if not line.endswith("\n"):  # the process was killed while it wrote this one
                continue
            said = json.loads(line)
            count = said.get("images", 0)
            self.told = max(self.told, count)
            if images and (count <= watched or (count <= images and "step" in said)):
                kept.append(line)
        if len(kept) < len(lines):
            write_text(self.path, "".join(kept))

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """One line; a number that is not finite is null there, as JSON has no other word for it."""
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in numbers.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images, **finite}, allow_nan=False) + "\n")

    def picture(self, images: int, name: str, picture: Image.Image) -> None:
        """Nothing: pictures are files in `samples/`."""

    def close(self) -> None:
        """Every line was written at once."""


class TensorBoard:
    """Event files in a folder. What they hold past `images` is hidden, as it is to come again."""

    def __init__(self, folder: Path, images: int = 0) -> None:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard.writer import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=images + 1)

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """A scalar each; what is no number is left out."""
        for name, number in scalars(numbers).items():
            self.board.add_scalar(name, number, images)

    def picture(self, images: int, name: str, picture: Image.Image) -> None:
        """Shown under its name, with a slider over the image counts."""
        self.board.add_image(name, np.asarray(picture.convert("RGB")), images, dataformats="HWC")

    def close(self) -> None:
        self.board.close()


class WandB:
    """A run of Weights & Biases whose steps are images. Where it goes to is for `wandb login` or WANDB_MODE to say.

    Raises ConfigError where the package is not there, or wandb refuses.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.wandb = package("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        try:
            self.run = self.wandb.init(
                project=project, name=folder.name, id=_kept_name(folder, "wandb"), resume="allow", dir=str(folder),
                config=dict(config),
            )  # fmt: skip
        except self.wandb.Error as error:
            raise ConfigError(f"wandb: {_first_line(error)}; WANDB_MODE=offline needs no server") from error
        self.first: int = self.run.step  # that after the last one it has, where it goes on with a run

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        if images >= self.first:
            self.run.log(scalars(numbers), step=images)

    def picture(self, images: int, name: str, picture: Image.Image) -> None:
        if images >= self.first:
            self.run.log({name: self.wandb.Image(picture)}, step=images)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio whose steps are images; on this machine, unless TRACKIO_SPACE_ID names a space. `told` is the
    image count up to which it was told of the run before.

    Raises ConfigError where the package is not there, or trackio refuses.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], told: int = 0) -> None:
        self.trackio, self.told = package("trackio"), told
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{folder.name}-{_kept_name(folder, 'trackio')}"
        try:
            with _said_on_stderr():
                self.run = self.trackio.init(project=project, name=name, resume="allow", config=dict(config))
        except (ValueError, OSError) as error:
            raise ConfigError(f"trackio: {_first_line(error)}") from error

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        if images >= self.told:  # its own word for images is step
            self.run.log({f"{n}s" if n == "step" else n: v for n, v in scalars(numbers).items()}, step=images)

    def picture(self, images: int, name: str, picture: Image.Image) -> None:
        if images >= self.told:
            self.run.log({name: self.trackio.Image(picture)}, step=images)

    def close(self) -> None:
        with _said_on_stderr():
            self.trackio.finish()


def open_writers(
    log_to: Sequence[str], folder: Path, *, config: Mapping[str, Any], images: int = 0, watched: int | None = None
) -> list[Writer]:
    """`log.jsonl` in a run's folder, and what else `log_to` names, for a run that begins or goes on at `images`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(folder / "log.jsonl", images, watched)
    made: list[Writer] = [lines]
    if "tensorboard" in log_to:
        made.append(TensorBoard(folder / "tensorboard", images))
    if "wandb" in log_to:
        made.append(WandB(folder, config))
    if "trackio" in log_to:
        made.append(Trackio(folder, config, lines.told))
    return made


def require_writers(log_to: Sequence[str]) -> None:
    """ConfigError where a package is not there that `log_to` needs: said before anything else is begun."""
    for name in log_to:
        if name != "tensorboard":
            package(name)


def package(name: str) -> Any:
    """The module of wandb or trackio. ConfigError where it is not installed.

    A folder of that name in the working directory, which wandb makes, can be imported as well, but is empty.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        module = None
    if not hasattr(module, "init"):
        raise ConfigError(f'--log-to {name} needs the extra `{name}`: pip install ".[{name}]" in the clone of mar')
    return module


def scalars(numbers: Mapping[str, Any]) -> dict[str, float]:
    """What is a number."""
    return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def _kept_name(folder: Path, tracker: str) -> str:
    """What this run is called there, for ever: drawn once and kept in the run's folder."""
    path = folder / NAMES_FILE
    names: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if tracker not in names:
        names[tracker] = secrets.token_hex(4)
        write_text(path, json.dumps(names) + "\n")
    return names[tracker]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """trackio prints what it does, where `mar` prints results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


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
    if distributed.rank() != 0:
        return Log()
    config, progress = run.config, run.progress
    writers = open_writers(
        config.log_to, run.folder, config=to_dict(config), images=progress.images, watched=progress.watched
    )
    return RunLog(run.folder, config.images, progress.images, writers)
