"""Log a run: metrics, sample grids, messages and progress.

`log.jsonl` in the run's folder has one JSON object a line. Each has `images`, the images seen so far.

Every `log_every` steps, and at the end:
- `step`, `lr`, `gradient_norm` before clipping
- `loss`: mean since the last such line; for a tokenizer, also the terms of its loss
- `images_per_second`: since the last such line, without callbacks
- `skipped_steps`: steps without a finite gradient, in the whole run; `skipped_share`: since the last such line
- `seconds`: time in steps, over all sessions

At other times:
- `tokenizer_psnr`: before the first step
- `account`: at each start, lines of the data: what is taken and what is left out
- `data`: when resumed, a message about changed data
- `val_loss`: every `validate_every` images, the loss of held-out images; `val_loss_00` to `val_loss_09`: by tenths of
  the timesteps, from least to most noise
- `ema_distance`, `raw_distance` and other metrics: every `--eval-every` images; for a tokenizer, `psnr`

Numbers that are not finite are null. The services in `log_to` get the same, and the images of `samples/`. When a run
resumes, lines after its saved state are dropped from `log.jsonl`, and not sent to the services again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mar import distributed
from mar.checkpoint import checksums
from mar.checkpoint.files import CheckpointError, check_regular, write_atomically, write_text
from mar.config import ConfigError, to_dict
from mar.data.accounts import is_shown
from mar.data.splits import account_of
from mar.terminal import print_err, printable, unescaped
from mar.training.page import Page
from mar.training.page_html import Stage

PROJECT = "mar"
"""Project of runs in Weights & Biases and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""
TRACKERS_FILE = "trackers.json"
"""File in a run's folder: its ids in Weights & Biases and trackio."""


# ---- the log


def open_log(run: Any, page: Page | None = None) -> Log:
    """Open the log of a `TrainingRun`, a no-op on ranks > 0.

    ConfigError if a service in `log_to` is not installed, or refuses.

    Args:
        run: with its progress.
        page: shows the run among others of a command; by default the run has a page of its own.
    """
    if distributed.rank() != 0:
        return Log()
    config, progress = run.config, run.progress
    writers = open_writers(
        config.log_to, run.folder, config=to_dict(config), images=progress.images,
        callbacks_done=progress.callbacks_done,
    )  # fmt: skip
    own = page is None
    page = page or Page(run.folder, [Stage(run.stage, run.folder)], run.next_commands())
    log = RunLog(run.folder, config.images, progress.images, writers, page)
    page.begin(
        run.stage, progress.images, config.images, classes=run.grid_classes, sample_every=config.sample_every
    )  # fmt: skip
    if own:
        log.note(f"watch it: {page.uri}")
    return log


def log_accounts(log: Log, run: Any) -> None:
    """Log the accounts of a `TrainingRun`'s data; print those that a terminal would have shown.

    A finished run takes no step, and its log stays as it is.
    """
    accounts = {account.line: account for account in map(account_of, (run.source, run.held_out)) if account is not None}
    for line, account in accounts.items():
        if not is_shown(account.level):  # a job's output has it too
            log.note(line)
    if accounts and run.progress.images < run.config.images:
        log.write(run.progress.images, account=list(accounts))


def save_sheet(path: Path, sheet: Image.Image, log: Log) -> bool:
    """Write a sheet of images. Returns False, with a note, if the disk refuses: no run ends for that.

    Args:
        path: the PNG.
        sheet: the images.
        log: gets the note.
    """
    try:
        write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"), temporary_in=path.parent.parent)
    except CheckpointError as error:
        log.note(str(error))
        return False
    return True


class Log:
    """No-op logger for ranks > 0."""

    def __init__(self) -> None:
        self.finished = False
        """The run has reached its end."""
        self.skipped_images: set[str] = set()
        """Names of images that could not be read."""

    def write(self, images: int, **numbers: Any) -> None:
        """Log numbers and texts after `images` images."""

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Log an image after `images` images."""

    def advance(self, images: int, loss: float) -> None:
        """Move the progress bar."""

    def note(self, text: str) -> None:
        """Print a message for people."""

    def close(self) -> None:
        """End the progress bar, and flush the writers."""


class RunLog(Log):
    """Logger of a run, with a progress bar on terminals.

    Args:
        folder: the run's.
        total_images: length of the run.
        images: images seen so far.
        writers: where numbers go; by default to the run's folder only.
        page: the page that shows the run.
    """

    def __init__(
        self,
        folder: Path,
        total_images: int,
        images: int,
        writers: Sequence[Writer] | None = None,
        page: Page | None = None,
    ) -> None:
        super().__init__()
        if writers is None:
            writers = open_writers(["tensorboard"], folder, config={}, images=images)
        self.writers: list[Writer] = [*writers, *([page] if page else [])]
        self.page = page
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=unescaped(sys.stderr)),
            disable=not sys.stderr.isatty(),
        )
        self.task: TaskID = self.progress.add_task("training", total=total_images, completed=images)
        self.total_images, self.first_image, self.start = total_images, images, time.monotonic()
        self.progress.start()
        if page is not None:
            page.note = self.note

    def write(self, images: int, **numbers: Any) -> None:
        """Send numbers to every writer; print the loss without a terminal."""
        self._send(lambda writer: writer.write(images, numbers))
        if not sys.stderr.isatty() and "loss" in numbers:
            print_err(self._progress_line(images, numbers))

    def _progress_line(self, images: int, numbers: dict[str, Any]) -> str:
        seconds = time.monotonic() - self.start
        left = seconds * (self.total_images - images) / max(images - self.first_image, 1)
        return (
            f"{images:,}/{self.total_images:,} images, loss {numbers['loss']:.4f}, "
            f"{numbers['images_per_second']:.0f} images/s, {left / 60:.0f} min left"
        )

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Send an image to every writer."""
        self._send(lambda writer: writer.write_image(images, name, image))

    def _send(self, call: Callable[[Writer], None]) -> None:
        """Call every writer. One that fails is noted, and left out from then on: only the log's file is needed."""
        for writer in list(self.writers):
            try:
                call(writer)
            except Exception as error:
                if isinstance(writer, JsonLines):
                    raise
                self.writers.remove(writer)
                self.note(f"{_place(writer)} is not written any more: {_first_line(error)}")

    def advance(self, images: int, loss: float) -> None:
        """Move the progress bar."""
        self.progress.update(self.task, completed=images, description=f"loss {loss:.4f}")
        if self.page is not None:
            self.page.advance(images)

    def note(self, text: str) -> None:
        """Print a message for people, verbatim: brackets in paths are no markup."""
        self.progress.console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """End the progress bar, and flush the writers."""
        self.progress.stop()
        if self.page is not None:
            self.page.finished = self.finished
        self._send(lambda writer: writer.close())


# ---- writers


@runtime_checkable
class Writer(Protocol):
    """A file or service that gets a log."""

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """Write numbers and texts after `images` images."""
        ...

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Write an image after `images` images."""
        ...

    def close(self) -> None:
        """Write what is buffered."""
        ...


def open_writers(
    log_to: Sequence[str],
    folder: Path,
    *,
    config: Mapping[str, Any],
    images: int = 0,
    callbacks_done: int | None = None,
) -> list[Writer]:
    """Open `log.jsonl` and the services of a run that starts or resumes.

    Args:
        log_to: names of services.
        folder: the run's.
        config: shown by the services.
        images: images of the state that the run resumes from.
        callbacks_done: images up to which all due callbacks have finished; by default `images`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(folder / "log.jsonl", images, callbacks_done)
    writers: list[Writer] = [lines]
    if "tensorboard" in log_to:
        try:
            writers.append(TensorBoard(folder / "tensorboard", images))
        except OSError as error:
            print_err(f"{folder / 'tensorboard'} is not written: {_first_line(error)}")
    if "wandb" in log_to:
        writers.append(WandB(folder, config))
    if "trackio" in log_to:
        writers.append(Trackio(folder, config, lines.last_logged))
    return writers


def require_writers(log_to: Sequence[str]) -> None:
    """Raise ConfigError if the package of a service is not installed."""
    for name in log_to:
        if name != "tensorboard":
            import_tracker(name)


class JsonLines:
    """`log.jsonl`: one JSON object a line, without images.

    When a run resumes, lines that it will write again are dropped: those after `images`, and those of callbacks after
    `callbacks_done`. `last_logged` is the image count of the last line before that.
    """

    def __init__(self, path: Path, images: int = 0, callbacks_done: int | None = None) -> None:
        self.path, self.last_logged = path, 0
        check_regular(path)
        if path.exists():
            self._drop_repeated(images, images if callbacks_done is None else callbacks_done)

    def _drop_repeated(self, images: int, callbacks_done: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = []
        for line in lines:
            if not line.endswith("\n"):  # the process was killed while writing it
                continue
            values = json.loads(line)
            count = values.get("images", 0)
            self.last_logged = max(self.last_logged, count)
            if images and (count <= callbacks_done or (count <= images and "step" in values)):
                kept.append(line)
        if len(kept) < len(lines):
            write_text(self.path, "".join(kept))

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """Write a line; numbers that are not finite become null."""
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in numbers.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"images": images, **finite}, allow_nan=False) + "\n")
        except OSError as error:
            why = error.strerror or str(error)
            raise CheckpointError(f"can't write {self.path}: {why}; make room, and the same command goes on") from error

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Do nothing: images are files in `samples/`."""

    def close(self) -> None:
        """Do nothing: every line is flushed when written."""


class TensorBoard:
    """Event files in a folder; events after `images` are hidden."""

    def __init__(self, folder: Path, images: int = 0) -> None:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard.writer import SummaryWriter

        self.place = folder
        _silence_tensorboard()
        self.board = SummaryWriter(str(folder), purge_step=images + 1)

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """Add a scalar for each number."""
        for name, number in scalars(numbers).items():
            self.board.add_scalar(name, number, images)

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Add an image; those of one name share a slider."""
        self.board.add_image(name, np.asarray(image.convert("RGB")), images, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered, and close the files."""
        self.board.close()


class WandB:
    """A run of Weights & Biases; its steps are images.

    `wandb login` and WANDB_MODE say where it goes. Raises ConfigError if the package is not installed, or refuses.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.wandb = import_tracker("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        try:
            self.run = self.wandb.init(
                project=project, name=folder.name, id=_tracker_id(folder, "wandb"), resume="allow", dir=str(folder),
                config=dict(config),
            )  # fmt: skip
        except self.wandb.Error as error:
            raise ConfigError(f"wandb: {_first_line(error)}; WANDB_MODE=offline needs no server") from error
        self.first_image: int = self.run.step  # of a resumed run: the one after the last it has

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """Send the numbers, unless an earlier session did."""
        if images >= self.first_image:
            self.run.log(scalars(numbers), step=images)

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Send an image, unless an earlier session did."""
        if images >= self.first_image:
            self.run.log({name: self.wandb.Image(image)}, step=images)

    def close(self) -> None:
        """Send what is buffered, and end this session of the run."""
        self.run.finish()


class Trackio:
    """A run of trackio; its steps are images.

    It stays on this machine unless TRACKIO_SPACE_ID names a space. `first_image` is the last image count that it was
    sent before. Raises ConfigError if the package is not installed, or refuses.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], first_image: int = 0) -> None:
        self.trackio, self.first_image = import_tracker("trackio"), first_image
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{folder.name}-{_tracker_id(folder, 'trackio')}"
        try:
            with _stdout_to_stderr():
                self.run = self.trackio.init(project=project, name=name, resume="allow", config=dict(config))
        except (ValueError, OSError) as error:
            raise ConfigError(f"trackio: {_first_line(error)}") from error

    def write(self, images: int, numbers: Mapping[str, Any]) -> None:
        """Send the numbers, unless an earlier session did."""
        if images >= self.first_image:  # `step` is trackio's own name for images
            self.run.log({f"{n}s" if n == "step" else n: v for n, v in scalars(numbers).items()}, step=images)

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        """Send an image, unless an earlier session did."""
        if images >= self.first_image:
            self.run.log({name: self.trackio.Image(image)}, step=images)

    def close(self) -> None:
        """Send what is buffered, and end this session of the run."""
        with _stdout_to_stderr():
            self.trackio.finish()


def _place(writer: Writer) -> str:
    """Return where a writer writes: its folder, or the name of the service."""
    return str(getattr(writer, "place", type(writer).__name__.lower()))


@functools.cache
def _silence_tensorboard() -> None:
    """Print no traceback of tensorboard's thread: its next call raises the same error."""
    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__module__.startswith("tensorboard.") and issubclass(args.exc_type, OSError)):
            usual(args)

    threading.excepthook = hook


def import_tracker(name: str) -> Any:
    """Import wandb or trackio. ConfigError if it is not installed.

    A folder of that name in the working directory, which wandb makes, can be imported too, but is empty.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        module = None
    if not hasattr(module, "init"):
        raise ConfigError(f'--log-to {name} needs the extra `{name}`: pip install ".[{name}]" in the clone of mar')
    return module


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Select the numbers."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _tracker_id(folder: Path, tracker: str) -> str:
    """Return the run's id in a service, drawn once and kept in the run's folder."""
    path = folder / TRACKERS_FILE
    try:
        ids: dict[str, str] = dict(checksums.read_json(path)) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} can't be read ({error}); put it back, or remove it for another id") from error
    if tracker not in ids:
        ids[tracker] = secrets.token_hex(4)
        try:
            checksums.write_json(path, ids)
        except CheckpointError as error:
            print_err(f"{error}; a later session will be another run of {tracker}")
    return ids[tracker]


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect what trackio prints, since stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
