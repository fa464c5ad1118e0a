"""How far drawing has come, on stderr: a bar that vanishes, or pictures per second and the time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PAUSE = 10.0
"""Seconds between lines where stderr is no terminal."""

Advance = Callable[[float], None]
"""Takes how many pictures are done, in fractions of one."""


@contextlib.contextmanager
def bar(wanted: bool, pictures: int) -> Iterator[Advance]:
    """A bar over `pictures`, gone at the end; nothing unless `wanted`."""
    if not wanted:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("drawing", total=pictures)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def meter(wanted: bool, pictures: int, before: int = 0) -> Iterator[Advance]:
    """A long run over `pictures`, of which `before` were there: a live bar in a terminal, else a line now and then.

    What it yields takes how many are done by now, those before included.
    """
    begun = time.monotonic()

    def text(done: float) -> str:
        return progress_text(done, pictures, before, time.monotonic() - begun)

    if not wanted:
        yield lambda done: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
            task = progress.add_task(text(before), total=pictures, completed=before)
            yield lambda done: progress.update(task, completed=done, description=text(done))
    else:
        yield _lines(text, begun)


def _lines(text: Callable[[float], str], begun: float) -> Advance:
    last = begun

    def advance(done: float) -> None:
        nonlocal last
        if time.monotonic() - last >= PAUSE:
            last = time.monotonic()
            print(text(done), file=sys.stderr, flush=True)

    return advance


def progress_text(done: float, pictures: int, before: int, seconds: float) -> str:
    """`640 of 50,000 pictures, 12.3 a second, 1:06:53 left`; the rate is that of this start alone."""
    drawn = done - before
    if drawn <= 0 or seconds <= 0:
        return f"{int(done):,} of {pictures:,} pictures"
    rate = drawn / seconds
    pace = f"{rate:.1f} a second" if rate >= 1 else f"{1 / rate:.1f} s a picture"
    return f"{int(done):,} of {pictures:,} pictures, {pace}, {clock((pictures - done) / rate)} left"


def clock(seconds: float) -> str:
    """`1:06:53`; days are hours."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
