"""A small model that draws from words, for the tests of the page."""

from __future__ import annotations

from typing import Any

from tiny import FAST, tiny_model

from mar.data.conditions import WordReader
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer

WORDS = ("a", "red", "ant", "bee", "beetle", "medium-dark", "seed")
EXAMPLES = ["a red ant", "a bee, medium-dark"]


def words_pipeline(seed: int = 0, **changes: Any) -> Pipeline:
    """A pixel-space model of grey pictures of 4x4 pixels that knows WORDS, of which a prompt may have four."""
    changes = {"channels": 1, "classes": 0, "words": len(WORDS), "buffer_size": 4, **changes}
    tokenizer = PixelTokenizer(changes["channels"], mean=-0.4, std=0.5)
    captions = WordReader(WORDS, changes["buffer_size"])
    model = tiny_model(seed, **changes)
    return Pipeline(model, tokenizer, captions=captions, sampling=FAST, notes={"examples": EXAMPLES})
