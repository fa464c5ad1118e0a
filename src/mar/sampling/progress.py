"""Progress on stderr: a bar that vanishes, or images per second and the time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from mar import distributed
from mar.terminal import print_err, unescaped

LINE_INTERVAL_S = 10.0
"""Seconds between lines if stderr is no terminal."""

Advance = Callable[[float], None]
"""Takes the number of images done so far, in fractions of one."""


@contextlib.contextmanager
def bar(visible: bool, total: int) -> Iterator[Advance]:
    """Shows a bar over `total` images, gone at the end; nothing unless `visible`."""
    if not visible:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=unescaped(sys.stderr)), transient=True) as progress:
        task = progress.add_task("drawing", total=total)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def meter(visible: bool, total: int, before: int = 0, unit: str = "picture") -> Iterator[Advance]:
    """Shows a long run over `total` images: a live bar in a terminal, else a line now and then.

    Args:
        visible: false shows nothing.
        total: images of all runs.
        before: images of earlier runs.
        unit: what is counted, if not pictures.

    Yields:
        A function of the number done by now, `before` included.
    """
    started = time.monotonic()

    def text(done: float) -> str:
        return progress_text(done, total, before, time.monotonic() - started, unit)

    if not visible:
        yield lambda done: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=unescaped(sys.stderr))
        with Progress(BarColumn(), TextColumn("{task.description}"), console=console) as progress:
            task = progress.add_task(text(before), total=total, completed=before)
            yield lambda done: progress.update(task, completed=done, description=text(done))
    else:
        yield _print_lines(text, started)


@contextlib.contextmanager
def rank_meter(share: int, total: int, before: int = 0, check: Callable[[], None] | None = None) -> Iterator[Advance]:
    """Shows the progress of all ranks on rank 0; others are assumed to be as far.

    Args:
        share: images of this rank's share.
        total: images of all ranks, and of earlier runs.
        before: images of earlier runs.
        check: is called at every advance; may raise, for instance to stop.

    Yields:
        A function of the number of this rank's images done by now, in fractions of one.
    """
    with meter(distributed.rank() == 0, total, before) as show:

        def advance(done: float) -> None:
            if check is not None:
                check()
            show(before + done * (total - before) / max(share, 1))

        yield advance


def _print_lines(text: Callable[[float], str], started: float) -> Advance:
    last = started

    def advance(done: float) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_INTERVAL_S:
            last = time.monotonic()
            print_err(text(done))

    return advance


def progress_text(done: float, total: int, before: int, seconds: float, unit: str = "picture") -> str:
    """Formats `640 of 50,000 pictures, 12.3 a second, 1:06:53 left`.

    Args:
        done: images done by now, those of earlier runs included.
        total: images of all runs.
        before: images of earlier runs.
        seconds: time of this run: the rate is its alone.
        unit: what is counted.
    """
    new = done - before
    if new <= 0 or seconds <= 0:
        return f"{int(done):,} of {total:,} {unit}s"
    rate = new / seconds
    speed = f"{rate:.1f} a second" if rate >= 1 else f"{1 / rate:.1f} s a {unit}"
    return f"{int(done):,} of {total:,} {unit}s, {speed}, {clock((total - done) / rate)} left"


def clock(seconds: float) -> str:
    """Formats `1:06:53`; days are hours."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
