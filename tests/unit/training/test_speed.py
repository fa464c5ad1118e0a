"""Speeds of runs, measured before they begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import open_tiny_run, tiny_config, tiny_train_config, write_images

from mar.config.tokenizer import TokenizerTrainConfig
from mar.pipeline import Pipeline
from mar.training import speed
from mar.training.speed import (
    MIN_STEPS,
    WARM_UP_STEPS,
    images_per_second,
    model_speed,
    reading_seconds,
    tokenizer_speed,
)
from mar.training.trainer import GRID_CLASSES, GRID_ROWS

CPU = torch.device("cpu")


def no_network() -> None:
    raise AssertionError("no perceptual loss")


def test_images_per_second_counts_steps_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny_run(tiny_train_config(write_images(tmp_path / "data"), batch=4), tmp_path / "run")
    clock = [0.0]
    step = run.step

    def slow_step(batch: object) -> object:
        clock[0] += 100.0 if run.progress.step < WARM_UP_STEPS else 0.5
        return step(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "step", slow_step)
    monkeypatch.setattr(speed.time, "monotonic", lambda: clock[0])
    assert images_per_second(run, 4.9) == 4 / 0.5
    assert run.progress.step == WARM_UP_STEPS + 10
    assert images_per_second(run, 0.0) == 4 / 0.5
    assert run.progress.step == WARM_UP_STEPS + 10 + WARM_UP_STEPS + MIN_STEPS


@pytest.mark.parametrize("kind", [{"classes": 0}, {"classes": 2}, {"classes": 0, "words": 5},
                                  {"classes": 0, "text_width": 12}])  # fmt: skip
def test_model_speed_needs_no_images_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, int]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text = "any" if "text_width" in kind else ""
    config = tiny_train_config(tmp_path, model=tiny_config(channels=16, **kind), text=text, batch=4)
    asked: list[object] = []
    draw = speed.sample_share

    def share(pipeline: Pipeline, asks: list[int | str | None], *arguments: int, **options: bool) -> object:
        asked.extend(asks[:1])
        assert len(asks) == (GRID_ROWS * GRID_CLASSES if pipeline.captions is not None else len(asks))
        return draw(pipeline, asks, *arguments, **options)

    monkeypatch.setattr(speed, "sample_share", share)
    measured = model_speed(config, CPU, 0.0, draw=True)
    assert {*asked} == ({"a"} if "words" in kind or text else {0} if kind["classes"] else {None})  # as a run's grid
    assert measured.images_per_second > 0
    assert measured.grid_seconds > 0
    assert model_speed(config, CPU, 0.0).grid_seconds == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["kl", "residual"])
def test_tokenizer_speed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data, elsewhere = write_images(tmp_path / "data"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    config = TokenizerTrainConfig(str(data), image_size=8, image_channels=1, kind=kind, stride=2, width=8, batch=4)
    assert tokenizer_speed(config, CPU, 0.0, no_network) > 0
    assert not any(elsewhere.iterdir())


def test_reading_takes_time_and_leaves_out_broken_images(tmp_path: Path) -> None:
    pictures = write_images(tmp_path / "pictures")
    next(pictures.rglob("*.png")).write_bytes(b"no picture")
    assert 0 < reading_seconds(TokenizerTrainConfig(str(pictures), image_size=8)) < 1
