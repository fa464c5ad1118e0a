"""Metrics against cases done by hand, closed forms, and what torchmetrics and torch-fidelity made of the same."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mar.evaluation import metrics
from mar.evaluation.metrics import (
    ScoreSums,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
)
from mar.evaluation.statistics import FeatureStats, Moments

GOLDEN = Path(__file__).parents[2] / "parity" / "golden" / "metrics"


@cache
def features() -> dict[str, Tensor]:
    return load_file(GOLDEN / "features.safetensors")


@cache
def numbers(library: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "numbers.json").read_text(encoding="utf-8"))[library]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(values: Tensor) -> Moments:
    result = Moments(values.shape[1])
    result.update(values)
    return result


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, with a shorter last part."""
    monkeypatch.setattr(metrics, "CHUNK", 700)


# --- Fréchet distance


@pytest.mark.parametrize("library", ["torchmetrics", "torch-fidelity"])
def test_frechet_distance_matches_torch_fidelity(library: str) -> None:
    real, fake, theirs = features()["real"], features()["fake"], numbers(library)
    assert frechet_distance(moments(real), moments(fake)) == pytest.approx(theirs["fid"], rel=1e-6)
    # fewer rows than features: both covariances are singular
    few = frechet_distance(moments(real[:20]), moments(fake[:20]))
    assert few == pytest.approx(theirs["fid_of_first_20"], rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    zero, one = torch.zeros(2).double(), torch.tensor([3.0, 4.0]).double()
    a = FeatureStats(zero, torch.diag(torch.tensor([4.0, 9.0]).double()))
    b = FeatureStats(one, torch.diag(torch.tensor([1.0, 16.0]).double()))
    assert frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)
    point = FeatureStats(zero, torch.zeros(2, 2).double())
    assert frechet_distance(point, b) == pytest.approx(25 + 17, rel=1e-12)
    assert frechet_distance(point, point) == 0


@pytest.mark.parametrize(("count", "width"), [(1000, 32), (33, 32), (20, 32), (2, 32), (200, 300)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_frechet_distance_to_itself_is_zero(count: int, width: int, scale: float) -> None:
    # the variances of features span many orders of magnitude
    seen = moments(
        5 + scale * drawn(count, width) * torch.logspace(0, -6, width).double() @ drawn(width, width, seed=1)
    )
    assert 0 <= frechet_distance(seen, seen) < 1e-6


def test_frechet_distance_is_symmetric_and_sees_a_shift() -> None:
    a, b = moments(drawn(30, 40)), moments(drawn(50, 40, seed=1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    shifted = FeatureStats(a.mean + 0.1, a.covariance)
    assert frechet_distance(a, shifted) == pytest.approx(40 * 0.01, rel=1e-9)
    with pytest.raises(ValueError, match="40 and 41 wide"):
        frechet_distance(a, moments(drawn(5, 41)))


# --- Inception Score


def score_in_order(logits: Tensor, splits: int) -> tuple[float, float]:
    """The score whose parts are of consecutive rows: rows are given numbers of the first part, then of the next."""
    sums = ScoreSums(splits, logits.shape[1], len(logits))
    sums.update(logits, sums._parts.argsort(stable=True))
    return sums.score()


def test_inception_score_matches_torch_fidelity() -> None:
    logits = features()["logits"]
    for library in ("torchmetrics", "torch-fidelity"):
        assert inception_score(logits)[0] == pytest.approx(numbers(library)["inception_score_1"], rel=1e-9)
    assert score_in_order(logits, 10) == pytest.approx(numbers("torch-fidelity")["inception_score_10"], rel=1e-9)


def test_inception_score_of_the_sure_and_the_unsure() -> None:
    sure = 1000 * torch.eye(4)  # probabilities are 0 and 1 to the last bit
    assert inception_score(sure) == (pytest.approx(4), 0)
    assert inception_score(torch.zeros(5, 4)) == (pytest.approx(1), 0)
    assert score_in_order(torch.cat([sure, torch.zeros(4, 4)]), 2) == (pytest.approx(2.5), pytest.approx(1.5))


def test_inception_score_of_a_set_that_comes_class_by_class() -> None:
    """As it is of one whose classes take turns: nearly the number of classes, and not 1."""
    turns = 1000 * torch.eye(10).repeat(100, 1)
    for logits in (turns, turns[turns.argmax(1).argsort(stable=True)]):
        mean, deviation = inception_score(logits, 10)
        assert 9.4 < mean < 10
        assert deviation < 0.3


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_score_sums_are_independent_of_batches_and_order(batch: int) -> None:
    logits = features()["logits"]
    expected = inception_score(logits, 3)
    in_order, shuffled = ScoreSums(3, 10, 250), ScoreSums(3, 10, 250)
    for part in logits.split(batch):
        in_order.update(part)
    for part in torch.randperm(250, generator=torch.Generator().manual_seed(0)).split(batch):
        shuffled.update(logits[part], part)
    assert in_order.score() == pytest.approx(expected, rel=1e-12)
    assert shuffled.score() == pytest.approx(expected, rel=1e-12)
    assert in_order.count == shuffled.count == 250
    assert in_order.gather() is in_order


def test_score_splits_are_even_and_fixed() -> None:
    sums = ScoreSums(3, 2, 7)
    sums.update(torch.zeros(7, 2))
    assert sums._counts.tolist() == [3, 2, 2]
    assert torch.equal(sums._parts, ScoreSums(3, 5, 7)._parts)
    assert ScoreSums(2, 2, 12)._parts.tolist() != sorted(ScoreSums(2, 2, 12)._parts.tolist())


def test_score_sums_do_not_grow_with_what_is_added() -> None:
    sums = ScoreSums(2, 4, 10**6)

    def held() -> int:
        return sum(value.numel() for value in vars(sums).values() if isinstance(value, Tensor))

    before = held()
    for _ in range(10):
        sums.update(drawn(500, 4))
    assert held() == before == 10**6 + 2 * (4 + 1 + 1)


def test_score_sums_invalid_input_is_refused() -> None:
    for splits in (0, 5):
        with pytest.raises(ValueError, match=f"got {splits} splits"):
            ScoreSums(splits, 3, 4)
    sums = ScoreSums(2, 3, 4)
    with pytest.raises(ValueError, match="got 2 logits an image, expected 3"):
        sums.update(torch.zeros(1, 2))
    sums.update(torch.zeros(0, 3))
    sums.update(torch.zeros(2, 3), (sums._parts == 0).nonzero()[:, 0])
    with pytest.raises(ValueError, match="2 of 4 images"):  # the second split has none
        sums.score()
    for number in (-1, 4):
        with pytest.raises(ValueError, match=f"number {number}, expected 0 to 3"):
            sums.update(torch.zeros(1, 3), torch.tensor([number]))
    with pytest.raises(ValueError, match="number 4, "):
        sums.update(torch.zeros(3, 3))
    sums.update(torch.full((2, 3), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        sums.score()


# --- KID


@pytest.mark.parametrize("library", ["torchmetrics", "torch-fidelity"])
def test_kernel_distance_of_one_subset_matches_torch_fidelity(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    mean, error = kernel_distance(features()["real"][:250], features()["fake"], 1, 250, seed=3)
    assert mean == pytest.approx(numbers(library)["kid_of_first_250"], rel=1e-9)
    assert math.isnan(error)  # one subset does not say how much subsets differ


def test_kernel_distance_by_hand() -> None:
    real, fake = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    # k(x, y) = (xy + 1)³: within real 1, within fake 27, between 1, 1, 8, 27
    assert kernel_distance(real, fake, 1, 2, seed=0)[0] == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kernel_distance_subsets_follow_the_seed() -> None:
    real, fake = drawn(60, 4), drawn(50, 4, seed=1) + 0.5
    first = kernel_distance(real, fake, 20, 10, seed=1)
    assert first == kernel_distance(real, fake, 20, 10, seed=1)
    assert first != kernel_distance(real, fake, 20, 10, seed=2)
    few, more = (kernel_distance(real, fake, subsets, 10, seed=1) for subsets in (40, 160))
    assert more[1] == pytest.approx(few[1] / 2, rel=0.3)  # the error of a mean falls with the root of how many
    assert abs(more[0] - kernel_distance(real[:50], fake, 1, 50, seed=0)[0]) < 5 * more[1] + 0.1


def test_kernel_distance_is_unbiased() -> None:
    mean, error = kernel_distance(drawn(4000, 3), drawn(4000, 3, seed=1), 50, 40, seed=0)
    assert abs(mean) < 4 * error


def test_kernel_distance_subsets_fit_the_sets() -> None:
    for size in (1, 51):
        with pytest.raises(ValueError, match=f"subsets of {size}, expected 2 to 50"):
            kernel_distance(drawn(60, 4), drawn(50, 4), 3, size, seed=0)
    with pytest.raises(ValueError, match="got 0 subsets"):
        kernel_distance(drawn(60, 4), drawn(50, 4), 0, 5, seed=0)


# --- precision, recall, neighbors


def test_precision_and_recall_match_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        ours = precision_recall(features()["real"], features()["fake"])
        assert ours == pytest.approx(numbers("torch-fidelity")["precision_recall_3"], abs=1e-6)
        small_chunks(monkeypatch)  # for the second time


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0]])  # with k = 1 the balls are [-1, 1], [0, 2], [1, 5]
    fake = torch.tensor([[-1.0], [5.0], [5.5], [9.0]])  # [-7, 5], [4.5, 5.5], [5, 6], [5.5, 12.5]
    assert precision_recall(real, fake, 1) == (0.5, 1)  # -1 and 5 lie on an edge
    assert precision_recall(fake, real, 1) == (1, 0.5)
    # with k = 2 the balls are [-3, 3], [-1, 3], [0, 6]
    assert precision_recall(real, fake, 2)[0] == 0.75


def test_precision_includes_the_edge_of_a_ball() -> None:
    step, first = ((drawn(1, 7, seed=seed) * 2**30).round() / 2**30 for seed in (0, 1))  # so that sums are exact
    centers = first + 64 * torch.arange(50)[:, None] * step
    real = torch.cat([centers, centers + step])
    edge, beyond = centers - step, centers - (1 + 1e-9) * step
    # to the last bit as far from its centre as that one's neighbour
    assert torch.equal((edge - centers).square().sum(1), (real[50:] - centers).square().sum(1))
    assert precision_recall(real, edge, 1)[0] == 1
    assert precision_recall(real, beyond, 1)[0] == 0


def test_precision_and_recall_of_copies_are_one() -> None:
    real = 100 + drawn(40, 6)
    assert precision_recall(real, real.clone()) == (1, 1)
    assert precision_recall(real, real[:5].repeat(4, 1)) == (1, 0.125)  # balls of no size cover themselves
    same = torch.full((20, 6), 1 / 3)
    assert precision_recall(same, same[:9]) == (1, 1)
    assert precision_recall(same, real) == (0, 0)


def test_precision_without_neighbors_is_refused() -> None:
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k = {k} with 9 real and 3 fake"):
            precision_recall(drawn(9, 2), drawn(3, 2), k)


def test_nearest_neighbors_match_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = 100 + drawn(300, 6), 100 + drawn(200, 6, seed=1)
    fake[7] = real[299]
    expected = torch.cdist(fake, real, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    torch.testing.assert_close(nearest_neighbors(real, fake)[0], expected, rtol=1e-12, atol=0)
    assert nearest_neighbors(real, fake)[0][7] == 0
    small_chunks(monkeypatch)
    distances, numbers = nearest_neighbors(real, fake)
    torch.testing.assert_close(distances, expected, rtol=1e-12, atol=0)
    assert numbers[7] == 299
    torch.testing.assert_close((fake - real[numbers]).norm(dim=1), expected, rtol=1e-12, atol=0)
    assert nearest_neighbors(real, fake[:0])[0].shape == (0,)
    with pytest.raises(ValueError, match="no reference features"):
        nearest_neighbors(real[:0], fake)
