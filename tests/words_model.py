"""A small model that draws from words, for the tests of the page."""

from __future__ import annotations

from typing import Any

from tiny import tiny_words_pipeline

from mar.pipeline import Pipeline

WORDS = ("a", "red", "ant", "bee", "beetle", "medium-dark", "seed")
EXAMPLES = ["a red ant", "a bee, medium-dark"]


def words_pipeline(seed: int = 0, **changes: Any) -> Pipeline:
    """A pixel-space model of 4x4 pixels that knows WORDS, of which a prompt may have four."""
    return tiny_words_pipeline(seed, {"examples": EXAMPLES}, WORDS, **changes)
