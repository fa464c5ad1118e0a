"""Images <-> normalized latents, behind one contract: `base.Tokenizer`.

A new tokenizer is a class that implements the contract, in a file of its own, and an entry of `TOKENIZERS`. Classes are
imported at first use, since `KLTokenizer` imports diffusers, which takes seconds.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mar.tokenizer.base import LatentStats, Posterior, Tokenizer
from mar.tokenizer.pca import PCATokenizer
from mar.tokenizer.pixels import PixelTokenizer

if TYPE_CHECKING:
    from mar.tokenizer.kl import KLTokenizer

__all__ = [
    "TOKENIZERS",
    "KLTokenizer",
    "LatentStats",
    "PCATokenizer",
    "PixelTokenizer",
    "Posterior",
    "Tokenizer",
    "build",
    "from_name",
    "is_name",
]


class Entry(NamedTuple):
    """A kind of tokenizer: its class, and names that create it."""

    module: str
    class_name: str
    names: str | None = None
    """Regular expression of names such as `pixels` or `pca4` (None: it is loaded from files)."""
    diffusers_class: str | None = None
    """Class of diffusers that the tokenizer wraps; `mar.checkpoint.tokenizers` loads and saves its files."""

    def load(self) -> type[Tokenizer]:
        """Import the class."""
        tokenizer: type[Tokenizer] = getattr(importlib.import_module(self.module), self.class_name)
        return tokenizer


TOKENIZERS: dict[str, Entry] = {
    "pixels": Entry("mar.tokenizer.pixels", "PixelTokenizer", "pixels"),
    "residual": Entry("mar.tokenizer.residual", "ResidualTokenizer"),
    "pca": Entry("mar.tokenizer.pca", "PCATokenizer", r"pca[1-9]\d?"),
    "kl": Entry("mar.tokenizer.kl", "KLTokenizer", diffusers_class="AutoencoderKL"),
    "vit": Entry("mar.tokenizer.vit", "ViTTokenizer"),
    "dc": Entry("mar.tokenizer.dc", "DCTokenizer", diffusers_class="AutoencoderDC"),
}
"""All kinds of tokenizers, by the `kind` in their config."""


def __getattr__(name: str) -> Any:
    if name == "KLTokenizer":
        return TOKENIZERS["kl"].load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_name(name: str) -> bool:
    """Return whether `from_name` creates a tokenizer of this name."""
    return any(entry.names and re.fullmatch(entry.names, name) for entry in TOKENIZERS.values())


def from_name(name: str, image_channels: int, channels: int | None = None) -> Tokenizer:
    """Create a tokenizer by name, without statistics.

    Args:
        name: `pixels`, or `pca4`: principal components of squares of 4x4 pixels.
        image_channels: channels of the images, 1 or 3.
        channels: channels of the latents (None: the tokenizer's default).

    Raises ValueError for an unknown name or unsupported channels.
    """
    for entry in TOKENIZERS.values():
        if entry.names and re.fullmatch(entry.names, name):
            return entry.load().from_name(name, image_channels, channels)
    raise ValueError(f"tokenizer: got {name!r}, expected pixels, or pca and the side of a square, as pca4")


def build(config: Mapping[str, Any]) -> Tokenizer:
    """Create the tokenizer of a `Tokenizer.config()`, before `load_state_dict`.

    Raises ValueError for an unknown kind or an invalid config.
    """
    kind = config.get("kind")
    if kind not in TOKENIZERS:
        *others, last = TOKENIZERS
        raise ValueError(f"tokenizer: got kind {kind!r}, expected {', '.join(others)} or {last}")
    tokenizer = TOKENIZERS[kind].load().from_config(config)
    tokenizer.prepare(config)
    return tokenizer
