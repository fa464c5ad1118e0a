"""Sanity check of the metrics, on good, noisy, blurred, incomplete and copied images.

    python benchmarks/sanity.py --data PATH --classifier FILE --out sanity.json [--model PICTURES.npz] [--count 10000]

PATH is a folder with the four gzipped IDX files of Fashion-MNIST, FILE a file of `fashion_judge.py train`, PICTURES a
file of `mar generate fashion --count 10000 --out PICTURES.npz`. All are compared with the 10,000 test images. Rows in
the output file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_judge import extractor as classifier
from fashion_judge import load_split
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mar.assets import FASHION_CLASSES
from mar.data.sources import FashionSource
from mar.evaluation import metrics
from mar.evaluation.evaluate import MetricOptions, collect, compare
from mar.evaluation.features import Extractor, open_extractor
from mar.evaluation.image_sets import ImageBatch, NpzImages
from mar.evaluation.statistics import FeatureStats

Bytes = NDArray[np.uint8]
MISSING_CLASS = 8  # bags, left out in one row


@dataclass(frozen=True)
class InMemory:
    """Grey images (n, 28, 28) with their classes, as an image set."""

    name: str
    images: Bytes
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = FASHION_CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        for start in range(first, end, batch):
            part = slice(start, min(start + batch, end))
            images = torch.from_numpy(self.images[part]).unsqueeze(1)
            yield ImageBatch(images, torch.arange(part.start, part.stop), torch.from_numpy(self.labels[part]))


def rows(data: Path, count: int, model: Path | None) -> dict[str, Callable[[], InMemory]]:
    """Return functions that create the image sets, by the name of their row."""
    split = load_split(data, "train")
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(split.images))[:count]
    others = rng.permutation(np.flatnonzero(split.labels != MISSING_CLASS))[:count]
    bundled = FashionSource("train")

    def blurred() -> Bytes:
        pictures = (Image.fromarray(image) for image in split.images[chosen])
        return np.stack([np.asarray(picture.filter(ImageFilter.GaussianBlur(1))) for picture in pictures])

    sets: dict[str, Callable[[], InMemory]] = {
        "real training pictures": lambda: InMemory("train", split.images[chosen], split.labels[chosen]),
        "the same, blurred by 1 pixel": lambda: InMemory("blurred", blurred(), split.labels[chosen]),
        "real, without bags": lambda: InMemory("incomplete", split.images[others], split.labels[others]),
        "copies of what the model learned from": lambda: InMemory(
            "copies", bundled.images[:count], bundled.labels[:count].astype(np.int64)
        ),
        "noise": lambda: InMemory(
            "noise", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % len(FASHION_CLASSES)
        ),
    }
    if model is not None:
        sets[f"drawn: {model.stem}"] = lambda: from_npz(model, count)
    return sets


def from_npz(path: Path, count: int) -> InMemory:
    """Read the images of an `.npz`, as grey."""
    source = NpzImages(path, limit=count)
    parts = list(source.batches(500, 0, len(source)))
    images = torch.cat([part.images[:, 0] for part in parts]).numpy()
    return InMemory(str(path), images, torch.cat([part.labels for part in parts]).numpy())


class Evaluator:
    """Evaluates image sets against the test images, in the features of two networks."""

    def __init__(self, data: Path, count: int, classifier_file: Path) -> None:
        self.lite, self.small = open_extractor("efficientnet-lite0"), classifier(classifier_file)
        self.options = MetricOptions(kid=True, precision=True)
        test = load_split(data, "t10k")
        test_images = InMemory("test", test.images[:count], test.labels[:count])
        bundled = FashionSource("train")
        self.test = collect(test_images, self.lite, options=self.options).statistics
        self.test_small = collect(test_images, self.small).statistics
        training_images = InMemory("training images", bundled.images, bundled.labels.astype(np.int64))
        self.training_features = features(training_images, self.lite)
        assert self.test.features is not None
        self.test_distances = metrics.nearest_neighbors(self.training_features, self.test.features)[0]

    def __call__(self, pictures: InMemory) -> dict[str, Any]:
        collected = collect(pictures, self.lite, options=self.options)
        report = compare(collected, self.test, self.lite, self.options)
        small = collect(pictures, self.small)
        small_report = compare(small, self.test_small, self.small, MetricOptions())
        assert collected.statistics.features is not None
        distances = metrics.nearest_neighbors(self.training_features, collected.statistics.features)[0]
        threshold = self.test_distances.quantile(0.01)
        return {
            "FD (EfficientNet-Lite0)": report.distance,
            "KID x 1000": 1000 * (report.kernel_distance or 0),
            "error of KID x 1000": 1000 * (report.kernel_distance_error or 0),
            "precision": report.precision,
            "recall": report.recall,
            f"{self.small.metric}": small_report.distance,
            "class agreement": small_report.class_accuracy,
            "nearest learned picture, median": float(distances.median()),
            "nearer than 1% of test pictures are": float((distances < threshold).double().mean()),
        }


def features(pictures: InMemory, extractor: Extractor) -> torch.Tensor:
    """Compute the features (n, d) of all images."""
    statistics: FeatureStats = collect(pictures, extractor, options=MetricOptions(kid=True)).statistics
    assert statistics.features is not None
    return statistics.features


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("sanity.json"))
    args = parser.parse_args()
    table: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    sets = rows(args.data, args.count, args.model)
    missing = [name for name in sets if name not in table]
    evaluator = Evaluator(args.data, args.count, args.classifier) if missing else None
    for name in missing:
        assert evaluator is not None
        table[name] = evaluator(sets[name]())
        args.out.write_text(json.dumps(table, indent=1) + "\n")
        print(name, json.dumps(table[name]), file=sys.stderr, flush=True)
    columns = list(next(iter(table.values())))
    print("| | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
