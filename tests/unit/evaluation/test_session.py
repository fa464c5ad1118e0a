"""Sessions: references that fit are read or measured once, and a run is evaluated without changing it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import pytest
import torch
from orientations import lay_down
from tiny import tiny_pipeline as untamed
from tiny import write_images
from torch import nn

from mar.evaluation.evaluate import MetricOptions, collect
from mar.evaluation.features import ModuleExtractor
from mar.evaluation.image_sets import ImageSet, open_images
from mar.evaluation.session import OnlineEvaluator, open_either
from mar.evaluation.statistics import FeatureStats
from mar.pipeline import Pipeline


def pipeline(seed: int = 0) -> Pipeline:
    """A model of noise, but never of too much."""
    made = untamed(seed)
    made.sampling = replace(made.sampling, x0_bound=1.0)
    return made


def extractor() -> ModuleExtractor:
    return ModuleExtractor(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), "pooled", recipe="2 x 2 means")


def test_evaluator_same_model_same_result(tmp_path: Path) -> None:
    judge = OnlineEvaluator(extractor(), str(write_images(tmp_path)), count=7, batch=3)
    first, again, other = judge(pipeline()), judge(pipeline()), judge(pipeline(seed=1))
    assert first.distance == again.distance > 0
    assert other.distance != first.distance
    assert (first.count, first.reference_count) == (7, 20)


def test_evaluator_measures_the_reference_once(tmp_path: Path) -> None:
    judge = OnlineEvaluator(extractor(), str(write_images(tmp_path)), count=4)
    judge(pipeline())
    measured = judge.measure_reference(pipeline().image_size)
    assert measured.provenance is not None
    assert measured.provenance.size == pipeline().image_size
    judge(pipeline())
    assert judge.measure_reference(pipeline().image_size) is measured


def test_evaluator_sees_the_reference_as_the_run_does(tmp_path: Path) -> None:
    upright, lying = write_images(tmp_path / "a"), lay_down(write_images(tmp_path / "b"))
    expected = OnlineEvaluator(extractors.tiny(), str(upright), count=4)(pipeline()).distance
    found = [OnlineEvaluator(extractors.tiny(), str(lying), 4, upright=told)(pipeline()) for told in (True, False)]
    assert found[0].distance == expected
    assert found[1].distance != pytest.approx(expected)


def test_evaluator_prefers_the_test_split(tmp_path: Path) -> None:
    parted = tmp_path / "parted"
    write_images(parted / "train", 8)
    assert OnlineEvaluator(extractor(), str(parted), count=4)(pipeline()).reference_count == 8
    write_images(parted / "test", 6)
    assert OnlineEvaluator(extractor(), str(parted), count=4)(pipeline()).reference_count == 6


def test_evaluator_takes_statistics_as_reference(tmp_path: Path) -> None:
    judge = OnlineEvaluator(extractor(), str(write_images(tmp_path / "pictures")), count=5)
    distance = judge(pipeline()).distance
    judge.measure_reference(pipeline().image_size).save(tmp_path / "stats.npz")
    again = OnlineEvaluator(extractor(), str(tmp_path / "stats.npz"), count=5)(pipeline()).distance
    assert again == pytest.approx(distance, rel=1e-9)


def test_evaluator_keeps_global_random_state(tmp_path: Path) -> None:
    judge, model = OnlineEvaluator(extractor(), str(write_images(tmp_path)), count=4), pipeline()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    judge(model)
    assert torch.equal(torch.rand(4), expected)


def test_evaluator_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1, expected at least 2"):
        OnlineEvaluator(extractor(), "fashion", count=1)


# --- statistics by name


def adm(path: Path, width: int = extractors.WIDTH) -> str:
    np.savez(path, mu=np.zeros(width), sigma=np.eye(width))
    return str(path)


@pytest.fixture
def samples(tmp_path: Path) -> str:
    return str(write_images(tmp_path / "pictures", 9))


@pytest.fixture
def statistics(samples: str, tmp_path: Path) -> str:
    """Of the pictures, without their features."""
    collect(open_images(samples), extractors.tiny()).statistics.save(tmp_path / "statistics.npz")
    return str(tmp_path / "statistics.npz")


def test_reference_is_read_or_measured(samples: str, statistics: str) -> None:
    read = open_either(statistics, extractors.tiny(), MetricOptions())
    assert isinstance(read, FeatureStats)
    options, done = MetricOptions(kid=True), list[float]()
    opened = open_either(samples, extractors.tiny(), options)
    assert not isinstance(opened, FeatureStats)
    measured = collect(opened, extractors.tiny(), options=options, batch=2, advance=done.append).statistics
    torch.testing.assert_close(read.mean, measured.mean)
    torch.testing.assert_close(read.covariance, measured.covariance)
    assert (read.count, measured.count) == (9, 9)
    assert read.features is None
    assert measured.features is not None
    assert done[-1] == 9
    opened = open_either(samples, extractors.tiny(), MetricOptions(), limit=4)
    assert not isinstance(opened, FeatureStats)
    assert len(opened) == 4


def refused(
    spec: str, options: MetricOptions | None = None, size: tuple[int, int] | None = None, by: Any = None
) -> str:
    """What is said of statistics that can't be used."""
    with pytest.raises(ValueError, match=r"\.npz") as said:
        open_either(spec, by or extractors.tiny(), options or MetricOptions(), size=size)
    assert "\n" not in str(said.value)
    return str(said.value)


def test_reference_of_another_extractor_is_refused(statistics: str, tmp_path: Path) -> None:
    assert "7 features, expected 6 of tiny" in refused(adm(tmp_path / "adm.npz", width=7))
    assert "features of tiny and of other" in refused(statistics, by=extractors.other())
    assert "other weights or preprocessing" in refused(statistics, by=extractors.retrained())
    assert "(8, 8) and (4, 4)" in refused(statistics, size=(4, 4))
    assert "KID, precision, recall and neighbors need the features" in refused(statistics, MetricOptions(kid=True))
    assert "--keep-features" in refused(adm(tmp_path / "adm.npz"), MetricOptions(precision=True))
    found: FeatureStats | ImageSet = open_either(statistics, extractors.tiny(), MetricOptions(), size=(8, 8))
    assert isinstance(found, FeatureStats)
