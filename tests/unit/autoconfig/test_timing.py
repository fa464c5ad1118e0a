"""Lengths of trainings that fit a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mar.autoconfig.sizes import TOKENIZER_EVALUATIONS, VALIDATIONS
from mar.autoconfig.timing import (
    DRAWING_SHARE,
    MAX_GRIDS,
    MAX_TOKENIZER_EPOCHS,
    MIN_GRIDS,
    MIN_STEPS,
    PLAN_FILE,
    RESERVE_SECONDS,
    TOKENIZER_SHARE,
    TimePlan,
    duration,
    load_time_plan,
    model_length,
    save_time_plan,
    seconds_of,
    tokenizer_images,
)
from mar.config import ConfigError

SPEEDS = st.floats(0.1, 1e4)
EVERY = st.none() | st.integers(0, 10**5)


def test_seconds_of_minutes_or_hours() -> None:
    assert (seconds_of(30, None), seconds_of(None, 0.5), seconds_of(None, None)) == (1800, 1800, None)


@pytest.mark.parametrize(
    ("minutes", "hours", "words"),
    [
        (1.0, 2.0, "got --minutes 1 and --hours 2, expected one of them"),
        (0.0, None, "minutes is 0, but it must be positive"),
        (None, -1.0, "hours is -1, but it must be positive"),
        (float("inf"), None, "must be positive and finite"),
        (float("nan"), None, "must be positive and finite"),
    ],
)
def test_seconds_of_no_time_is_refused(minutes: float | None, hours: float | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        seconds_of(minutes, hours)


@given(seconds=st.floats(1, 1e6), speed=SPEEDS, batch=st.integers(1, 256), count=st.integers(16, 10**6))
def test_tokenizer_images_take_their_share_of_the_time(seconds: float, speed: float, batch: int, count: int) -> None:
    images = tokenizer_images(seconds, speed, batch, count)
    assert images % batch == 0
    assert images >= MIN_STEPS * batch
    most = max(MIN_STEPS * batch, min(TOKENIZER_SHARE * seconds * speed, MAX_TOKENIZER_EPOCHS * count))
    assert most - batch < images <= most


@given(
    seconds=st.floats(0, 1e6), speed=SPEEDS, grid_seconds=st.floats(0, 1e3), batch=st.integers(1, 256),
    sample_every=EVERY, held_out=st.integers(0, 10**4), validate_every=EVERY,
)  # fmt: skip
def test_model_length_fills_the_time(
    seconds: float, speed: float, grid_seconds: float, batch: int, sample_every: int | None, held_out: int,
    validate_every: int | None,
) -> None:  # fmt: skip
    length = model_length(
        seconds, speed, grid_seconds, batch,
        sample_every=sample_every, held_out=held_out, validate_every=validate_every,
    )  # fmt: skip
    images, grids = length.images, length.grids
    assert images % batch == 0
    assert (grids is None) == (sample_every is not None)
    if grids is not None:
        assert MIN_GRIDS <= grids <= MAX_GRIDS
        assert grids == MIN_GRIDS or grids * grid_seconds <= DRAWING_SHARE * seconds

    def used(images: int) -> float:
        drawn = grids if grids is not None else images / sample_every if sample_every else 0
        validations = VALIDATIONS if validate_every is None else images / validate_every if validate_every else 0
        return images / speed + drawn * grid_seconds + validations * held_out / speed / 3 + RESERVE_SECONDS

    if images > MIN_STEPS * batch:
        assert used(images) <= seconds * (1 + 1e-9)
        assert used(images + batch) > seconds * (1 - 1e-9)


@given(
    seconds=st.floats(1, 1e6), speed=SPEEDS, batch=st.integers(1, 256), count=st.integers(16, 10**6),
    held_out=st.integers(0, 1000),
)  # fmt: skip
def test_tokenizer_share_has_its_evaluations(
    seconds: float, speed: float, batch: int, count: int, held_out: int
) -> None:
    """But they leave half of it to the training."""
    images = tokenizer_images(seconds, speed, batch, count, held_out)
    whole = tokenizer_images(seconds, speed, batch, count)
    assert whole >= images >= whole / 2 - batch
    evaluations = (TOKENIZER_EVALUATIONS + 1) * held_out / 3
    if MIN_STEPS * batch < images and evaluations < TOKENIZER_SHARE * seconds * speed / 2:
        assert images + evaluations <= TOKENIZER_SHARE * seconds * speed * (1 + 1e-9)


def test_time_plan_is_kept_with_the_run(tmp_path: Path) -> None:
    assert load_time_plan(tmp_path / "run") is None
    plan = TimePlan(1800, 4000, 96_000, 8)
    save_time_plan(plan, tmp_path / "run")
    assert load_time_plan(tmp_path / "run") == plan
    for damaged in ("", "[]", '{"seconds": "long"}'):
        (tmp_path / "run" / PLAN_FILE).write_text(damaged)
        with pytest.raises(ConfigError, match=r"time\.json can't be understood"):
            load_time_plan(tmp_path / "run")


def test_duration_is_for_people() -> None:
    assert [duration(s) for s in (0.4, 89, 90, 3569, 3600, 7500)] == [
        "0 s",
        "89 s",
        "2 min",
        "59 min",
        "1 h 0 min",
        "2 h 5 min",
    ]
