"""What people name is told apart, and opened or refused in one line before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import judges
import numpy as np
import pytest
import tiny
import torch

from mar.evaluation import session
from mar.evaluation.evaluate import MetricOptions, collect
from mar.evaluation.image_sets import PictureSet
from mar.evaluation.session import is_pictures, is_statistics, open_either, open_pictures, open_reference
from mar.evaluation.statistics import FeatureStats
from mar.training import run


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def images(count: int = 9, side: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def adm(path: Path, width: int = judges.WIDTH) -> str:
    return npz(path, mu=np.zeros(width), sigma=np.eye(width))


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    return str(tiny.pictures(tmp_path / "pictures", 9))


@pytest.fixture
def statistics(pictures: str, tmp_path: Path) -> str:
    """Of the pictures, without their features."""
    collect(open_pictures(pictures), judges.tiny()).statistics.save(tmp_path / "statistics.npz")
    return str(tmp_path / "statistics.npz")


def test_statistics_and_pictures_are_told_apart(statistics: str, tmp_path: Path) -> None:
    assert is_statistics(statistics)
    assert is_statistics(adm(tmp_path / "adm.npz"))
    assert not is_statistics(npz(tmp_path / "a.npz", arr_0=images()))
    assert not is_statistics(str(tmp_path / "nothing.npz"))
    (tmp_path / "text.npz").write_text("no zip")
    assert not is_statistics(str(tmp_path / "text.npz"))
    damaged = Path(statistics).read_bytes().replace(b"PK\x01\x02", b"XXXX")
    (tmp_path / "damaged.npz").write_bytes(damaged)
    assert not is_statistics(str(tmp_path / "damaged.npz"))


def test_models_and_pictures_are_told_apart(pictures: str, tmp_path: Path) -> None:
    assert is_pictures(pictures)
    assert is_pictures("anything.npz")
    assert is_pictures("anything.parquet")
    for model in ("fashion", "mar-base", "a/model.safetensors", "owner/name", str(tmp_path / "not-there")):
        assert not is_pictures(model)
    (tmp_path / "run").mkdir()
    tiny.pipeline().save(tmp_path / "run" / "model.safetensors")
    assert not is_pictures(str(tmp_path / "run"))


def test_a_bundled_model_is_meant_whatever_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fashion", "mar-base"):
        tiny.pictures(Path(name), 4)
    assert not is_pictures("fashion")
    assert is_pictures("./fashion")
    assert is_pictures("mar-base")  # as to `zoo.load`, for which what is there comes before an official model


def test_samples_of_a_run_are_not_judged(tmp_path: Path) -> None:
    assert session.RUN_FILE == run.RUN_FILE
    tiny.pictures(tmp_path / "young" / "samples", 4)
    (tmp_path / "young" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"young is the folder of a run, .* saved its model\.safetensors"):
        open_pictures(str(tmp_path / "young"))


def test_an_npz_has_its_size(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", arr_0=images())
    assert len(open_pictures(path, size=(8, 8), limit=5)) == 5
    with pytest.raises(ValueError, match=r"a\.npz has pictures of 8x8 pixels, expected 4x4"):
        open_pictures(path, size=(4, 4))
    with pytest.raises(ValueError, match=r"there is no file .*b\.npz"):
        open_pictures(str(tmp_path / "b.npz"))


def test_sources_have_splits_sizes_and_names(pictures: str, tmp_path: Path) -> None:
    found = open_pictures(pictures, size=(4, 4), split="test", limit=5)
    (part,) = found.batches(64, 0, 5)
    assert part.images.shape == (5, 1, 4, 4)
    assert found.name == f"{pictures} (test)"
    assert [len(open_pictures("fashion", split=split)) for split in ("train", "test")] == [10_000, 2_000]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*empty"):
        open_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="does not exist"):
        open_pictures(str(tmp_path / "nowhere"))


def test_a_reference_is_read_or_measured(pictures: str, statistics: str) -> None:
    read = open_reference(statistics, judges.tiny(), MetricOptions())
    told: list[float] = []
    measured = open_reference(pictures, judges.tiny(), MetricOptions(kernel=True), batch=2, advance=told.append)
    torch.testing.assert_close(read.mean, measured.mean)
    torch.testing.assert_close(read.covariance, measured.covariance)
    assert (read.count, measured.count) == (9, 9)
    assert read.features is None
    assert measured.features is not None
    assert told[-1] == 9
    opened = open_either(pictures, judges.tiny(), MetricOptions(), limit=4)
    assert not isinstance(opened, FeatureStats)
    assert len(opened) == 4


def refused(spec: str, wanted: MetricOptions | None = None, size: tuple[int, int] | None = None, by: Any = None) -> str:
    """What is said of statistics that can't be used."""
    with pytest.raises(ValueError, match=r"\.npz") as said:
        open_either(spec, by or judges.tiny(), wanted or MetricOptions(), size=size)
    assert "\n" not in str(said.value)
    return str(said.value)


def test_statistics_that_do_not_fit(statistics: str, tmp_path: Path) -> None:
    assert "7 features, but tiny has 6" in refused(adm(tmp_path / "adm.npz", width=7))
    assert "features of tiny and of other" in refused(statistics, by=judges.other())
    assert "other weights or preprocessing" in refused(statistics, by=judges.retrained())
    assert "(8, 8) and (4, 4)" in refused(statistics, size=(4, 4))
    assert "KID, precision, recall and neighbours need the features" in refused(statistics, MetricOptions(kernel=True))
    assert "--keep-features" in refused(adm(tmp_path / "adm.npz"), MetricOptions(precision=True))
    found: FeatureStats | PictureSet = open_either(statistics, judges.tiny(), MetricOptions(), size=(8, 8))
    assert isinstance(found, FeatureStats)
