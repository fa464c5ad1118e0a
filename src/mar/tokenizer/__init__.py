"""Images <-> normalised latents, behind one contract: `base.Tokenizer`.

`KLTokenizer` and what else needs diffusers, which takes seconds to import, are imported when first asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mar.tokenizer.base import Posterior, Tokenizer
from mar.tokenizer.pca import PCATokenizer
from mar.tokenizer.pixels import PixelTokenizer

if TYPE_CHECKING:
    from mar.tokenizer.kl import KLTokenizer

COMPONENTS = re.compile(r"pca([1-9]\d?)")
"""What principal components are called: pca and the side of a square in pixels."""

__all__ = [
    "COMPONENTS",
    "KLTokenizer",
    "PCATokenizer",
    "PixelTokenizer",
    "Posterior",
    "Tokenizer",
    "build",
    "from_pixels",
]


def __getattr__(name: str) -> Any:
    if name == "KLTokenizer":
        from mar.tokenizer.kl import KLTokenizer

        return KLTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_pixels(name: str, image_channels: int, channels: int) -> Tokenizer | None:
    """The tokenizer called `name`, if it is one that any pictures may do with, its statistics still to come: `pixels`,
    or `pca4`, the principal components of squares of 4 x 4 pixels, of which `channels` are kept. Else None."""
    if name == "pixels":
        return PixelTokenizer(image_channels)
    found = COMPONENTS.fullmatch(name)
    return PCATokenizer(image_channels, int(found[1]), channels) if found else None


def build(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.spec()` describes, its weights and statistics still to come by `load_state_dict`.

    Raises ValueError for a kind that this version does not know, and for a "kl" without its config.
    """
    kind = spec.get("kind")
    if kind == "pixels":
        tokenizer: Tokenizer = PixelTokenizer(spec.get("image_channels", 3))
    elif kind == "pca":
        tokenizer = PCATokenizer(spec.get("image_channels", 3), spec.get("stride", 4), spec.get("channels", 16))
    elif kind == "kl":
        if not isinstance(spec.get("config"), Mapping):
            raise ValueError(
                f"tokenizer: got config {spec.get('config')!r}, expected that of a diffusers AutoencoderKL"
            )
        from mar.tokenizer import kl

        tokenizer = kl.from_config(spec["config"])
    else:
        raise ValueError(f"tokenizer: got kind {kind!r}, expected pixels, pca or kl")
    tokenizer.prepare(spec)
    return tokenizer
