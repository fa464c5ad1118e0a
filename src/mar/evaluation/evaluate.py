"""The evaluation itself: images -> features -> metrics, in one pass over any number of ranks.

`collect` walks through a set of images, and `compare` holds the result against a reference. `metrics.py` names the
papers. With several ranks the caller has joined a process group (`mar.distributed.process_group`): each walks through
its share, and all get the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mar import distributed
from mar.checkpoint.files import size_text
from mar.data.accounts import shown
from mar.data.images import UnreadableImage
from mar.evaluation import metrics
from mar.evaluation.class_accuracy import ClassAccuracy, shorten
from mar.evaluation.features import Extractor, Features
from mar.evaluation.image_sets import ImageBatch, ImageSet, rank_share
from mar.evaluation.metrics import ScoreSums
from mar.evaluation.neighbors import HeldOut, Pair, closest_pairs, share_of_copies
from mar.evaluation.statistics import FeatureStats, Moments, StatsProvenance, check_comparable
from mar.sampling.generate import BrokenLatents
from mar.sampling.progress import Advance
from mar.terminal import print_err

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Subsets of KID and the images in each: defaults of torch-fidelity and torchmetrics."""


@dataclass(frozen=True)
class MetricOptions:
    """The metrics to compute beside the Fréchet distance and the Inception Score (for networks that have one)."""

    kid: bool = False
    """KID, with its standard error. Keeps all features."""
    precision: bool = False
    """Precision and recall. Keeps all features."""
    splits: int = 10
    """Parts over which the Inception Score is averaged; 10 in published figures."""
    neighbors: bool = False
    """Distances to the nearest reference images. Keeps all features."""

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ValueError(f"splits: got {self.splits}, expected at least 1")

    @property
    def needs_features(self) -> bool:
        """Tells whether all features have to be kept."""
        return self.kid or self.precision or self.neighbors


@dataclass(frozen=True, eq=False)
class Collected:
    """The result of one walk through a set of images."""

    statistics: FeatureStats
    inception_score: tuple[float, float] | None = None
    """Mean and standard deviation over the splits."""
    classes: tuple[str, ...] = ()
    correct: tuple[int, ...] = ()
    """For each class its correctly classified images; empty without a classifier."""
    total: tuple[int, ...] = ()
    """For each class its classified images: 0 if the classifier does not know it."""
    unknown_classes: tuple[str, ...] = ()
    """The classes that the classifier does not know."""
    seconds: float = 0.0
    numbers: Int[Tensor, " n"] | None = None
    """Numbers of the images in their set, a row of the features each; None: all, in order."""
    warnings: tuple[str, ...] = ()
    """Images that can't be read and are left out, in a line."""


_FILE_KEYS = {
    "neighbor_distance": "neighbour_distance",
    "class_accuracy": "agreement",
    "worst_class_accuracy": "worst_agreement",
}
"""Fields of `Report` that reports, sweeps and logs have always had under another name."""


@dataclass(frozen=True)
class Report:
    """The metrics of a set of images against a reference."""

    metric: str
    """The name of `distance`: FID only for the network and weights that papers use."""
    distance: float
    count: int | None
    reference_count: int | None
    inception_score: float | None = None
    inception_score_std: float | None = None
    kernel_distance: float | None = None
    """KID."""
    kernel_distance_error: float | None = None
    precision: float | None = None
    recall: float | None = None
    neighbor_distance: float | None = None
    """The median distance to the nearest reference image."""
    held_out_distance: float | None = None
    """The same of real images that the model was not trained on."""
    copies: float | None = None
    """The share of images nearer to a reference image than 99% of the held-out ones (`neighbors.HeldOut`)."""
    pairs: tuple[Pair, ...] = ()
    """The images nearest to a reference image, the nearest first."""
    class_accuracy: float | None = None
    """The share of images of the class that was asked for."""
    worst_class: str | None = None
    worst_class_accuracy: float | None = None
    seconds: float = math.nan
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, by the names that files have; None for whatever was not measured."""
        values = {_FILE_KEYS.get(f.name, f.name): getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {name: None if value != value else value for name, value in values.items()}  # JSON has no nan
        return {**values, "pairs": [pair._asdict() for pair in self.pairs], "warnings": list(self.warnings)}

    def lines(self) -> list[tuple[str, str]]:
        """Returns names and values for people to read."""
        lines = [(self.metric, f"{self.distance:.4g}")]
        if self.inception_score is not None:
            lines.append(("Inception Score", f"{self.inception_score:.4g} ± {self.inception_score_std:.2g}"))
        if self.kernel_distance is not None:
            lines.append(("kernel distance (KID)", f"{self.kernel_distance:.4g} ± {self.kernel_distance_error:.2g}"))
        if self.precision is not None:
            lines += [("precision", f"{self.precision:.4f}"), ("recall", f"{self.recall:.4f}")]
        if self.neighbor_distance is not None:
            lines.append(("nearest reference picture", f"{self.neighbor_distance:.4g} (median)"))
        if self.copies is not None:
            lines.append(("the same, held-out pictures", f"{self.held_out_distance:.4g} (median)"))
            lines.append(("copies", f"{self.copies:.2%} (nearer than 99% of held-out pictures)"))
        if self.class_accuracy is not None:
            lines.append(("of the class asked for", f"{self.class_accuracy:.2%}"))
            lines.append(("the same, the worst class", f"{self.worst_class_accuracy:.2%} ({self.worst_class})"))
        count, reference = ("unknown" if n is None else f"{n:,}" for n in (self.count, self.reference_count))
        return [*lines, ("pictures", f"{count} against {reference}"), ("seconds", f"{self.seconds:.1f}")]


# ---- Images -> statistics


def collect(
    images: ImageSet,
    extractor: Extractor,
    *,
    options: MetricOptions | None = None,
    classifier: Extractor | None = None,
    batch: int = 64,
    advance: Advance | None = None,
) -> Collected:
    """Collects the statistics of a set of images in one pass.

    Memory does not grow with the set, unless features are kept.

    Args:
        images: the set; each rank of a group reads its share.
        extractor: the feature network.
        options: the metrics to prepare for.
        classifier: judges the class of each image; by default the extractor, if it knows classes of the images.
        batch: images at a time.
        advance: is called with the number of this rank's images done so far.

    Returns:
        The whole set's result, the same on every rank. Images that can't be read are left out and counted.

    Raises:
        ValueError: on every rank, for fewer than two readable images, images of several sizes, or a damaged `.npz`.
    """
    options = options or MetricOptions()
    accumulator = _Accumulator(extractor, len(images), options)
    accuracy = ClassAccuracy(images, extractor, classifier)
    started, done = time.perf_counter(), 0
    unreadable: list[UnreadableImage] = []
    with _same_error_on_all_ranks():
        first, end = rank_share(len(images), distributed.rank(), distributed.world_size())
        for part in images.batches(batch, first, end):
            unreadable += part.unreadable
            if len(part.indices):
                accuracy.add(part, accumulator.add(part))
            done += len(part.indices) + len(part.unreadable)
            if advance is not None:
                advance(float(done))
    warnings = _unreadable_warnings(unreadable, images)
    correct, total = accuracy.counts()
    score = accumulator.inception_score()
    if extractor.scores and score is None:
        count = accumulator.moments.gather().count
        warnings += (f"no Inception Score: {count:,} pictures leave one of {accumulator.splits} splits empty",)
    return Collected(
        statistics=accumulator.statistics(images.name),
        inception_score=score,
        classes=images.classes,
        correct=correct,
        total=total,
        unknown_classes=accuracy.unknown_classes(),
        seconds=time.perf_counter() - started,
        numbers=accumulator.numbers() if warnings else None,
        warnings=warnings,
    )


def _unreadable_warnings(own: list[UnreadableImage], images: ImageSet) -> tuple[str, ...]:
    """Returns the account of all ranks' unreadable images. ValueError if fewer than two others are left."""
    example = f"{shown(own[0].name, 200)} ({shown(own[0].why, 200)})" if own else ""
    of_ranks = distributed.all_gather_object((len(own), example))
    count, total = sum(number for number, _ in of_ranks), len(images)
    if not count:
        return ()
    example = next(text for number, text in of_ranks if number)
    what = f"{count:,} of the {total:,} pictures of {shown(images.name, 200)} can't be read"
    if total - count < 2:
        raise ValueError(f"{what}, such as {example}; {total - count} are left, expected at least 2; replace them")
    return (f"{what} and are left out, such as {example}: the figures rest on the other {total - count:,}",)


@contextlib.contextmanager
def _same_error_on_all_ranks() -> Iterator[None]:
    """Raises a rank's error on all ranks: none waits for sums that will never come."""
    own: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        own = error
    errors = distributed.all_gather_object(None if own is None else (str(own), isinstance(own, BrokenLatents)))
    if own is not None:
        raise own
    for message, broken in filter(None, errors):
        raise BrokenLatents(message) if broken else ValueError(message)


class _Accumulator:
    """Running sums of one rank's features and logits."""

    def __init__(self, extractor: Extractor, total: int, options: MetricOptions) -> None:
        if total < 2:
            raise ValueError(f"pictures: got {total}, expected at least 2")
        self.extractor, self.total, self.options = extractor, total, options
        self.moments = Moments(extractor.width)
        self.scores: ScoreSums | None = None
        self.features: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.size: tuple[int, int] | None = None

    def add(self, batch: ImageBatch) -> Features:
        size = (batch.images.shape[2], batch.images.shape[3])
        self.size = self.size or size
        if size != self.size:
            raise ValueError(f"pictures: got {_join((self.size, size))} pixels (height, width), expected one size")
        features = self.extractor(batch.images)
        values = features.values.cpu()
        self.moments.update(values)
        if self.options.needs_features:
            self.features.append(values)
            self.indices.append(batch.indices)
        if self.extractor.scores:
            assert features.logits is not None
            if self.scores is None:
                self.scores = self._empty_scores(features.logits.shape[1])
            self.scores.update(features.logits.cpu(), batch.indices)
        return features

    def statistics(self, source: str) -> FeatureStats:
        sizes = {size: None for size in distributed.all_gather_object(self.size) if size is not None}
        if len(sizes) > 1:
            raise ValueError(f"{source}: got pictures of {_join(sizes)} pixels (height, width), expected one size")
        provenance = StatsProvenance(self.extractor.name, self.extractor.fingerprint, next(iter(sizes)), source)
        moments, features = self.moments.gather(), None
        if self.options.needs_features:
            # a rank without images has no features, but takes part in the collective
            features = distributed.gather_rows(torch.cat([*self.features, torch.empty(0, self.extractor.width)]))
        return FeatureStats(moments.mean, moments.covariance, moments.count, features, provenance)

    def numbers(self) -> Tensor | None:
        """Returns the numbers of all ranks' images, in the order of their features; None without features."""
        if not self.options.needs_features:
            return None
        own = torch.cat([*self.indices, torch.empty(0, dtype=torch.int64)])
        return distributed.gather_rows(own[:, None])[:, 0]

    def inception_score(self) -> tuple[float, float] | None:
        if not self.extractor.scores:
            return None
        classes = max(distributed.all_gather_object(self.scores.classes if self.scores else 0))
        scores = (self.scores or self._empty_scores(classes)).gather()
        # too few readable images for the splits: there is no score
        return None if scores.count < self.total and scores.has_empty_split else scores.score()

    def _empty_scores(self, classes: int) -> ScoreSums:
        return ScoreSums(self.splits, classes, self.total)

    @property
    def splits(self) -> int:
        """Parts of the Inception Score."""
        return min(self.options.splits, self.total)


def print_feature_memory(count: int, extractor: Extractor) -> None:
    """Prints the memory that features of `count` images take, on rank 0."""
    if distributed.rank() == 0:
        size = size_text(4 * count * extractor.width)
        print_err(f"keeping the features of {count:,} pictures takes {size} of memory")


def _join(sizes: Iterable[tuple[int, int]]) -> str:
    return " and ".join(f"{height}x{width}" for height, width in sizes)


# ---- Statistics -> report


def compare(
    collected: Collected,
    reference: FeatureStats,
    extractor: Extractor,
    options: MetricOptions,
    held_out: HeldOut | None = None,
    reference_numbers: Int[Tensor, " m"] | None = None,
) -> Report:
    """Computes the metrics of a set of images against a reference.

    Args:
        collected: the images, as `collect` returns them.
        reference: statistics of real images; with features if `options` needs them.
        extractor: the feature network of both.
        options: the metrics to compute.
        held_out: the scale of distances to neighbors; without it no share of copies is reported.
        reference_numbers: `Collected.numbers` of the reference.

    Raises:
        ValueError: for statistics that can't be compared, or without the features that are needed.
    """
    own = collected.statistics
    check_comparable(own.provenance, reference.provenance)
    score, score_std = collected.inception_score or (None, None)
    return Report(
        metric=extractor.metric,
        distance=metrics.frechet_distance(own, reference),
        count=own.count,
        reference_count=reference.count,
        inception_score=score,
        inception_score_std=score_std,
        seconds=collected.seconds,
        warnings=(
            *collected.warnings,
            *sanity_warnings(own, reference, extractor.metric),
            *(held_out.sanity_warnings() if held_out else ()),
            *_unknown_class_warnings(collected),
        ),
        **_with_numbers(
            _feature_metrics(own.features, reference.features, options, held_out), collected.numbers, reference_numbers
        ),
        **_class_metrics(collected),
    )


def _feature_metrics(
    fake: Tensor | None, real: Tensor | None, options: MetricOptions, held_out: HeldOut | None
) -> dict[str, Any]:
    if not options.needs_features:
        return {}
    if fake is None or real is None:
        raise ValueError(
            "KID, precision, recall and neighbors need the features of the reference's pictures, and it has only "
            "their mean and covariance: give the pictures, or statistics that `mar stats --keep-features` made"
        )
    values: dict[str, Any] = {}
    if options.kid:
        size = min(KID_SUBSET_SIZE, len(fake), len(real))
        mean, error = metrics.kernel_distance(real, fake, KID_SUBSETS, size, seed=0)
        values |= {"kernel_distance": mean, "kernel_distance_error": error}
    if options.precision:
        precision, recall = metrics.precision_recall(real, fake)
        values |= {"precision": precision, "recall": recall}
    if options.neighbors:
        distances, indices = metrics.nearest_neighbors(real, fake)
        values |= {"neighbor_distance": float(distances.quantile(0.5)), "pairs": closest_pairs(distances, indices)}
        if held_out is not None:
            values |= {"held_out_distance": held_out.median, "copies": share_of_copies(distances, held_out)}
    return values


def _with_numbers(values: dict[str, Any], own: Tensor | None, reference: Tensor | None) -> dict[str, Any]:
    """Returns metrics whose pairs name images by their numbers in the sets, not by rows of features."""

    def number(row: int, numbers: Tensor | None) -> int:
        return row if numbers is None else int(numbers[row])

    pairs = values.get("pairs", ())
    named = tuple(Pair(number(p.picture, own), number(p.reference, reference), p.distance) for p in pairs)
    return values | ({"pairs": named} if pairs else {})


def _class_metrics(collected: Collected) -> dict[str, Any]:
    counts = zip(collected.correct, collected.total, collected.classes, strict=False)  # no classifier, no counts
    accuracies = [(correct / total, name) for correct, total, name in counts if total]
    if not accuracies:
        return {}
    lowest, worst = min(accuracies)
    mean = sum(collected.correct) / sum(collected.total)
    return {"class_accuracy": mean, "worst_class": worst, "worst_class_accuracy": lowest}


def _unknown_class_warnings(collected: Collected) -> tuple[str, ...]:
    names = collected.unknown_classes
    if not names or not sum(collected.total):
        return ()
    return (
        f"class accuracy leaves out {len(names):,} of {len(collected.classes):,} classes, which the classifier does "
        f"not know: {shorten(names)}",
    )


def sanity_warnings(own: FeatureStats, reference: FeatureStats, metric: str) -> tuple[str, ...]:
    """Returns reasons to doubt the distance, one line each."""
    width, lines = len(own.mean), []
    for count, name in ((own.count, "pictures"), (reference.count, "reference pictures")):
        if count is not None and count <= width:
            lines.append(
                f"{count:,} {name} for {width:,} features: the covariance is singular, and {metric} is too large; "
                f"compare it only with others of as many pictures, or take more than {width:,}"
            )
    for stats, name in ((own, "the file of statistics"), (reference, "the reference")):
        if stats.provenance is None:
            lines.append(f"{name} does not say what it was made with: that its features are the same ones is assumed")
    return tuple(lines)
