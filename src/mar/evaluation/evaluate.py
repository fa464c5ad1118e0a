"""Pictures -> features -> numbers, in one pass over any number of processes; and what reference they are held against.

Source of the metrics: `metrics.py`. Whoever calls this on several processes has a process group
(`mar.distributed.process_group`); each walks through its share, and all get the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mar import distributed
from mar.evaluation import metrics
from mar.evaluation.class_accuracy import ClassAccuracy
from mar.evaluation.features import Extractor, Features
from mar.evaluation.image_sets import ImageBatch, PictureSet, share
from mar.evaluation.metrics import ScoreSums
from mar.evaluation.neighbors import HeldOut, Pair, closest, share_of_copies
from mar.evaluation.statistics import FeatureStats, Moments, StatsProvenance, check_comparable, gather_rows
from mar.sampling.generate import BrokenLatents

Advance = Callable[[float], None]
"""Takes how many of this process's pictures are done."""

KERNEL_SUBSETS, KERNEL_SUBSET = 100, 1000
"""Subsets of KID and the pictures in each, as torch-fidelity's and torchmetrics' defaults."""


@dataclass(frozen=True)
class MetricOptions:
    """Which numbers to compute beside the Fréchet distance and, where the network has it, the Inception Score."""

    kernel: bool = False
    """KID, with its standard error. Keeps all features."""
    precision: bool = False
    """Precision and recall. Keeps all features."""
    splits: int = 10
    """Parts over which the Inception Score is averaged; 10 in published figures."""
    neighbours: bool = False
    """How near pictures come to those of the reference. Keeps all features."""

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ValueError(f"splits is {self.splits}, but it must be at least 1")

    @property
    def features(self) -> bool:
        """Whether all features have to be kept."""
        return self.kernel or self.precision or self.neighbours


@dataclass(frozen=True, eq=False)
class Collected:
    """What is left of a set of pictures."""

    statistics: FeatureStats
    score: tuple[float, float] | None = None
    """Inception Score: mean and standard deviation over the splits."""
    classes: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    """For each class how many of its pictures the judge takes for it; empty where there is no judge."""
    judged: tuple[int, ...] = ()
    """For each class how many of its pictures were judged: 0 where the judge does not know it."""
    left_out: tuple[str, ...] = ()
    """The classes that the judge does not know."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The judgement. `metric` is the name of `distance`: FID only for the network and weights that papers use."""

    metric: str
    distance: float
    count: int | None
    reference_count: int | None
    inception_score: float | None = None
    inception_score_std: float | None = None
    kernel_distance: float | None = None
    kernel_distance_error: float | None = None
    precision: float | None = None
    recall: float | None = None
    neighbour_distance: float | None = None
    """The median of the pictures' distances to the nearest reference picture."""
    held_out_distance: float | None = None
    """The same of pictures that the model did not learn from."""
    copies: float | None = None
    """The share of pictures nearer to a reference picture than all but 1% of those are (`neighbours.HeldOut`)."""
    pairs: tuple[Pair, ...] = ()
    """The pictures nearest to a reference picture, the nearest first."""
    agreement: float | None = None
    worst_class: str | None = None
    worst_agreement: float | None = None
    seconds: float = math.nan
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; None where something was not measured."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {name: None if value != value else value for name, value in values.items()}  # JSON has no nan
        return {**values, "pairs": [pair._asdict() for pair in self.pairs], "warnings": list(self.warnings)}

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people to read."""
        found = [(self.metric, f"{self.distance:.4g}")]
        if self.inception_score is not None:
            found.append(("Inception Score", f"{self.inception_score:.4g} ± {self.inception_score_std:.2g}"))
        if self.kernel_distance is not None:
            found.append(("kernel distance (KID)", f"{self.kernel_distance:.4g} ± {self.kernel_distance_error:.2g}"))
        if self.precision is not None:
            found += [("precision", f"{self.precision:.4f}"), ("recall", f"{self.recall:.4f}")]
        if self.neighbour_distance is not None:
            found.append(("nearest reference picture", f"{self.neighbour_distance:.4g} (median)"))
        if self.copies is not None:
            found.append(("the same, held-out pictures", f"{self.held_out_distance:.4g} (median)"))
            found.append(("copies", f"{self.copies:.2%} (nearer than 99% of held-out pictures)"))
        if self.agreement is not None:
            found.append(("of the class asked for", f"{self.agreement:.2%}"))
            found.append(("the same, the worst class", f"{self.worst_agreement:.2%} ({self.worst_class})"))
        count, against = ("unknown" if n is None else f"{n:,}" for n in (self.count, self.reference_count))
        return [*found, ("pictures", f"{count} against {against}"), ("seconds", f"{self.seconds:.1f}")]


def collect(
    pictures: PictureSet,
    extractor: Extractor,
    *,
    wanted: MetricOptions | None = None,
    classifier: Extractor | None = None,
    batch: int = 64,
    advance: Advance | None = None,
) -> Collected:
    """Walks once through `pictures`. Memory does not grow with their number unless features are wanted.

    `classifier` judges whether pictures are of the class that was asked for; by default the extractor, where its
    classes are the pictures'. Every process of a group gets the whole result, or the error of the first that had one:
    ValueError for fewer than two pictures, or of several sizes, and what opening them raises.
    """
    wanted = wanted or MetricOptions()
    sums, agreement = _Sums(extractor, len(pictures), wanted), ClassAccuracy(pictures, extractor, classifier)
    begun = time.perf_counter()
    with _all_or_none():
        first, end = share(len(pictures), distributed.rank(), distributed.world_size())
        for part in pictures.batches(batch, first, end):
            agreement.add(part, sums.add(part))
            if advance is not None:
                advance(float(part.indices[-1]) - first + 1)
    right, judged = agreement.counts()
    return Collected(
        statistics=sums.statistics(pictures.name),
        score=sums.score(),
        classes=pictures.classes,
        right=right,
        judged=judged,
        left_out=agreement.left_out(),
        seconds=time.perf_counter() - begun,
    )


@contextlib.contextmanager
def _all_or_none() -> Iterator[None]:
    """What goes wrong within on one process is raised by all: none waits for sums that will never come."""
    mine: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = error
    ended = distributed.all_gather_object(None if mine is None else (str(mine), isinstance(mine, BrokenLatents)))
    if mine is not None:
        raise mine
    for said, broken in filter(None, ended):
        raise BrokenLatents(said) if broken else ValueError(said)


class _Sums:
    """What is kept of the pictures seen."""

    def __init__(self, extractor: Extractor, total: int, wanted: MetricOptions) -> None:
        if total < 2:
            raise ValueError(f"pictures: got {total}, expected at least 2")
        self.extractor, self.total, self.wanted = extractor, total, wanted
        self.moments = Moments(extractor.width)
        self.scores: ScoreSums | None = None
        self.kept: list[Tensor] = []
        self.size: tuple[int, int] | None = None

    def add(self, part: ImageBatch) -> Features:
        size = (part.images.shape[2], part.images.shape[3])
        self.size = self.size or size
        if size != self.size:
            raise ValueError(f"pictures: got {_all((self.size, size))} pixels (height, width), expected one size")
        found = self.extractor(part.images)
        values = found.values.cpu()
        self.moments.update(values)
        if self.wanted.features:
            self.kept.append(values)
        if self.extractor.scores:
            assert found.logits is not None
            if self.scores is None:
                self.scores = self._score_sums(found.logits.shape[1])
            self.scores.update(found.logits.cpu(), part.indices)
        return found

    def _score_sums(self, classes: int) -> ScoreSums:
        return ScoreSums(min(self.wanted.splits, self.total), classes, self.total)

    def statistics(self, source: str) -> FeatureStats:
        sizes = {found: None for found in distributed.all_gather_object(self.size) if found is not None}
        if len(sizes) > 1:
            raise ValueError(f"{source}: got pictures of {_all(sizes)} pixels (height, width), expected one size")
        about = StatsProvenance(self.extractor.name, self.extractor.fingerprint, next(iter(sizes)), source)
        merged = self.moments.gather()
        features = None
        if self.wanted.features:
            features = gather_rows(torch.cat([*self.kept, torch.empty(0, self.extractor.width)]))
        return FeatureStats(merged.mean, merged.covariance, merged.count, features, about)

    def score(self) -> tuple[float, float] | None:
        if not self.extractor.scores:
            return None
        classes = max(distributed.all_gather_object(self.scores.classes if self.scores else 0))
        return (self.scores or self._score_sums(classes)).gather().score()


def compare(
    collected: Collected,
    reference: FeatureStats,
    extractor: Extractor,
    wanted: MetricOptions,
    held_out: HeldOut | None = None,
) -> Report:
    """What `collected` is beside `reference`. ValueError where they can't be compared, or features are missing.

    Where neighbours are wanted, `held_out` says how near is near: without it no share of copies is reported.
    """
    own = collected.statistics
    if own.about is not None and reference.about is not None:
        check_comparable(own.about, reference.about)
    score, spread = collected.score or (None, None)
    return Report(
        metric=extractor.metric,
        distance=metrics.frechet_distance(own, reference),
        count=own.count,
        reference_count=reference.count,
        inception_score=score,
        inception_score_std=spread,
        seconds=collected.seconds,
        warnings=(
            *sanity_warnings(own, reference, extractor.metric),
            *(held_out.doubts() if held_out else ()),
            *_unjudged(collected),
        ),
        **_from_features(own.features, reference.features, wanted, held_out),
        **_from_classes(collected),
    )


def _from_features(
    own: Tensor | None, reference: Tensor | None, wanted: MetricOptions, held_out: HeldOut | None
) -> dict[str, Any]:
    if not wanted.features:
        return {}
    if own is None or reference is None:
        raise ValueError(
            "KID, precision, recall and neighbours need the features of the reference's pictures, and it has only "
            "their mean and covariance: give the pictures, or statistics that `mar stats --keep-features` made"
        )
    found: dict[str, Any] = {}
    if wanted.kernel:
        subset = min(KERNEL_SUBSET, len(own), len(reference))
        mean, error = metrics.kernel_distance(reference, own, KERNEL_SUBSETS, subset, seed=0)
        found |= {"kernel_distance": mean, "kernel_distance_error": error}
    if wanted.precision:
        precision, recall = metrics.precision_recall(reference, own)
        found |= {"precision": precision, "recall": recall}
    if wanted.neighbours:
        distances, numbers = metrics.nearest_neighbors(reference, own)
        found |= {"neighbour_distance": float(distances.quantile(0.5)), "pairs": closest(distances, numbers)}
        if held_out is not None:
            found |= {"held_out_distance": held_out.median, "copies": share_of_copies(distances, held_out)}
    return found


def _from_classes(collected: Collected) -> dict[str, Any]:
    classes = zip(collected.right, collected.judged, collected.classes, strict=False)  # no judge, no counts
    shares = [(right / judged, name) for right, judged, name in classes if judged]
    if not shares:
        return {}
    lowest, worst = min(shares)
    mean = sum(collected.right) / sum(collected.judged)
    return {"agreement": mean, "worst_class": worst, "worst_agreement": lowest}


def _unjudged(collected: Collected) -> tuple[str, ...]:
    """One line where class agreement says nothing of some classes."""
    names = collected.left_out
    if not names or not sum(collected.judged):
        return ()
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"class agreement leaves out {len(names):,} of {len(collected.classes):,} classes, which the classifier does "
        f"not know: {shown}",
    )


def sanity_warnings(own: FeatureStats, reference: FeatureStats, metric: str) -> tuple[str, ...]:
    """Why the distance is not what it seems, one line each."""
    width, said = len(own.mean), []
    for count, whose in ((own.count, "pictures"), (reference.count, "reference pictures")):
        if count is not None and count <= width:
            said.append(
                f"{count:,} {whose} for {width:,} features: the covariance is singular and {metric} too large; "
                f"compare it only with others of as many pictures, or take more than {width:,}"
            )
    for about, whose in ((own.about, "the file of statistics"), (reference.about, "the reference")):
        if about is None:
            said.append(f"{whose} does not say what it was made with: that its features are the same ones is assumed")
    return tuple(said)


def _all(sizes: Iterable[tuple[int, int]]) -> str:
    return " and ".join(f"{height}x{width}" for height, width in sizes)
