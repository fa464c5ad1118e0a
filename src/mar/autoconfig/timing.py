"""Fit the trainings of `mar train folder` into the time that there is.

The tokenizer's length is chosen first, from its speed on this machine and its share of the time. The model's is chosen
when it begins, from its own speed and the time that is left. Both are kept in the run's folder: a run that is continued
has the lengths that it began with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mar import __version__
from mar.autoconfig.sizes import TOKENIZER_EVALUATIONS, VALIDATIONS
from mar.checkpoint import checksums
from mar.config import ConfigError, from_dict, to_dict

PLAN_FILE = "time.json"
"""File in a run's folder."""
TOKENIZER_SHARE = 0.2
"""Share of the time for a tokenizer of the run's own, its evaluation included."""
MAX_TOKENIZER_EPOCHS = 400
"""A tokenizer sees each image at most so often: it has learned them by then."""
DRAWING_SHARE = 0.05
"""Share of the model's time for sample grids."""
MIN_GRIDS, MAX_GRIDS = 2, 10
"""Sample grids of a model's training."""
FORWARD_COST, ENCODING_COST = 1 / 3, 1 / 6
"""Time of an image without gradients, of that to train on it: the whole forward pass; an encoder alone."""
MIN_STEPS = 10
"""A training has at least so many steps, however little time there is."""
ENOUGH_IMAGES = 20_000
"""If a model would see fewer images, a smaller one learns more in the same time (docs/quality.md)."""
FEW_IMAGES = 10_000
"""A model that sees fewer images draws colors, hardly shapes (docs/quality.md)."""
RESERVE_SECONDS = 4.0
"""Kept back for opening the run and writing the model."""


@dataclass(frozen=True)
class TimePlan:
    """Lengths of trainings, chosen for a time."""

    seconds: float
    """Time for the whole command, from its start to the finished model."""
    tokenizer_images: int | None = None
    """Length of the training of a tokenizer of the run's own, in images; None: there is none, or the user chose it."""
    model_images: int | None = None
    """Length of the model's training, in images; None: not chosen yet."""
    grids: int | None = None
    """Number of sample grids in the model's training."""
    smaller: int = 0
    """Sizes of model below that for the number of images; the time is too short for that one."""


def seconds_of(minutes: float | None, hours: float | None) -> float | None:
    """Return the seconds of `--minutes` or `--hours`; None: neither. ConfigError for both, or no positive number."""
    if minutes is not None and hours is not None:
        raise ConfigError(f"got --minutes {minutes:g} and --hours {hours:g}, expected one of them")
    for name, value in (("minutes", minutes), ("hours", hours)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value:g}, but it must be positive and finite")
    if hours is not None:
        return hours * 3600
    return None if minutes is None else minutes * 60


def tokenizer_images(seconds: float, speed: float, batch: int, count: int, held_out: int = 0) -> int:
    """Return the length of a tokenizer's training.

    Args:
        seconds: time for the whole command.
        speed: of the tokenizer's training, in images per second.
        batch: images of a step.
        count: images of the data set.
        held_out: images of an evaluation; all evaluations together get at most half of the tokenizer's time.
    """
    share = TOKENIZER_SHARE * seconds
    evaluation = FORWARD_COST * (TOKENIZER_EVALUATIONS + 1) * held_out / speed
    return _whole_steps(min((share - min(evaluation, share / 2)) * speed, MAX_TOKENIZER_EPOCHS * count), batch)


def encoding_seconds(images: int, speed: float) -> float:
    """Return the time to encode images.

    Args:
        images: their number.
        speed: of the tokenizer's training, in images per second.
    """
    return ENCODING_COST * images / speed


@dataclass(frozen=True)
class ModelLength:
    """Length of a model's training."""

    images: int
    grids: int | None
    """Number of sample grids; None: the user chose how often they are drawn."""


def model_length(
    seconds: float,
    speed: float,
    grid_seconds: float,
    batch: int,
    *,
    sample_every: int | None = None,
    held_out: int = 0,
    validate_every: int | None = None,
) -> ModelLength:
    """Return the length of a model's training that fits a time.

    Args:
        seconds: time that is left for it.
        speed: of its training, in images per second.
        grid_seconds: time to draw the grids of one snapshot.
        batch: images of a step.
        sample_every: images between sample grids, 0 for none; None: few enough grids for their share of the time.
        held_out: images of a validation.
        validate_every: images between validations, 0 for none; None: as many validations as by default.
    """
    validation = FORWARD_COST * held_out / speed
    seconds = max(seconds - RESERVE_SECONDS - (VALIDATIONS * validation if validate_every is None else 0.0), 0.0)
    seconds_per_image = 1 / speed + (validation / validate_every if validate_every else 0.0)
    if sample_every is not None:
        seconds_per_image += grid_seconds / sample_every if sample_every else 0.0
        return ModelLength(_whole_steps(seconds / seconds_per_image, batch), None)
    affordable = DRAWING_SHARE * seconds / grid_seconds if grid_seconds else math.inf
    grids = math.floor(min(max(affordable, MIN_GRIDS), MAX_GRIDS))
    return ModelLength(_whole_steps((seconds - grids * grid_seconds) / seconds_per_image, batch), grids)


def _whole_steps(images: float, batch: int) -> int:
    return max(math.floor(images / batch), MIN_STEPS) * batch


def load_time_plan(folder: Path) -> TimePlan | None:
    """Load the plan of a run; None without one. ConfigError for a damaged file."""
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        return from_dict(TimePlan, checksums.read_json(path))
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} can't be understood ({error}); if a newer mar than {__version__} planned it, upgrade; else "
            "remove it to plan anew, or take another --out"
        ) from error


def save_time_plan(plan: TimePlan, folder: Path) -> None:
    """Write the plan of a run to its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    checksums.write_json(folder / PLAN_FILE, to_dict(plan))


def duration(seconds: float) -> str:
    """Return a time for people, such as 40 s, 12 min or 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
