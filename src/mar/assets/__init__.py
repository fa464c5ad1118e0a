"""Bundled files: images, class names, licenses and weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class ImageNetClass(NamedTuple):
    """One of ImageNet's 1000 classes; its class number is its index in `imagenet()`."""

    wnid: str
    """WordNet's number, as n02099601: the name of the class's folder in the data set."""
    name: str
    """Unique name, which we show."""
    synonyms: tuple[str, ...]
    """Other names in WordNet; some are those of two classes (crane)."""


def asset(name: str) -> Path:
    """Return the path of a bundled file or folder.

    Raises FileNotFoundError if this installation lacks it.
    """
    path = Path(__file__).parent / name
    if not path.exists():
        raise FileNotFoundError(f"the bundled {name} is missing from {path.parent}: install the package again")
    return path


@functools.cache
def imagenet() -> tuple[ImageNetClass, ...]:
    """Return ImageNet's classes, by class number."""
    lines = asset("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    rows = [(line + "\t").split("\t")[:3] for line in lines]  # the last field may be missing
    return tuple(ImageNetClass(wnid, name, tuple(filter(None, synonyms.split(", ")))) for wnid, name, synonyms in rows)


def imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's classes, by class number."""
    return tuple(entry.name for entry in imagenet())
