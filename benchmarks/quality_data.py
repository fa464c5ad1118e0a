"""What the benchmarks of quality learn from and what they judge by: pictures, and the network whose features count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fashion_judge import extractor as fashion_classifier
from fashion_judge import load_split
from numpy.typing import NDArray
from PIL import Image

from mar.assets import FASHION_CLASSES
from mar.data.examples import Example, Source
from mar.data.heldout import hold_out
from mar.evaluation.features import Extractor, open_extractor


@dataclass(frozen=True)
class Idx:
    """Fashion-MNIST from its own files."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes = FASHION_CLASSES
    flips = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(Image.fromarray(self.images[index]), int(self.labels[index]), f"picture {index}")


def is_fashion(data: Path) -> bool:
    """Whether `data` is the folder of Fashion-MNIST's files."""
    return (data / "train-images-idx3-ubyte.gz").is_file()


def open_parts(data: Path) -> tuple[Source, Source]:
    """Pictures to learn from, and others to judge by."""
    if not is_fashion(data):
        return hold_out(data)
    train, test = (load_split(data, name) for name in ("train", "t10k"))
    return Idx(train.images, train.labels), Idx(test.images, test.labels)


def open_judge(data: Path, classifier: Path | None) -> Extractor:
    """The network in whose features pictures like those of `data` are judged."""
    return fashion_classifier(classifier) if is_fashion(data) else open_extractor("efficientnet-lite0")
