"""What is hidden in training follows the paper's distribution."""

from __future__ import annotations

import math

import pytest
import torch

from mar.model.masking import (
    apply_order,
    draw_mask_ratio,
    halton_cells,
    mask_schedule,
    masked_count,
    masked_fraction,
    random_order,
    split_by_mask,
    unknown_order,
)
from mar.random import make_generator


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_mask_ratios_are_a_truncated_normal() -> None:
    stream = make_generator(0)
    ratios = torch.tensor([draw_mask_ratio(0.7, stream) for _ in range(4000)], dtype=torch.float64)
    assert 0.7 <= float(ratios.min()) < 0.703
    assert 0.997 < float(ratios.max()) <= 1.0
    assert abs(float(ratios.mean()) - 0.867) < 0.005  # one standard error is 0.0014
    low, whole = phi(-0.3 / 0.25), 0.5 - phi(-0.3 / 0.25)
    for at in (0.75, 0.8, 0.9, 0.95):
        share = (phi((at - 1) / 0.25) - low) / whole
        assert abs(float((ratios < at).double().mean()) - share) < 0.03


@pytest.mark.parametrize("minimum", [0.01, 0.5, 0.999, 1.0])
def test_mask_ratios_stay_within_their_bounds(minimum: float) -> None:
    stream = make_generator(1)
    assert all(minimum <= draw_mask_ratio(minimum, stream) <= 1 for _ in range(100))


def test_mask_counts_are_rounded_up() -> None:
    assert [masked_count(256, ratio) for ratio in (0.7, 0.8671875, 0.8672, 1.0)] == [180, 222, 223, 256]
    assert masked_count(3, 1e-9) == 1


def test_split_by_mask_hides_the_first_of_an_order() -> None:
    order = torch.tensor([[3, 0, 2, 1], [1, 3, 0, 2]])
    hidden, visible = split_by_mask(order, 3)
    assert hidden.tolist() == [[0, 2, 3], [0, 1, 3]]
    assert visible.tolist() == [[1], [2]]
    hidden, visible = split_by_mask(order, 4)
    assert hidden.tolist() == [[0, 1, 2, 3]] * 2
    assert visible.shape == (2, 0)


def test_random_order_is_fair() -> None:
    stream = make_generator(2)
    first = torch.stack([random_order(5, stream) for _ in range(2000)])[:, 0]
    assert (torch.bincount(first, minlength=5) - 400).abs().max() < 80  # 4.5 standard deviations


def test_unknown_order_keeps_the_sequence() -> None:
    order, unknown = torch.tensor([4, 1, 3, 0, 2]), torch.tensor([True, False, True, True, False])
    assert unknown_order(order, unknown).tolist() == [3, 0, 2]


def test_checkerboard_order_shows_black_squares_first() -> None:
    order = random_order(6 * 4, make_generator(3))
    made = apply_order(order, (6, 4), "checkerboard")
    shown = made.flip(0)
    assert [(int(t) // 4 + int(t) % 4) % 2 for t in shown] == [0] * 12 + [1] * 12
    for half in (shown[:12], shown[12:]):  # each half in the order that was drawn
        assert torch.equal(half, order.flip(0)[torch.isin(order.flip(0), half)])


def test_apply_order_random_changes_nothing() -> None:
    order = random_order(24, make_generator(3))
    assert apply_order(order, (6, 4), "random") is order


def test_halton_order_spreads_out() -> None:
    """Of a grid of 2^a x 3^b cells, its first points fall one into each of 2^c x 3^d equal parts."""
    places = halton_cells(4, 9)
    assert len({tuple(place) for place in places.tolist()}) == 36
    assert places[0].tolist() == [2, 3]  # 1/2 and 1/3
    assert places[1].tolist() == [1, 6]  # 1/4 and 2/3
    shown = apply_order(random_order(36, make_generator(0)), (4, 9), "halton").flip(0)
    assert len({(int(t) // 9 // 2, int(t) % 9 // 3) for t in shown[:5]}) >= 4  # wrapped, and without the point 0


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 5), (16, 16)])
def test_halton_order_starts_at_any_token(grid: tuple[int, int]) -> None:
    length = grid[0] * grid[1]
    drawn = [torch.arange(length).roll(-first - 1) for first in range(length)]
    orders = [apply_order(order, grid, "halton") for order in drawn]
    assert [int(order[-1]) for order in orders] == [int(order[-1]) for order in drawn]
    assert len({tuple(order.tolist()) for order in orders}) == length


def test_mask_schedules_in_numbers() -> None:
    assert mask_schedule(256, 4) == [236, 181, 97, 0]
    assert mask_schedule(256, 4, "exponential") == [251, 236, 183, 0]
    for kind in ("cosine", "exponential"):
        shares = [masked_fraction(done, 8, kind) for done in range(9)]  # type: ignore[arg-type]
        assert shares[0] == 1
        assert shares[-1] == pytest.approx(0, abs=1e-12)
        assert shares == sorted(shares, reverse=True)
    assert masked_fraction(1, 2, "exponential") == pytest.approx((1 - math.exp(-2.5)) / (1 - math.exp(-5)))
