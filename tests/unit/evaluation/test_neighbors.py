"""Copies of learned pictures are told from pictures that are new, by what held-out pictures do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import extractors
import numpy as np
import pytest
import torch
from torch import Tensor

from mar.evaluation import metrics
from mar.evaluation.evaluate import Collected, MetricOptions, Report, collect, compare
from mar.evaluation.image_sets import ImageBatch
from mar.evaluation.neighbors import NUM_PAIRS, HeldOut, Pair, closest_pairs, pair_grid, share_of_copies
from mar.evaluation.statistics import FeatureStats
from mar.evaluation.sweep import Table
from mar.random import make_generator

WANTED = MetricOptions(neighbors=True)
MANY = 3000


def drawn(seed: int, count: int = MANY) -> Tensor:
    return torch.randn(count, 6, generator=make_generator(seed, 5))


def statistics(features: Tensor) -> FeatureStats:
    return FeatureStats(features.double().mean(0), torch.cov(features.double().T), len(features), features)


def judged(own: Tensor, learned: Tensor, held_out: Tensor) -> Report:
    reference = statistics(learned)
    measure = HeldOut.of(statistics(held_out), reference)
    return compare(Collected(statistics(own)), reference, extractors.tiny(), WANTED, measure)


def test_copied_training_images_are_all_counted() -> None:
    learned = drawn(0)
    report = judged(learned.flip(0)[:1000], learned, drawn(1))
    assert report.copies == 1
    assert report.neighbor_distance == 0
    assert report.pairs == tuple(Pair(i, MANY - 1 - i, 0.0) for i in range(NUM_PAIRS))
    hardly_changed = learned + 1e-3 * drawn(2)
    assert judged(hardly_changed, learned, drawn(1)).copies == 1


def test_independent_images_are_copies_in_one_percent() -> None:
    report = judged(drawn(2), drawn(0), drawn(1))
    assert report.copies == pytest.approx(0.01, abs=0.006)  # three standard deviations: both sides are drawn
    assert report.neighbor_distance == pytest.approx(report.held_out_distance, rel=0.03)
    assert report.neighbor_distance == float(metrics.nearest_neighbors(drawn(0), drawn(2))[0].quantile(0.5))


def test_copies_among_new_images_are_counted() -> None:
    learned = drawn(0)
    report = judged(torch.cat([drawn(2)[:2000], learned[:500]]), learned, drawn(1))
    assert report.copies == pytest.approx(0.2 + 0.8 * 0.01, abs=0.006)
    assert [pair.picture for pair in report.pairs] == list(range(2000, 2000 + NUM_PAIRS))
    assert [pair.reference for pair in report.pairs] == list(range(NUM_PAIRS))


def test_copy_threshold_is_the_first_percentile() -> None:
    """On a line: held-out pictures at distances 1, 2, ..., 201 of the nearer learned one of two."""
    learned, held_out = torch.tensor([[0.0], [1000.0]]), -torch.arange(1.0, 202.0)[:, None]
    held_out[::2] = 1000 - held_out[::2]

    def line(rows: Tensor) -> FeatureStats:
        return FeatureStats(torch.zeros(1).double(), torch.ones(1, 1).double(), len(rows), rows)

    found = HeldOut.of(line(held_out), line(learned))
    assert (found.count, found.median) == (201, 101)
    assert found.copy_distance == pytest.approx(3, rel=1e-12)  # the third of 201: 1% of 200 gaps are below it
    assert share_of_copies(torch.tensor([0.0, 2.9, 3.1, 400.0]).double(), found) == 0.5
    assert found.sanity_warnings() == ()


def test_nearest_pairs_are_sorted_stably() -> None:
    distances, numbers = torch.tensor([3.0, 1.0, 2.0, 1.0]).double(), torch.tensor([4, 5, 6, 7])
    assert closest_pairs(distances, numbers, 3) == (Pair(1, 5, 1.0), Pair(3, 7, 1.0), Pair(2, 6, 2.0))
    assert len(closest_pairs(distances, numbers)) == 4


def test_few_held_out_images_warn() -> None:
    (said,) = [w for w in judged(drawn(2), drawn(0), drawn(1, 99)).warnings if "held-out" in w]
    assert "99 held-out pictures" in said
    assert not [w for w in judged(drawn(2), drawn(0), drawn(1, 100)).warnings if "held-out" in w]


def test_held_out_images_in_training_data_warn() -> None:
    learned, new = drawn(0), drawn(1)
    one_in_fifty = new.clone()
    one_in_fifty[::50] = learned[:60] * (1 + 1e-7)
    with pytest.raises(ValueError, match=r"held-out pictures .* are in the reference .* itself") as refused:
        HeldOut.of(statistics(one_in_fifty), statistics(learned))
    assert "\n" not in str(refused.value)
    one_in_thousand = new.clone()
    one_in_thousand[::1000] = learned[:3]
    assert HeldOut.of(statistics(one_in_thousand), statistics(learned)).copy_distance > 0.1


class Held:
    """Pictures in memory."""

    name, classes = "held", ()

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        for start in range(first, end, batch):
            part = slice(start, min(start + batch, end))
            indices = torch.arange(start, part.stop)
            yield ImageBatch(self.images[part], indices, torch.full_like(indices, -1))


def pictures(seed: int, count: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, channels, 6, 6), generator=make_generator(seed)).to(torch.uint8)


def test_neighbors_of_images_are_in_the_report() -> None:
    extractor = extractors.tiny()
    learned, held_out = pictures(0, 150), pictures(1, 120)
    own = torch.cat([pictures(2, 30), learned[70:80]])
    reference, others = (collect(Held(images), extractor, options=WANTED).statistics for images in (learned, held_out))
    found = collect(Held(own), extractor, options=WANTED, batch=7)
    report = compare(found, reference, extractor, WANTED, HeldOut.of(others, reference))
    distances, usual = (
        metrics.nearest_neighbors(extractor(learned).values, extractor(images).values)[0].double()
        for images in (own, held_out)
    )
    assert report.copies == float((distances < usual.quantile(0.01)).double().mean()) >= 0.25
    assert report.neighbor_distance == pytest.approx(float(distances.quantile(0.5)), rel=1e-4)
    assert report.held_out_distance == pytest.approx(float(usual.quantile(0.5)), rel=1e-4)
    assert {(pair.picture - 30, pair.reference - 70) for pair in report.pairs} <= {(i, i) for i in range(10)}
    said = dict(report.lines())
    assert said["copies"] == f"{report.copies:.2%} (nearer than 99% of held-out pictures)"
    assert said["nearest reference picture"] == f"{report.neighbor_distance:.4g} (median)"
    back = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert back["pairs"][0] == report.pairs[0]._asdict()
    alone = compare(found, reference, extractor, WANTED)
    assert (alone.copies, alone.held_out_distance) == (None, None)
    assert (alone.neighbor_distance, alone.pairs) == (report.neighbor_distance, report.pairs)
    assert "copies" not in dict(alone.lines())
    unasked = compare(found, reference, extractor, MetricOptions())
    assert (unasked.neighbor_distance, unasked.pairs) == (None, ())


def test_neighbors_invalid_input_is_refused() -> None:
    extractor = extractors.tiny()
    kept, bare = (
        collect(Held(pictures(0, 30)), extractor, options=wanted).statistics for wanted in (WANTED, MetricOptions())
    )
    with pytest.raises(ValueError, match="neighbors need the features"):
        compare(Collected(kept), bare, extractor, WANTED)
    with pytest.raises(ValueError, match="expected all features on both sides"):
        HeldOut.of(bare, kept)
    assert kept.provenance is not None
    other = replace(kept, provenance=replace(kept.provenance, size=(8, 8)))
    with pytest.raises(ValueError, match="can't be compared"):
        HeldOut.of(other, kept)


def test_sweep_table_has_the_share_of_copies_only(tmp_path: Path) -> None:
    table = Table(tmp_path, {})
    table.add({"guidance_scale": 1.0}, judged(drawn(2), drawn(0), drawn(1)))
    assert {"copies", "neighbour_distance", "held_out_distance"} < set(table.columns())
    assert "pairs" not in table.columns()


def test_neighbor_sheet_shows_image_and_neighbor() -> None:
    own, learned = pictures(0, 5, channels=1), pictures(1, 9)
    pairs = (Pair(4, 8, 0.1), Pair(0, 2, 0.2), Pair(1, 8, 0.3))
    found = pair_grid(pairs, Held(own), Held(learned))
    scale = 112 // 6
    assert found.size == (2 * 6 * scale, 3 * 6 * scale)
    shown = torch.from_numpy(np.asarray(found)[::scale, ::scale].copy()).permute(2, 0, 1)
    for row, pair in enumerate(pairs):
        left, right = shown[:, 6 * row : 6 * row + 6].split(6, dim=2)
        assert torch.equal(left, own[pair.picture].expand(3, -1, -1))
        assert torch.equal(right, learned[pair.reference])
