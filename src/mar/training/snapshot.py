"""Looking at a run now and then: its weights, whole on every process, for whoever draws or judges them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mar import runtime
from mar.pictures import grid
from mar.pipeline import Pipeline
from mar.sampling.generate import BrokenLatents
from mar.training.log import Log
from mar.training.loop import Hook, Run
from mar.training.run import file_of, pipeline

CLASSES, ROWS, PLAIN = 10, 4, 16
"""A grid has so many classes, at most, and pictures of each; so many pictures of a model without classes."""


@dataclass(frozen=True)
class Snapshot:
    """A run as it stands after so many images. All processes get it, and have to do the same with it."""

    images: int
    step: int
    folder: Path
    """The run's."""
    weights: tuple[str, ...]
    """What there is to draw with: ema, raw, and averages of other decays, as ema-0.9999."""
    pipeline: Callable[[str], Pipeline]
    """`pipeline("ema")`, `pipeline("raw")`: ready to draw, with the whole weights on every process, also where they
    are shared out; a copy, made when it is asked for, which all processes have to do."""


OnSnapshot = Callable[[Snapshot], Mapping[str, float]]
"""Looks at a run on all of its processes, each its share of the work, and gives all the same numbers for the log."""


def take(run: Run) -> Snapshot:
    """The run as it stands."""
    progress = run.progress
    return Snapshot(progress.images, progress.step, run.folder, tuple(run.weights), functools.partial(pipeline, run))


def on_snapshot(run: Run, log: Log, every: int, look: OnSnapshot) -> None:
    """Has `look` called with a snapshot of the run every `every` images (0: never), and its numbers written to the log.

    A look that a killed session did not finish is made again when the run goes on.
    """

    def call(run: Run) -> None:
        if found := look(take(run)):
            log.write(run.progress.images, **found)

    run.hooks.append(Hook(every, call))


def export_and_draw(snapshot: Snapshot, log: Log) -> dict[str, float]:
    """Exports EMA and raw weights and draws a grid with each, samples/IMAGES.png and samples/IMAGES-raw.png: four
    pictures of every class (at most ten), of which each process draws its share. A broken grid is reported, not fatal.
    """
    for weights in snapshot.weights:
        drawer = snapshot.pipeline(weights)
        if runtime.rank() == 0:
            drawer.save(snapshot.folder / file_of(weights))
        classes = min(drawer.model.config.classes, CLASSES)
        labels: list[int | None] = [label for _ in range(ROWS) for label in range(classes)] or [None] * PLAIN
        shares = runtime.gather(_draw(drawer, labels, runtime.rank(), runtime.world_size()))
        if runtime.rank() != 0:
            continue
        if broken := [share for share in shares if isinstance(share, str)]:
            log.note(f"no samples of the {weights} weights yet: {broken[0]}")
            continue
        name = "samples" if weights == "ema" else f"samples-{weights}"
        path = snapshot.folder / "samples" / f"{snapshot.images:012d}{name.removeprefix('samples')}.png"
        path.parent.mkdir(exist_ok=True)
        sheet = grid([picture for share in shares for picture in share], classes or ROWS)
        sheet.save(path)
        log.picture(snapshot.images, name, sheet)
        log.note(f"drew {path}")
    return {}


def _draw(drawer: Pipeline, labels: list[int | None], rank: int, world: int) -> list[Image.Image] | str:
    """This process's share of the pictures, which may be none; or why they are none."""
    mine = range(len(labels) * rank // world, len(labels) * (rank + 1) // world)
    try:
        return drawer.sample([labels[i] for i in mine], list(mine))
    except BrokenLatents as error:
        return str(error)
