"""Judging a run while it learns: the same pictures each time, one reference, and a run left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import pictures
from tiny import pipeline as untamed
from torch import nn

from mar.evaluation.features import ModuleExtractor
from mar.evaluation.session import OnlineEvaluator, has_test_split
from mar.evaluation.statistics import FeatureStats
from mar.pipeline import Pipeline


def pipeline(seed: int = 0) -> Pipeline:
    """A model of noise, but never of too much."""
    made = untamed(seed)
    made.sampling = replace(made.sampling, x0_bound=1.0)
    return made


def extractor() -> ModuleExtractor:
    return ModuleExtractor(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), "pooled", recipe="2 x 2 means")


def test_the_same_model_gets_the_same_judgement_and_another_another(tmp_path: Path) -> None:
    judge = OnlineEvaluator(extractor(), str(pictures(tmp_path)), count=7, batch=3)
    first, again, other = judge(pipeline()), judge(pipeline()), judge(pipeline(seed=1))
    assert first.distance == again.distance > 0
    assert other.distance != first.distance
    assert (first.count, first.reference_count) == (7, 20)


def test_the_reference_is_measured_once_at_the_models_size(tmp_path: Path) -> None:
    judge = OnlineEvaluator(extractor(), str(pictures(tmp_path)), count=4)
    judge(pipeline())
    measured = judge.measured
    assert isinstance(measured, FeatureStats)
    assert measured.about is not None
    assert measured.about.size == pipeline().image_size
    judge(pipeline())
    assert judge.measured is measured


def test_pictures_for_testing_are_taken_where_there_are_any(tmp_path: Path) -> None:
    flat, parted = pictures(tmp_path / "flat", 6), tmp_path / "parted"
    pictures(parted / "train", 8)
    assert has_test_split("fashion")
    assert has_test_split(str(flat))  # the whole folder serves for both
    assert not has_test_split(str(parted))
    assert OnlineEvaluator(extractor(), str(parted), count=4)(pipeline()).reference_count == 8
    pictures(parted / "test", 6)
    assert OnlineEvaluator(extractor(), str(parted), count=4)(pipeline()).reference_count == 6


def test_statistics_serve_as_a_reference(tmp_path: Path) -> None:
    judge = OnlineEvaluator(extractor(), str(pictures(tmp_path / "pictures")), count=5)
    distance = judge(pipeline()).distance
    assert judge.measured is not None
    judge.measured.save(tmp_path / "stats.npz")
    again = OnlineEvaluator(extractor(), str(tmp_path / "stats.npz"), count=5)(pipeline()).distance
    assert again == pytest.approx(distance, rel=1e-9)


def test_nothing_random_is_used_up(tmp_path: Path) -> None:
    judge, model = OnlineEvaluator(extractor(), str(pictures(tmp_path)), count=4), pipeline()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    judge(model)
    assert torch.equal(torch.rand(4), expected)


def test_one_picture_is_no_evaluation() -> None:
    with pytest.raises(ValueError, match="got 1, expected at least 2"):
        OnlineEvaluator(extractor(), "fashion", count=1)
