"""What is warned of before a run's first step."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tars import shards
from tiny import pictures, train_config

from mar import devices
from mar.data.sources import open_data, open_source
from mar.data.splits import train_val_split
from mar.presets import FASHION, recipe
from mar.training import preflight
from mar.training.preflight import learning_rate_warning, memorization_warning, precision_hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"lr": 4 * FASHION.lr}, None),
        ({"batch": 8}, None),
        ({"batch": 128, "lr": 2e-3}, None),
        (
            {"lr": 4.1 * FASHION.lr},
            r"rate is 0.00615 for 32 pictures .*, 4.1 times above the 0.0015 .*; --lr 0.012 ",
        ),
        ({"batch": 4}, r"rate is 0.000188 for 4 pictures a step .*, 8 times below the 0.0015 .*; --lr 0.096 "),
    ],
)
def test_a_rate_far_off_the_recipes_is_warned_of(changes: dict[str, float], words: str | None) -> None:
    warning = learning_rate_warning(replace(FASHION, **changes), FASHION, "fashion")  # type: ignore[arg-type]
    if words is None:
        assert warning is None
        return
    assert warning is not None
    assert warning.startswith("warning: ")
    assert "\n" not in warning
    assert re.search(words, warning)


def test_a_small_batch_of_an_official_recipe_is_warned_of() -> None:
    usual = recipe("imagenet-base")
    warning = learning_rate_warning(replace(usual, batch=64), usual, "imagenet-base")
    assert warning is not None
    assert "32 times below the 0.0008 of the recipe imagenet-base; --lr 0.0032 would be its rate" in warning


@pytest.mark.parametrize("has_it", [False, True])
def test_a_run_in_float32_hears_of_bfloat16_where_the_processor_has_it(
    has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: has_it)
    said = precision_hint(FASHION, torch.device("cpu"))
    assert (said is not None) == has_it
    assert said is None or "--precision bf16" in said
    assert precision_hint(replace(FASHION, precision="bf16"), torch.device("cpu")) is None
    assert precision_hint(FASHION, torch.device("cuda")) is None


def test_few_pictures_that_are_seen_often_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(pictures(tmp_path, 20))
    config = train_config(tmp_path, images=2_000)
    warning = memorization_warning(config, source)
    assert warning is not None
    assert warning.startswith("warning: 20 pictures will be seen 100 times each, and a model may memorize them: ")
    assert warning.endswith("(--hold-out 10 --patience 3, and another --out)")
    assert "\n" not in warning
    assert memorization_warning(replace(config, images=1_999), source) is None
    assert memorization_warning(replace(config, patience=3), source) is None
    assert memorization_warning(config, source, warned_length=1_999) == warning
    assert memorization_warning(config, source, warned_length=2_000) is None  # it was said
    learned, _ = train_val_split(source, 5)
    assert "16 pictures will be seen 124 times" in (memorization_warning(replace(config, images=1_999), learned) or "")
    monkeypatch.setattr(preflight, "SMALL_DATASET", 20)
    assert memorization_warning(config, source) is None


def test_a_stream_is_not_counted(tmp_path: Path) -> None:
    stream = open_data(f"stream:{shards(tmp_path, (2, 2))}", classes=3)
    assert memorization_warning(FASHION, stream) is None
