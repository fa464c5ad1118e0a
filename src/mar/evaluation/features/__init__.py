"""Feature extractors: uint8 images in, features and logits out, each metric's preprocessing inside."""

from __future__ import annotations

from pathlib import Path

from mar.evaluation.features.base import Extractor, Features, ModuleExtractor, open_custom
from mar.evaluation.features.efficientnet import efficientnet_lite0
from mar.evaluation.features.inception import inception as open_inception

__all__ = ["Extractor", "Features", "ModuleExtractor", "open_extractor"]


def open_extractor(name: str, weights: Path | None = None) -> Extractor:
    """Opens "inception", "efficientnet-lite0", or one that "FILE.py:function" or "module:function" makes.

    `weights` is a file for it, by default its own. A function is called with `weights` and returns an Extractor, or a
    torch.nn.Module for `ModuleExtractor`. Raises ValueError, one line, for an extractor that can't be opened.
    """
    if name == "inception":
        return open_inception(weights)
    if name == "efficientnet-lite0":
        return efficientnet_lite0(weights)
    if ":" in name:
        return open_custom(name, weights)
    raise ValueError(
        f"features: got {name!r}, expected inception, efficientnet-lite0, FILE.py:function or package.module:function"
    )
