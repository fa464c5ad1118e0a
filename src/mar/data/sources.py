"""Where pictures come from: a source knows its classes and gives example i, as it was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mar.assets import FASHION_CLASSES, asset

BUNDLED = "fashion"


@dataclass(frozen=True)
class Example:
    """A picture as it was found: any size, any colour mode."""

    image: Image.Image
    label: int
    """Number of its class; -1 where it has none."""
    name: str
    """Its path, or what else identifies it in a message."""


class UnreadableImage(ValueError):
    """A picture that can't be decoded. `name` says which, `why` what is wrong with it."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"can't read the picture {name}: {why}")
        self.name, self.why = name, why


class Source(Protocol):
    """A sequence of examples, picklable, so that workers can have a copy."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty where pictures have no classes."""

    @property
    def flips(self) -> bool:
        """Whether a mirror image is as good a picture as the original."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example number `index`; raises UnreadableImage for a broken one."""


class FashionSource:
    """The bundled subset of Fashion-MNIST: 10,000 ("train") or 2,000 ("test") grey pictures of 28x28.

    Example i is of class i % 10, so that every run of ten holds every class. All shoes face left: no flips.
    """

    classes = FASHION_CLASSES
    flips = False
    side = 28

    def __init__(self, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split: got {split!r}, but the bundled pictures have only train and test")
        self.split = split
        with Image.open(asset(f"fashion-mnist/{split}.png")) as sheet:
            pixels = np.asarray(sheet)
        rows, columns = pixels.shape[0] // self.side, pixels.shape[1] // self.side
        cells = pixels.reshape(rows, self.side, columns, self.side).transpose(0, 2, 1, 3)
        self.images = np.ascontiguousarray(cells.reshape(-1, self.side, self.side))
        self.labels = np.arange(len(self.images)) % len(self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        name = f"{BUNDLED}/{self.split}/{index}"
        return Example(Image.fromarray(self.images[index]), int(self.labels[index]), name)


def open_source(spec: str | Path, split: str = "train") -> Source:
    """The source that `spec` names.

    "fashion": the bundled pictures, `split` train or test.
    """
    if str(spec) == BUNDLED:
        return FashionSource(split)
    raise ValueError(f"data: got {str(spec)!r}, expected {BUNDLED!r}")
