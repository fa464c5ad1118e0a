"""Pictures -> features -> numbers, in one pass over any number of processes; and what reference they are held against.

Source of the metrics: `metrics.py`. Whoever calls this on several processes has a process group
(`runtime.process_group`); each walks through its share, and all get the same result.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mar import runtime
from mar.evaluation import metrics
from mar.evaluation.features import Extractor, Features
from mar.evaluation.metrics import ScoreSums
from mar.evaluation.statistics import About, Moments, Statistics, check_comparable, gather_rows, sum_over_ranks
from mar.evaluation.streams import Pictures, PictureSet, share

Advance = Callable[[float], None]
"""Takes how many of this process's pictures are done."""

KERNEL_SUBSETS, KERNEL_SUBSET = 100, 1000
"""Subsets of KID and the pictures in each, as torch-fidelity's and torchmetrics' defaults."""


@dataclass(frozen=True)
class Wanted:
    """Which numbers to compute beside the Fréchet distance and, where the network has it, the Inception Score."""

    kernel: bool = False
    """KID, with its standard error. Keeps all features."""
    precision: bool = False
    """Precision and recall. Keeps all features."""
    splits: int = 10
    """Parts over which the Inception Score is averaged; 10 in published figures."""

    @property
    def features(self) -> bool:
        """Whether all features have to be kept."""
        return self.kernel or self.precision


@dataclass(frozen=True, eq=False)
class Collected:
    """What is left of a set of pictures."""

    statistics: Statistics
    score: tuple[float, float] | None
    """Inception Score: mean and standard deviation over the splits."""
    agreement: tuple[float, ...] | None
    """For each class the share of its pictures that the judge takes for it; nan where there were none."""
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    """Pictures of each class; empty where there are no classes."""
    seconds: float


@dataclass(frozen=True)
class Report:
    """The judgement. `metric` is the name of `distance`: FID only for the network and weights that papers use."""

    metric: str
    distance: float
    count: int
    reference_count: int | None
    inception_score: float | None = None
    inception_score_std: float | None = None
    kernel_distance: float | None = None
    kernel_distance_error: float | None = None
    precision: float | None = None
    recall: float | None = None
    agreement: float | None = None
    worst_class: str | None = None
    worst_agreement: float | None = None
    seconds: float = math.nan
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; None where something was not measured."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "warnings": list(self.warnings)}

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people to read."""
        found = [(self.metric, f"{self.distance:.4g}")]
        if self.inception_score is not None:
            found.append(("Inception Score", f"{self.inception_score:.4g} ± {self.inception_score_std:.2g}"))
        if self.kernel_distance is not None:
            found.append(("kernel distance (KID)", f"{self.kernel_distance:.4g} ± {self.kernel_distance_error:.2g}"))
        if self.precision is not None:
            found += [("precision", f"{self.precision:.4f}"), ("recall", f"{self.recall:.4f}")]
        if self.agreement is not None:
            found.append(("of the class asked for", f"{self.agreement:.2%}"))
            found.append(("the same, the worst class", f"{self.worst_agreement:.2%} ({self.worst_class})"))
        against = "an unknown number" if self.reference_count is None else f"{self.reference_count:,}"
        return [*found, ("pictures", f"{self.count:,} against {against}"), ("seconds", f"{self.seconds:.1f}")]


def collect(
    pictures: PictureSet,
    extractor: Extractor,
    *,
    wanted: Wanted | None = None,
    classifier: Extractor | None = None,
    batch: int = 64,
    advance: Advance | None = None,
) -> Collected:
    """Walks once through `pictures`. Memory does not grow with their number unless features are wanted.

    `classifier` judges whether pictures are of the class that was asked for; by default the extractor, where its
    classes are the pictures'. Every process of a group gets the whole result. ValueError for pictures of several sizes.
    """
    wanted = wanted or Wanted()
    judge = classifier or extractor
    table = class_numbers(pictures.classes, judge.classes)
    if classifier is not None and table is None:
        raise ValueError(
            f"{classifier.name} knows the classes {_few(classifier.classes)}, but {pictures.name} has "
            f"{_few(pictures.classes)}: it can't say whether they agree"
        )
    sums = _Sums(extractor, len(pictures), wanted)
    right, asked = torch.zeros(len(pictures.classes)), torch.zeros(len(pictures.classes))
    begun = time.perf_counter()
    first, end = share(len(pictures), runtime.rank(), runtime.world_size())
    for part in pictures.batches(batch, first, end):
        found = sums.add(part)
        if table is not None:
            logits = found.logits if classifier is None else classifier(part.images).logits
            assert logits is not None  # who has classes has logits
            known = part.labels >= 0
            hits = (table[logits.argmax(1).cpu()] == part.labels)[known]
            asked.index_add_(0, part.labels[known], torch.ones(len(hits)))
            right.index_add_(0, part.labels[known], hits.float())
        if advance is not None:
            advance(float(part.indices[-1]) - first + 1)
    right, asked = sum_over_ranks(right), sum_over_ranks(asked)
    judged = table is not None and bool(asked.any())
    return Collected(
        statistics=sums.statistics(pictures.name),
        score=sums.score(),
        agreement=tuple((right / asked).tolist()) if judged else None,
        classes=pictures.classes,
        counts=tuple(asked.int().tolist()),
        seconds=time.perf_counter() - begun,
    )


class _Sums:
    """What is kept of the pictures seen."""

    def __init__(self, extractor: Extractor, total: int, wanted: Wanted) -> None:
        if total < 2:
            raise ValueError(f"pictures: got {total}, expected at least 2")
        self.extractor, self.total, self.wanted = extractor, total, wanted
        self.moments = Moments(extractor.width)
        self.scores: ScoreSums | None = None
        self.kept: list[Tensor] = []
        self.size: tuple[int, int] | None = None

    def add(self, part: Pictures) -> Features:
        size = (part.images.shape[2], part.images.shape[3])
        self.size = self.size or size
        if size != self.size:
            raise ValueError(f"pictures: got one of {size} pixels after one of {self.size}, expected one size")
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

    def statistics(self, source: str) -> Statistics:
        size = next(found for found in runtime.gather(self.size) if found is not None)
        about = About(self.extractor.name, self.extractor.fingerprint, size, source)
        merged = self.moments.gather()
        features = None
        if self.wanted.features:
            features = gather_rows(torch.cat([*self.kept, torch.empty(0, self.extractor.width)]))
        return Statistics(merged.mean, merged.covariance, merged.count, features, about)

    def score(self) -> tuple[float, float] | None:
        if not self.extractor.scores:
            return None
        classes = max(runtime.gather(self.scores.classes if self.scores else 0))
        return (self.scores or self._score_sums(classes)).gather().score()


def compare(collected: Collected, reference: Statistics, extractor: Extractor, wanted: Wanted) -> Report:
    """What `collected` is beside `reference`. ValueError where they can't be compared, or features are missing."""
    own = collected.statistics
    assert own.about is not None
    assert own.count is not None
    if reference.about is not None:
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
        warnings=doubts(own, reference, extractor.metric),
        **_from_features(own.features, reference.features, wanted),
        **_from_classes(collected),
    )


def _from_features(own: Tensor | None, reference: Tensor | None, wanted: Wanted) -> dict[str, Any]:
    if not wanted.features:
        return {}
    if own is None or reference is None:
        raise ValueError(
            "KID, precision and recall need the features of the reference's pictures, and it has only their mean and "
            "covariance: give the pictures, or statistics that `mar stats --keep-features` made"
        )
    found: dict[str, Any] = {}
    if wanted.kernel:
        subset = min(KERNEL_SUBSET, len(own), len(reference))
        mean, error = metrics.kernel_distance(reference, own, KERNEL_SUBSETS, subset, seed=0)
        found |= {"kernel_distance": mean, "kernel_distance_error": error}
    if wanted.precision:
        precision, recall = metrics.precision_recall(reference, own)
        found |= {"precision": precision, "recall": recall}
    return found


def _from_classes(collected: Collected) -> dict[str, Any]:
    shares = collected.agreement
    if shares is None:
        return {}
    known = [(value, i) for i, value in enumerate(shares) if not math.isnan(value)]
    lowest, worst = min(known)
    mean = math.fsum(value * collected.counts[i] for value, i in known) / sum(collected.counts[i] for _, i in known)
    return {"agreement": mean, "worst_class": collected.classes[worst], "worst_agreement": lowest}


def doubts(own: Statistics, reference: Statistics, metric: str) -> tuple[str, ...]:
    """Why the distance is not what it seems, one line each."""
    width, said = len(own.mean), []
    for count, whose in ((own.count, "pictures"), (reference.count, "reference pictures")):
        if count is not None and count <= width:
            said.append(
                f"{count:,} {whose} for {width:,} features: the covariance is singular and {metric} too large; "
                f"compare it only with others of as many pictures, or take more than {width:,}"
            )
    if reference.about is None:
        said.append("the reference does not say what it was made with: that its features are the same ones is assumed")
    return tuple(said)


def class_numbers(theirs: tuple[str, ...], judges: tuple[str, ...]) -> Tensor | None:
    """For each class of the judge its number among `theirs`, -1 where there is none; None where no name is shared."""
    if not theirs or not judges:
        return None
    numbers = {name.casefold(): i for i, name in enumerate(theirs)}
    table = torch.tensor([numbers.get(name.casefold(), -1) for name in judges])
    return table if bool((table >= 0).any()) else None


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "no names"
