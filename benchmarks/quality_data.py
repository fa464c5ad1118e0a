"""What the benchmarks of quality learn from and what they judge by: pictures, and the network whose features count."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fashion_judge import extractor as fashion_classifier
from fashion_judge import load_split
from numpy.typing import NDArray
from PIL import Image

from mar.assets import FASHION_CLASSES
from mar.data.images import Example, Source, source_digest
from mar.data.splits import Subset, hold_out
from mar.evaluation.features import Extractor, open_extractor

DIGITS = 16
"""Of a fingerprint, as it is noted."""


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


def fingerprints(data: Path, parts: tuple[Source, Source], classifier: Path | None) -> dict[str, str | None]:
    """What is noted of the pictures and of the judge, so that nothing is measured with others under the same name."""
    return {"pictures": of_pictures(parts), "classifier": of_file(classifier) if is_fashion(data) else None}


def of_file(path: Path | None) -> str | None:
    """What tells a file from others, wherever it is; None of none."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]


def of_pictures(parts: tuple[Source, Source]) -> str:
    """What tells the pictures of a data set, and which of them are held out, from others, wherever they are."""
    found = hashlib.sha256()
    for part in parts:
        whole = part
        if isinstance(part, Subset):
            whole = part.source
            found.update(part.indices.tobytes())
        if isinstance(whole, Idx):
            found.update(whole.images.tobytes() + whole.labels.tobytes())
        else:
            found.update(source_digest(whole).encode())
    return found.hexdigest()[:DIGITS]
