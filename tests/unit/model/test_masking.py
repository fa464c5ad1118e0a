"""What is hidden in training follows the paper's distribution."""

from __future__ import annotations

import math

import pytest
import torch

from mar.model.masking import draw_mask_ratio, masked_count, random_order, split, unknown_order
from mar.runtime import generator


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_mask_ratios_are_a_truncated_normal() -> None:
    stream = generator(0)
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
    stream = generator(1)
    assert all(minimum <= draw_mask_ratio(minimum, stream) <= 1 for _ in range(100))


def test_counts_are_rounded_up() -> None:
    assert [masked_count(256, ratio) for ratio in (0.7, 0.8671875, 0.8672, 1.0)] == [180, 222, 223, 256]
    assert masked_count(3, 1e-9) == 1


def test_the_first_of_an_order_are_hidden() -> None:
    order = torch.tensor([[3, 0, 2, 1], [1, 3, 0, 2]])
    hidden, visible = split(order, 3)
    assert hidden.tolist() == [[0, 2, 3], [0, 1, 3]]
    assert visible.tolist() == [[1], [2]]
    hidden, visible = split(order, 4)
    assert hidden.tolist() == [[0, 1, 2, 3]] * 2
    assert visible.shape == (2, 0)


def test_orders_are_fair() -> None:
    stream = generator(2)
    first = torch.stack([random_order(5, stream) for _ in range(2000)])[:, 0]
    assert (torch.bincount(first, minlength=5) - 400).abs().max() < 80  # 4.5 standard deviations


def test_an_order_keeps_its_sequence_where_tokens_are_known() -> None:
    order, unknown = torch.tensor([4, 1, 3, 0, 2]), torch.tensor([True, False, True, True, False])
    assert unknown_order(order, unknown).tolist() == [3, 0, 2]
