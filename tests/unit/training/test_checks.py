"""What is warned of before a run's first step."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mar.presets import FASHION, recipe
from mar.training.checks import unusual_rate


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"lr": 4 * FASHION.lr}, None),
        ({"batch": 8}, None),
        ({"batch": 128, "lr": 2e-3}, None),
        ({"lr": 4.1 * FASHION.lr}, r"rate is 0.0041 for 32 pictures .*, 4.1 times above the 0.001 of .*; --lr 0.008 "),
        ({"batch": 4}, r"rate is 0.000125 for 4 pictures a step .*, 8 times below the 0.001 .*; --lr 0.064 "),
    ],
)
def test_a_rate_far_off_the_recipes_is_warned_of(changes: dict[str, float], words: str | None) -> None:
    warning = unusual_rate(replace(FASHION, **changes), FASHION, "fashion")  # type: ignore[arg-type]
    if words is None:
        assert warning is None
        return
    assert warning is not None
    assert warning.startswith("warning: ")
    assert "\n" not in warning
    assert re.search(words, warning)


def test_a_small_batch_of_an_official_recipe_is_warned_of() -> None:
    usual = recipe("imagenet-base")
    warning = unusual_rate(replace(usual, batch=64), usual, "imagenet-base")
    assert warning is not None
    assert "32 times below the 0.0008 of the recipe imagenet-base; --lr 0.0032 would be its rate" in warning
