"""Data of the quality benchmarks: training and test images, and the feature network."""

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

FINGERPRINT_DIGITS = 16
"""Number of hexadecimal digits that are recorded of a fingerprint."""


@dataclass(frozen=True)
class Idx:
    """Fashion-MNIST from its IDX files."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes = FASHION_CLASSES
    flips = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(Image.fromarray(self.images[index]), int(self.labels[index]), f"picture {index}")


def is_fashion(data: Path) -> bool:
    """Return whether `data` is the folder of Fashion-MNIST's IDX files."""
    return (data / "train-images-idx3-ubyte.gz").is_file()


def open_splits(data: Path) -> tuple[Source, Source]:
    """Open training images, and held-out images to evaluate against."""
    if not is_fashion(data):
        return hold_out(data)
    train, test = (load_split(data, name) for name in ("train", "t10k"))
    return Idx(train.images, train.labels), Idx(test.images, test.labels)


def evaluation_extractor(data: Path, classifier: Path | None) -> Extractor:
    """Open the feature network for images like those of `data`."""
    return fashion_classifier(classifier) if is_fashion(data) else open_extractor("efficientnet-lite0")


def fingerprints(data: Path, parts: tuple[Source, Source], classifier: Path | None) -> dict[str, str | None]:
    """Fingerprint the images and the classifier, which may change under the same name."""
    return {
        "pictures": data_fingerprint(parts),
        "classifier": file_fingerprint(classifier) if is_fashion(data) else None,
    }


def file_fingerprint(path: Path | None) -> str | None:
    """Fingerprint the content of a file; None for None."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:FINGERPRINT_DIGITS]


def data_fingerprint(parts: tuple[Source, Source]) -> str:
    """Fingerprint the images of a data set and their split."""
    digest = hashlib.sha256()
    for part in parts:
        source = part
        if isinstance(part, Subset):
            source = part.source
            digest.update(part.indices.tobytes())
        if isinstance(source, Idx):
            digest.update(source.images.tobytes() + source.labels.tobytes())
        else:
            digest.update(source_digest(source).encode())
    return digest.hexdigest()[:FINGERPRINT_DIGITS]
