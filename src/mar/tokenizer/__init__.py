"""Images <-> normalised latents, behind one contract: `base.Tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mar.tokenizer.base import Posterior, Tokenizer
from mar.tokenizer.pixels import PixelTokenizer

__all__ = ["PixelTokenizer", "Posterior", "Tokenizer", "build"]


def build(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.spec()` describes, its weights and statistics still to come by `load_state_dict`.

    Raises ValueError for a kind that this version does not know.
    """
    kind = spec.get("kind")
    if kind == "pixels":
        tokenizer: Tokenizer = PixelTokenizer(spec["image_channels"])
    else:
        raise ValueError(f"tokenizer: got kind {kind!r}, expected pixels")
    return tokenizer._restore(dict(spec))
