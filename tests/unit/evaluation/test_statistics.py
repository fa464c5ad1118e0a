"""One pass over features gives their mean and covariance, and a file gives them back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mar import distributed
from mar.checkpoint.files import CheckpointError
from mar.evaluation.statistics import BLOCK, FeatureStats, Moments, StatsProvenance, check_comparable

ABOUT = StatsProvenance("inception", "ab" * 32, (32, 28), "data/train")


def rows(count: int, width: int = 5, seed: int = 0) -> Tensor:
    """Far from 0, where sums of squares lose what differs."""
    return 1000 + torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def moments(values: Tensor, batch: int = 64) -> Moments:
    result = Moments(values.shape[1])
    for part in values.split(batch):
        result.update(part)
    return result


def state(sums: Moments) -> dict[str, int]:
    """How many numbers are held, by name."""
    held = {**vars(sums), **vars(sums._sums)}
    return {name: value.numel() for name, value in held.items() if isinstance(value, Tensor)}


def load_or_say(path: Path) -> FeatureStats | str:
    try:
        return FeatureStats.load(path)
    except ValueError as error:
        return str(error)


def made(count: int = 7, width: int = 3) -> FeatureStats:
    values = rows(count, width)
    seen = moments(values)
    return FeatureStats(seen.mean, seen.covariance, count, values.float(), ABOUT)


@pytest.mark.parametrize("batch", [1, 7, 512, 2000])
def test_moments_are_independent_of_batch_size(batch: int) -> None:
    values = rows(2 * BLOCK + 100)
    seen = moments(values, batch)
    assert seen.count == len(values)
    torch.testing.assert_close(seen.mean, values.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(seen.covariance, torch.cov(values.T), rtol=1e-9, atol=1e-12)
    assert torch.equal(seen.covariance, moments(values, 300).covariance)  # the blocks are the same: every bit is
    assert torch.equal(seen.mean, moments(values, 300).mean)


def test_moments_reading_changes_nothing() -> None:
    values = rows(BLOCK + 300)
    seen = moments(values[:BLOCK])
    for value in values[BLOCK:].split(100):
        assert seen.covariance.isfinite().all()
        seen.update(value)
    assert torch.equal(seen.covariance, moments(values).covariance)


def test_moments_state_has_constant_size() -> None:
    few, many = moments(rows(3)), moments(rows(3 * BLOCK + 5))
    assert state(few) == state(many) == {"mean": 5, "scatter": 25, "_block": 5 * BLOCK}


@pytest.mark.parametrize("cut", [0, 1, 300, 700, 900])
def test_moments_merged_parts_equal_the_whole(cut: int) -> None:
    values = rows(900)
    whole, part, rest = moments(values), moments(values[:cut]), moments(values[cut:])
    part.merge(rest)
    assert part.count == 900
    assert rest.count == 900 - cut
    torch.testing.assert_close(part.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(part.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
    part.update(values[:1])
    torch.testing.assert_close(part.mean, torch.cat([values, values[:1]]).mean(0), rtol=1e-12, atol=0)


def test_moments_sum_in_double_precision() -> None:
    values = rows(100).float()
    torch.testing.assert_close(moments(values).covariance, torch.cov(values.double().T), rtol=1e-9, atol=1e-12)


def test_moments_gather_in_one_process_is_a_copy() -> None:
    seen = moments(rows(3))
    assert seen.gather() is seen
    assert torch.equal(distributed.gather_rows(rows(3)), rows(3))


def test_moments_of_too_few_rows_are_refused() -> None:
    seen = Moments(5)
    with pytest.raises(ValueError, match="no images"):
        _ = seen.mean
    seen.update(rows(1))
    assert torch.equal(seen.mean, rows(1)[0])
    with pytest.raises(ValueError, match="at least 2"):
        _ = seen.covariance
    with pytest.raises(ValueError, match="got features 4 wide, expected 5"):
        seen.update(rows(1, 4))
    with pytest.raises(ValueError, match="got features 4 wide, expected 5"):
        seen.merge(Moments(4))
    seen.update(torch.full((1, 5), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        _ = seen.covariance


def test_statistics_file_round_trip_is_exact(tmp_path: Path) -> None:
    statistics = made()
    path = tmp_path / "new" / "stats.npz"
    statistics.save(path)
    loaded = FeatureStats.load(path)
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.features is not None
    assert statistics.features is not None
    assert loaded.features.dtype == torch.float32
    assert torch.equal(loaded.features, statistics.features)
    assert (loaded.count, loaded.provenance) == (7, ABOUT)
    assert FeatureStats.load(path, features=False).features is None
    assert [file.name for file in path.parent.iterdir()] == ["stats.npz"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_published_file_is_read(tmp_path: Path, dtype: type) -> None:
    mean, covariance = made().mean.numpy().astype(dtype), made().covariance.numpy().astype(dtype)
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance[:2, :2], arr_0=pictures)
    loaded = FeatureStats.load(tmp_path / "adm.npz")
    assert (loaded.count, loaded.features, loaded.provenance) == (None, None, None)
    assert loaded.mean.dtype == loaded.covariance.dtype == torch.float64
    loaded.save(tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:  # as the tools that read ADM's files do
        assert set(again.files) == {"format", "mu", "sigma", "sha256"}
        assert np.array_equal(again["mu"], mean)
        assert np.array_equal(again["sigma"], covariance)


def test_statistics_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.npz"
    made(7).save(path)
    before = path.read_bytes()

    def full(file: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(CheckpointError, match="No space left"):
        made(8).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2), "count": np.array(9)}
BAD = {
    "no sigma": ({"mu": np.zeros(2)}, "no sigma"),
    "pictures": ({"arr_0": np.zeros((1, 2, 2, 3), np.uint8)}, "no mu and no sigma, but images"),
    "nothing": ({}, "no mu and no sigma, but nothing"),
    "mean of two dimensions": (GOOD | {"mu": np.zeros((1, 2))}, r"shapes \(1, 2\)"),
    "other covariance": (GOOD | {"sigma": np.eye(3)}, r"\(2,\) and \(3, 3\)"),
    "no features": (GOOD | {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"\(0,\)"),
    "nan": (GOOD | {"mu": np.array([0, np.nan])}, "mean with values that are not finite"),
    "infinity": (GOOD | {"sigma": np.diag([1, np.inf])}, "covariance with values that are not finite"),
    "asymmetric": (GOOD | {"sigma": np.array([[1.0, 0.5], [0, 1]])}, "not symmetric"),
    "negative": (GOOD | {"sigma": np.diag([1.0, -1])}, "negative variance"),
    "integers": (GOOD | {"mu": np.zeros(2, np.int64)}, "int64"),
    "pickled": (GOOD | {"mu": np.array([None, None])}, "pickle"),
    "one picture": (GOOD | {"count": np.array(1)}, "count of 1"),
    "counts": (GOOD | {"count": np.array([3, 4])}, "array"),
    "endless count": (GOOD | {"count": np.array(np.inf)}, "infinity"),
    "features of others": (GOOD | {"features": np.zeros((8, 2), np.float32)}, r"\(8, 2\), expected \(9, 2\)"),
    "features without count": (
        {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((8, 2), np.float32)},
        r"expected \(count, 2\)",
    ),
    "no JSON": (GOOD | {"about": np.array("{")}, "Expecting"),
    "another record": (GOOD | {"about": np.array('{"a": 1}')}, "expected extractor, fingerprint, size, source"),
    "a size of one": (
        GOOD | {"about": np.array('{"extractor": "", "fingerprint": "", "size": [1], "source": ""}')},
        "unpack",
    ),
    "a later format": (GOOD | {"format": np.array(2)}, "format 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_statistics_wrong_contents_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    arrays, message = BAD[name]
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        FeatureStats.load(tmp_path / "stats.npz")
    assert "\n" not in str(caught.value)
    assert "stats.npz" in str(caught.value)
    assert "mar stats" in str(caught.value)


def test_statistics_damaged_file_is_refused_or_exact(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    statistics = made()
    statistics.save(path)
    whole = path.read_bytes()
    said = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        loaded = load_or_say(path)
        if isinstance(loaded, str):
            said += 1
            assert "\n" not in loaded
            assert "mar stats" in loaded
        else:  # a byte that says nothing, or the name of an array that may be left out
            assert torch.equal(loaded.mean, statistics.mean)
            assert torch.equal(loaded.covariance, statistics.covariance)
    assert said > len(whole) / 3 / 2
    for cut in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"damaged.*make it again"):
            FeatureStats.load(path)


def test_statistics_of_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        FeatureStats.load(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match="no npz file"):
        FeatureStats.load(tmp_path)
    np.save(tmp_path / "stats.npy", np.zeros(3))
    with pytest.raises(ValueError, match="no npz file"):
        FeatureStats.load(tmp_path / "stats.npy")


def test_statistics_invalid_values_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        FeatureStats(torch.full((2,), float("nan")).double(), torch.eye(2).double())
    with pytest.raises(ValueError, match="count of 1"):
        FeatureStats(torch.zeros(2).double(), torch.eye(2).double(), 1)
    with pytest.raises(ValueError, match=r"features of shape \(4, 2\), expected \(5, 2\)"):
        FeatureStats(torch.zeros(2).double(), torch.eye(2).double(), 5, torch.zeros(4, 2))


def test_statistics_of_other_extractors_are_not_compared() -> None:
    check_comparable(ABOUT, dataclasses.replace(ABOUT, source="another folder"))
    for change, message in (
        ({"extractor": "efficientnet-lite0"}, "inception and of efficientnet-lite0"),
        ({"fingerprint": "cd" * 32}, r"other weights or preprocessing \(abababababab, cdcdcdcdcdcd\)"),
        ({"size": (28, 32)}, r"\(32, 28\) and \(28, 32\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check_comparable(ABOUT, dataclasses.replace(ABOUT, source="b", **change))
        assert str(caught.value).startswith("data/train and b can't be compared")


def flips(path: Path) -> tuple[int, int]:
    """Flip 200 bits of a file of statistics, one at a time; how many were refused, and how many changed a thing."""
    whole = path.read_bytes()
    expected = FeatureStats.load(path)
    refused = silent = 0
    for place in np.random.default_rng(3).integers(0, 8 * len(whole), 200).tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            read = FeatureStats.load(path)
        except ValueError:
            refused += 1
        else:
            same = torch.equal(read.mean, expected.mean) and torch.equal(read.covariance, expected.covariance)
            silent += not same or (read.count, read.provenance) != (expected.count, expected.provenance)
    path.write_bytes(whole)
    return refused, silent


def test_statistics_flipped_bit_is_never_silent(tmp_path: Path) -> None:
    FeatureStats(torch.zeros(4).double(), torch.eye(4).double(), 5).save(tmp_path / "s.npz")
    refused, silent = flips(tmp_path / "s.npz")
    assert silent == 0
    assert refused > 50


def test_statistics_that_unpack_to_gigabytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, mu=np.zeros(2000), sigma=np.zeros((2000, 2000)))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"unpack to 32,.* bytes, more than 4 times the file"):
        FeatureStats.load(path)


def test_statistics_without_checksums_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", format=1, mu=np.zeros(2), sigma=np.eye(2), count=3)
    assert FeatureStats.load(tmp_path / "s.npz").count == 3
    np.savez(tmp_path / "s.npz", format=1, mu=np.zeros(2), sigma=np.eye(2), cound=3)
    with pytest.raises(ValueError, match="it holds cound, which mar does not write"):
        FeatureStats.load(tmp_path / "s.npz")
