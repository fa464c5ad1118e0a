"""What is warned of before a run begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mar.presets import RECIPES, recipe
from mar.training.checks import rate_far_off


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_not_far_off_itself(name: str) -> None:
    assert rate_far_off(recipe(name), recipe(name)) is None


def test_a_rate_far_off_the_recipes_is_warned_of() -> None:
    base = recipe("imagenet-base")  # 1e-4 at 256 pictures, 2048 a step: 8e-4
    assert rate_far_off(replace(base, lr=4e-4), base) is None
    assert rate_far_off(replace(base, batch=512), base) is None
    copied = rate_far_off(replace(base, lr=8e-4), base)  # the rate of a step, given as if for 256 pictures
    assert copied == (
        "warning: a step's learning rate is 0.0064 (lr x batch / 256), 8 times the recipe's 0.0008 at its batch of "
        "2048; change --lr if that is not meant"
    )
    assert "0.12 times" in (rate_far_off(replace(base, batch=256), base) or "")
