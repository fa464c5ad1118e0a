"""What comes with the package: pictures, class names, licences, and the bundled weights."""

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
    """One of ImageNet's 1000 classes; its number is its place in `imagenet()`."""

    wnid: str
    """WordNet's number of it, the name of its folder in the data set: n02099601."""
    name: str
    """The one name we show; no two classes have the same."""
    synonyms: tuple[str, ...]
    """WordNet's other names; some belong to two classes (crane)."""


def asset(name: str) -> Path:
    """The path of a bundled file or folder; FileNotFoundError where this installation lacks it."""
    path = Path(__file__).parent / name
    if not path.exists():
        raise FileNotFoundError(f"the bundled {name} is missing from {path.parent}: install the package again")
    return path


@functools.cache
def imagenet() -> tuple[ImageNetClass, ...]:
    """ImageNet's classes in the order of their numbers."""
    lines = asset("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    rows = [(line + "\t").split("\t")[:3] for line in lines]
    return tuple(ImageNetClass(wnid, name, tuple(filter(None, others.split(", ")))) for wnid, name, others in rows)


def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes in the order of their numbers."""
    return tuple(entry.name for entry in imagenet())
