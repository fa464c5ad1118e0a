"""One pass over pictures gives the numbers that all their features at once give, whatever the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import extractors
import pytest
import torch
from torch import Tensor

from mar.assets import FASHION_CLASSES, imagenet_classes
from mar.evaluation import metrics
from mar.evaluation.class_accuracy import match_classes
from mar.evaluation.evaluate import MetricOptions, Report, collect, compare
from mar.evaluation.features import Extractor
from mar.evaluation.image_sets import ImageBatch
from mar.evaluation.statistics import FeatureStats
from mar.random import make_generator
from mar.sampling.sinks.folder import class_folders

ALL = MetricOptions(kid=True, precision=True, splits=3)


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mar.evaluation.evaluate.KID_SUBSETS", 5)


class Held:
    """Pictures in memory."""

    name = "held"

    def __init__(self, images: Tensor, labels: list[int] | None = None, classes: tuple[str, ...] = ()) -> None:
        self.images, self.classes = images, classes
        self.labels = torch.tensor(labels if labels is not None else [-1] * len(images))

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        for start in range(first, end, batch):
            part = slice(start, min(start + batch, end))
            yield ImageBatch(self.images[part], torch.arange(start, part.stop), self.labels[part])


def pictures(count: int = 50, seed: int = 0, size: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=make_generator(seed)).to(torch.uint8)


def gray(*levels: int) -> Tensor:
    return torch.tensor(levels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


def judged(extractor: Extractor, own: Held, reference: Held, wanted: MetricOptions = ALL, batch: int = 64) -> Report:
    statistics = collect(reference, extractor, options=wanted, batch=batch).statistics
    return compare(collect(own, extractor, options=wanted, batch=batch), statistics, extractor, wanted)


def test_collect_in_batches_matches_all_at_once() -> None:
    extractor, own, real = extractors.tiny(), pictures(), pictures(40, seed=1)
    report = judged(extractor, Held(own), Held(real), batch=7)
    mine, theirs = extractor(own), extractor(real)
    assert mine.logits is not None

    def moments(values: Tensor) -> FeatureStats:
        return FeatureStats(values.double().mean(0), torch.cov(values.double().T))

    expected = metrics.frechet_distance(moments(mine.values), moments(theirs.values))
    assert report.metric == "FD (tiny)"
    assert report.distance == pytest.approx(expected, rel=1e-5)
    score = metrics.inception_score(mine.logits, 3)
    assert (report.inception_score, report.inception_score_std) == pytest.approx(score, rel=1e-5)
    kernel = metrics.kernel_distance(theirs.values, mine.values, 5, 40, seed=0)
    assert (report.kernel_distance, report.kernel_distance_error) == pytest.approx(kernel, rel=1e-4)
    assert (report.precision, report.recall) == metrics.precision_recall(theirs.values, mine.values)
    assert (report.count, report.reference_count) == (50, 40)
    assert report.warnings == ()


@pytest.mark.parametrize("batch", [1, 7, 50, 1000])
def test_collect_is_independent_of_batch_size(batch: int) -> None:
    sets = Held(pictures()), Held(pictures(40, seed=1))
    one, other = judged(extractors.tiny(), *sets, batch=16), judged(extractors.tiny(), *sets, batch=batch)
    for name in ("distance", "inception_score", "inception_score_std", "kernel_distance", "kernel_distance_error"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5)
    assert (one.precision, one.recall) == (other.precision, other.recall)


@pytest.mark.parametrize("count", [3, 50])
def test_compare_set_with_itself_is_zero(count: int) -> None:
    """With fewer pictures than features too, where the covariance is singular."""
    extractor, held = extractors.tiny(), Held(pictures(count))
    reference = collect(held, extractor, batch=7).statistics
    report = compare(collect(held, extractor, batch=64), reference, extractor, MetricOptions())
    assert report.distance <= 1e-6
    assert judged(extractor, held, Held(pictures(count, seed=1)), MetricOptions()).distance > 1e-3


def test_collect_keeps_features_only_if_needed() -> None:
    held, extractor = Held(pictures()), extractors.tiny()
    assert collect(held, extractor).statistics.features is None
    kept = collect(held, extractor, options=MetricOptions(kid=True), batch=7).statistics.features
    assert kept is not None
    torch.testing.assert_close(kept, extractor(held.images).values)


def test_collect_reports_progress() -> None:
    told: list[float] = []
    collect(Held(pictures(10)), extractors.tiny(), batch=4, advance=told.append)
    assert told == [4, 8, 10]


def test_compare_fewer_images_than_features_warns() -> None:
    report = judged(extractors.tiny(), Held(pictures(6)), Held(pictures(7)), MetricOptions())
    (said,) = report.warnings
    assert "6 pictures for 6 features" in said
    assert "singular" in said
    assert "more than 6" in said
    (said,) = judged(extractors.tiny(), Held(pictures(7)), Held(pictures(5)), MetricOptions()).warnings
    assert "5 reference pictures" in said


def test_compare_unnamed_reference_warns() -> None:
    extractor, held = extractors.tiny(), Held(pictures())
    found = collect(held, extractor)
    bare = replace(found.statistics, count=None, provenance=None)
    report = compare(found, bare, extractor, MetricOptions())
    assert report.distance <= 1e-6
    assert ("pictures", "50 against unknown") in report.lines()
    assert [w for w in report.warnings if "the reference does not say" in w]
    back = compare(replace(found, statistics=bare), found.statistics, extractor, MetricOptions())
    assert back.count is None
    assert ("pictures", "unknown against 50") in back.lines()
    assert [w for w in back.warnings if "the file of statistics does not say" in w]


@pytest.mark.parametrize(
    ("theirs", "size", "words"),
    [
        (extractors.other, 6, "other"),
        (extractors.retrained, 6, "other weights or preprocessing"),
        (extractors.tiny, 8, "(8, 8)"),
    ],
)
def test_compare_incompatible_statistics_is_refused(theirs: type, size: int, words: str) -> None:
    reference = collect(Held(pictures(size=size)), theirs()).statistics
    own = extractors.tiny()
    with pytest.raises(ValueError, match="can't be compared") as refused:
        compare(collect(Held(pictures()), own), reference, own, MetricOptions())
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_compare_without_reference_features_is_refused() -> None:
    extractor, held = extractors.tiny(), Held(pictures())
    reference = collect(held, extractor).statistics
    with pytest.raises(ValueError, match="--keep-features"):
        compare(collect(held, extractor, options=ALL), reference, extractor, ALL)


def test_collect_too_few_images_or_splits_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1, expected at least 2"):
        collect(Held(pictures(1)), extractors.tiny())
    with pytest.raises(ValueError, match="splits: got 0"):
        MetricOptions(splits=0)
    assert (
        collect(Held(pictures(2)), extractors.tiny(), options=MetricOptions(splits=10)).inception_score is not None
    )  # takes two splits


def test_collect_mixed_sizes_is_refused() -> None:
    class Growing(Held):
        def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
            for part in super().batches(batch, first, end):
                side = 6 + int(part.indices[0])
                yield replace(part, images=part.images[:, :, :1, :1].expand(-1, -1, side, side))

    with pytest.raises(ValueError, match="6x6 and 10x10"):
        collect(Growing(pictures()), extractors.tiny(), batch=4)


# ---- classes


def test_class_numbers_match_names_in_any_order() -> None:
    numbers = match_classes(("ant", "Bee", "cat"), ("CAT", "dog", "ant"))
    assert numbers is not None
    assert numbers.tolist() == [2, -1, 0]
    assert match_classes(("ant",), ("dog",)) is None
    assert match_classes((), ("dog",)) is None
    assert match_classes(("ant",), ()) is None


def test_class_numbers_match_folders_of_generated_images() -> None:
    for names in (FASHION_CLASSES, imagenet_classes(), ("a/b", "a b", "none")):
        by_number = class_folders(names)
        folders = tuple(by_number[i] for i in range(len(names)))
        for theirs, judges_ in ((folders, names), (names, folders), (names, names)):
            numbers = match_classes(theirs, judges_)
            assert numbers is not None
            assert numbers.tolist() == list(range(len(names)))  # ImageNet has two classes called crane
    some = match_classes(("Ankle-boot", "t-shirt-TOP"), FASHION_CLASSES)
    assert some is not None
    assert some.tolist() == [1, *[-1] * 8, 0]


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("as_classifier", [False, True])
def test_class_accuracy_maps_classes_by_name(batch: int, as_classifier: bool) -> None:
    images = gray(0, 0, 255, 255, 255, 128)
    labels, classes = [1, 2, 0, 0, 2, 2], ("Bright", "dark", "middling")  # right: yes, no, yes, yes, no, yes
    held, judge = Held(images, labels, classes), extractors.brightness()
    extractor, classifier = (extractors.tiny(), judge) if as_classifier else (judge, None)
    found = collect(held, extractor, classifier=classifier, batch=batch)
    assert found.correct == (2, 1, 1)
    assert found.total == (2, 1, 3)
    report = compare(found, found.statistics, extractor, MetricOptions())
    assert report.class_accuracy == pytest.approx(4 / 6)
    assert (report.worst_class, report.worst_class_accuracy) == ("middling", pytest.approx(1 / 3))


def test_class_accuracy_ignores_unknown_classes() -> None:
    images, classes = gray(0, 255, 255, 0), ("dark", "bright", "purple", "middling")
    found = collect(Held(images, [0, 0, 2, -1], classes), extractors.brightness())
    assert found.correct == (1, 0, 0, 0)
    assert found.total == (2, 0, 0, 0)
    report = compare(found, found.statistics, extractors.brightness(), MetricOptions())
    assert (report.class_accuracy, report.worst_class) == (0.5, "dark")  # not one without pictures
    assert "leaves out 1 of 4 classes, which the classifier does not know: purple" in report.warnings[-1]


def test_class_accuracy_without_labels_is_none() -> None:
    found = collect(Held(gray(0, 255, 9), classes=("dark", "bright")), extractors.brightness())
    report = compare(found, found.statistics, extractors.brightness(), MetricOptions())
    assert report.class_accuracy is None
    assert report.worst_class is None


@pytest.mark.parametrize(("classes", "words"), [(("ant", "bee"), "ant, bee"), ((), "no class names")])
def test_class_accuracy_without_shared_classes_is_refused(classes: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match="brightness knows the classes dark, middling, bright") as refused:
        collect(Held(gray(0, 1), classes=classes), extractors.tiny(), classifier=extractors.brightness())
    assert words in str(refused.value)


# ---- reports


def test_report_is_valid_json() -> None:
    report = Report("FD", 1.5, 10, None, seconds=math.nan, kernel_distance=0.1, kernel_distance_error=math.nan)
    back = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert back["seconds"] is None
    assert back["kernel_distance_error"] is None
    assert (back["distance"], back["count"], back["reference_count"]) == (1.5, 10, None)
    assert back["warnings"] == []


def test_report_as_text_has_every_number() -> None:
    report = Report(
        "FD (x)", 12.34567, 1000, 20000, inception_score=9.87654, inception_score_std=0.1234, precision=0.5,
        recall=0.25, class_accuracy=0.98765, worst_class="cat", worst_class_accuracy=0.5, seconds=1.25,
    )  # fmt: skip
    said = dict(report.lines())
    assert said["FD (x)"] == "12.35"
    assert said["Inception Score"] == "9.877 ± 0.12"
    assert said["recall"] == "0.2500"
    assert said["of the class asked for"] == "98.77%"
    assert said["the same, the worst class"] == "50.00% (cat)"
    assert said["pictures"] == "1,000 against 20,000"
