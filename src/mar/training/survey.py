"""Looking at pictures before a recipe is chosen for them, and remembering what was seen: a run that goes on is the same
run, also where its folder of pictures has grown meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mar.checkpoint.files import write_text
from mar.config import ConfigError, from_dict, to_dict
from mar.data.examples import Source, UnreadableImage
from mar.data.heldout import spread
from mar.data.latents import LatentSource
from mar.data.transforms import to_colours
from mar.sizes import Cells, Pictures

LOOKED_AT = 64
"""So many pictures tell what they all are like."""
FEWEST = 16
"""Fewer pictures than that are no data to learn from."""
SURVEY_FILE = "pictures.json"


def look(source: Source, name: str) -> Pictures:
    """What the pictures of `source`, called `name`, are like, by a few of them, evenly over the source.

    ConfigError for fewer than 16 pictures, ValueError where none of those looked at can be read.
    """
    if len(source) < FEWEST:
        raise ConfigError(f"{name} has {len(source)} pictures: expected at least {FEWEST}, and hundreds for good ones")
    few = spread(source, LOOKED_AT)
    sides: list[int] = []
    pixels: list[np.ndarray] = []
    for number in range(len(few)):
        try:
            image = few[number].image
        except UnreadableImage:
            continue
        sides.append(min(image.size))
        every = max(min(image.size) // 128, 1)  # of a large picture a part of the rows and columns tells enough
        pixels.append(np.asarray(to_colours(image, 3))[::every, ::every])
    if not pixels:
        raise ValueError(f"data: none of {len(few)} pictures of {name} that were looked at can be read")
    grey = all((values == values[..., :1]).all() for values in pixels)
    return Pictures(len(source), int(np.median(sides)), 1 if grey else 3, tuple(source.classes), _reach(pixels))


def _reach(pixels: list[np.ndarray]) -> float:
    """How many standard deviations of all pixels black or white is from their mean, each picture weighing the same."""
    values = [each / 127.5 - 1 for each in pixels]
    mean = float(np.mean([each.mean() for each in values]))
    square = float(np.mean([np.square(each).mean() for each in values]))
    return (1 + abs(mean)) / max(square - mean**2, 1e-4) ** 0.5


def cached(source: LatentSource) -> tuple[Pictures, Cells | None]:
    """What a latent cache says of its pictures, and its tokenizer's cells: none where that is pixels."""
    about = source.about
    channels, height, _ = about.shape
    stride = about.size[0] // height
    pictures = Pictures(about.pictures, min(about.size), channels if stride == 1 else 3, about.classes)
    return pictures, None if stride == 1 else Cells(stride, channels)


def remembered(folder: Path, source: Source, name: str) -> tuple[Pictures, str | None]:
    """What the pictures of the run in `folder` were like when it began, or are like where it has yet to begin; and a
    line on what has changed since.

    ConfigError where their classes are others now.
    """
    path = folder / SURVEY_FILE
    if not path.is_file():
        return look(source, name), None
    try:
        then = from_dict(Pictures, json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} can't be understood ({error}); take another --out") from error
    if then.classes != tuple(source.classes):
        raise ConfigError(
            f"{name} has {_classes(source.classes)} now, but {_classes(then.classes)} when {folder} began; put the "
            f"folders back to go on, or take another --out for a new run"
        )
    changed = len(source) != then.count
    return then, f"{name} has {len(source):,} pictures now, {then.count:,} when the run began" if changed else None


def remember(folder: Path, pictures: Pictures) -> None:
    """Keeps what a run's choices follow from in its folder, the first time."""
    path = folder / SURVEY_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(to_dict(pictures), indent=1) + "\n")


def _classes(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"the classes {shown}" if names else "no classes"
