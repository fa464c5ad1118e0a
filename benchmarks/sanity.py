"""What each metric says of pictures that are known to be good, noisy, blurred, incomplete or copied; and of a model's.

    python benchmarks/sanity.py --data PATH --classifier FILE --out sanity.json [--model PICTURES.npz] [--count 10000]

PATH is a folder with the four gzipped IDX files of Fashion-MNIST, FILE what `fashion_judge.py train` made, PICTURES
what `mar generate fashion --count 10000 --out PICTURES.npz` draws. All are held against the 10,000 test pictures.
Rows that are there already are not measured again.
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
MISSING = 8  # the class that one row goes without: bags


@dataclass(frozen=True)
class InMemory:
    """Grey pictures (n, 28, 28) with their classes, as a set that can be walked through."""

    name: str
    images: Bytes
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = FASHION_CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        for start in range(first, end, batch):
            chosen = slice(start, min(start + batch, end))
            images = torch.from_numpy(self.images[chosen]).unsqueeze(1)
            yield ImageBatch(images, torch.arange(chosen.start, chosen.stop), torch.from_numpy(self.labels[chosen]))


def rows(data: Path, count: int, model: Path | None) -> dict[str, Callable[[], InMemory]]:
    """The sets to be judged, by name; made when asked for."""
    split = load_split(data, "train")
    draws = np.random.default_rng(0)
    chosen = draws.permutation(len(split.images))[:count]
    others = draws.permutation(np.flatnonzero(split.labels != MISSING))[:count]
    bundled = FashionSource("train")

    def blurred() -> Bytes:
        pictures = (Image.fromarray(image) for image in split.images[chosen])
        return np.stack([np.asarray(picture.filter(ImageFilter.GaussianBlur(1))) for picture in pictures])

    made: dict[str, Callable[[], InMemory]] = {
        "real training pictures": lambda: InMemory("train", split.images[chosen], split.labels[chosen]),
        "the same, blurred by 1 pixel": lambda: InMemory("blurred", blurred(), split.labels[chosen]),
        "real, without bags": lambda: InMemory("incomplete", split.images[others], split.labels[others]),
        "copies of what the model learned from": lambda: InMemory(
            "copies", bundled.images[:count], bundled.labels[:count].astype(np.int64)
        ),
        "noise": lambda: InMemory(
            "noise", draws.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % len(FASHION_CLASSES)
        ),
    }
    if model is not None:
        made[f"drawn: {model.stem}"] = lambda: from_npz(model, count)
    return made


def from_npz(path: Path, count: int) -> InMemory:
    """The pictures of an `.npz`, grey."""
    held = NpzImages(path, limit=count)
    parts = list(held.batches(500, 0, len(held)))
    images = torch.cat([part.images[:, 0] for part in parts]).numpy()
    return InMemory(str(path), images, torch.cat([part.labels for part in parts]).numpy())


class Judge:
    """Test pictures in both networks' features, and how near they are to what the model learned from."""

    def __init__(self, data: Path, count: int, judge: Path) -> None:
        self.lite, self.small = open_extractor("efficientnet-lite0"), classifier(judge)
        self.wanted = MetricOptions(kid=True, precision=True)
        test = load_split(data, "t10k")
        held = InMemory("test", test.images[:count], test.labels[:count])
        learned = FashionSource("train")
        self.test = collect(held, self.lite, options=self.wanted).statistics
        self.test_small = collect(held, self.small).statistics
        of = InMemory("learned from", learned.images, learned.labels.astype(np.int64))
        self.learned = features(of, self.lite)
        assert self.test.features is not None
        self.usual = metrics.nearest_neighbors(self.learned, self.test.features)[0]

    def __call__(self, pictures: InMemory) -> dict[str, Any]:
        found = collect(pictures, self.lite, options=self.wanted)
        report = compare(found, self.test, self.lite, self.wanted)
        small = collect(pictures, self.small)
        judged = compare(small, self.test_small, self.small, MetricOptions())
        assert found.statistics.features is not None
        near = metrics.nearest_neighbors(self.learned, found.statistics.features)[0]
        return {
            "FD (EfficientNet-Lite0)": report.distance,
            "KID x 1000": 1000 * (report.kernel_distance or 0),
            "error of KID x 1000": 1000 * (report.kernel_distance_error or 0),
            "precision": report.precision,
            "recall": report.recall,
            f"{self.small.metric}": judged.distance,
            "class agreement": judged.class_accuracy,
            "nearest learned picture, median": float(near.median()),
            "nearer than 1% of test pictures are": float((near < self.usual.quantile(0.01)).double().mean()),
        }


def features(pictures: InMemory, extractor: Extractor) -> torch.Tensor:
    """(n, d) of all the pictures."""
    found: FeatureStats = collect(pictures, extractor, options=MetricOptions(kid=True)).statistics
    assert found.features is not None
    return found.features


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("sanity.json"))
    args = parser.parse_args()
    table: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    wanted = rows(args.data, args.count, args.model)
    missing = [name for name in wanted if name not in table]
    judge = Judge(args.data, args.count, args.classifier) if missing else None
    for name in missing:
        assert judge is not None
        table[name] = judge(wanted[name]())
        args.out.write_text(json.dumps(table, indent=1) + "\n")
        print(name, json.dumps(table[name]), file=sys.stderr, flush=True)
    columns = list(next(iter(table.values())))
    print("| | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
