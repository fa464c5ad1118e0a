"""The pictures that come with the package."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mar.assets import FASHION_CLASSES, asset
from mar.data.examples import Example


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
        name = f"fashion/{self.split}/{index}"
        return Example(Image.fromarray(self.images[index]), int(self.labels[index]), name)
