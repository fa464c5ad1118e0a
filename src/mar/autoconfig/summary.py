"""Looking at pictures before a recipe is chosen for them, and remembering what was seen: a run that goes on is the same
run, also where its folder of pictures has grown meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mar.autoconfig.sizes import DatasetSummary, LatentShape
from mar.checkpoint.files import write_text
from mar.config import ConfigError, from_dict, to_dict
from mar.data.images import Source, UnreadableImage, convert_channels
from mar.data.latent_cache import LatentSource
from mar.data.splits import stratified_indices
from mar.tokenizer import PixelTokenizer
from mar.tokenizer.base import fingerprint

Seen = TypeVar("Seen")

LOOKED_AT = 64
"""So many pictures tell what they all are like."""
FEWEST = 16
"""Fewer pictures than that are no data to learn from."""
SURVEY_FILE = "pictures.json"


def summarize_dataset(source: Source, name: str) -> DatasetSummary:
    """What the pictures of `source`, called `name`, are like, by a few of them, evenly over the source.

    ConfigError for fewer than 16 pictures, ValueError where none of those looked at can be read.
    """
    if len(source) < FEWEST:
        raise ConfigError(f"{name} has {len(source)} pictures: expected at least {FEWEST}, and hundreds for good ones")

    def seen(number: int) -> tuple[int, np.ndarray]:
        image = source[number].image
        every = max(min(image.size) // 128, 1)  # of a large picture a part of the rows and columns tells enough
        return min(image.size), np.asarray(convert_channels(image, 3))[::every, ::every]

    sides, pixels = zip(*_read_sample(len(source), name, seen), strict=True)
    channels = 1 if all((values == values[..., :1]).all() for values in pixels) else 3
    max_abs_z = _max_abs_z([values / 127.5 - 1 for values in pixels])
    return DatasetSummary(len(source), int(np.median(sides)), channels, tuple(source.classes), max_abs_z)


def _read_sample(count: int, name: str, seen: Callable[[int], Seen]) -> list[Seen]:
    """What is `seen` of a few of `count` pictures, evenly over them. ValueError where none of them can be read."""
    found = []
    numbers = stratified_indices(count, LOOKED_AT).tolist()
    for number in numbers:
        with suppress(UnreadableImage):
            found.append(seen(number))
    if not found:
        raise ValueError(f"data: none of {len(numbers)} pictures of {name} that were looked at can be read")
    return found


def _max_abs_z(pixels: list[np.ndarray]) -> float:
    """How many standard deviations of all pixels, in [-1, 1], black or white is from their mean, each picture weighing
    the same."""
    mean = float(np.mean([each.mean() for each in pixels]))
    square = float(np.mean([np.square(each).mean() for each in pixels]))
    return (1 + abs(mean)) / max(square - mean**2, 1e-4) ** 0.5


def summarize_cache(source: LatentSource) -> tuple[DatasetSummary, LatentShape | None]:
    """What a latent cache says of its pictures, and its tokenizer's cells: none where that is pixels."""
    about = source.manifest
    channels, height, _ = about.shape
    pictures = DatasetSummary(about.pictures, min(about.size), 3, about.classes)
    if channels in (1, 3) and about.fingerprint == fingerprint(PixelTokenizer(channels)):
        pixels = _read_sample(
            len(source), str(source.folder), lambda number: source.read(number, flip=False)[0].numpy()
        )
        return replace(pictures, image_channels=channels, max_abs_z=_max_abs_z(pixels)), None
    # an autoencoder has variances, too
    return pictures, LatentShape(about.size[0] // height, channels, components=about.parts == 1)


def load_summary(folder: Path, source: Source, name: str) -> tuple[DatasetSummary, str | None]:
    """What the pictures of the run in `folder` were like when it began, or are like where it has yet to begin; and a
    line on what has changed since.

    ConfigError where their classes are others now.
    """
    path = folder / SURVEY_FILE
    if not path.is_file():
        return summarize_dataset(source, name), None
    try:
        then = from_dict(DatasetSummary, json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, TypeError, ValueError) as error:  # what JSON, or a record, is not made of
        raise ConfigError(f"{path} can't be understood ({error}); take another --out") from error
    if then.classes != tuple(source.classes):
        raise ConfigError(
            f"{name} has {_class_list(source.classes)} now, but {_class_list(then.classes)} when {folder} began; put "
            f"the folders back to go on, or take another --out for a new run"
        )
    changed = len(source) != then.count
    return then, f"{name} has {len(source):,} pictures now, {then.count:,} when the run began" if changed else None


def save_summary(folder: Path, pictures: DatasetSummary) -> None:
    """Keeps what a run's choices follow from in its folder, the first time."""
    path = folder / SURVEY_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(to_dict(pictures), indent=1) + "\n")


def _class_list(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"the classes {shown}" if names else "no classes"
