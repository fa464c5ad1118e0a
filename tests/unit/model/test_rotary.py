"""Rotary positions: as complex numbers, and what attention sees of them."""

from __future__ import annotations

import pytest
import torch
from tiny import noise
from torch import Tensor

from mar.config import ConfigError, TrunkConfig
from mar.model.rotary import BASE, apply_rope, rope_cache

ROWS, COLUMNS, WIDTH = 3, 5, 8


def seen(q: Tensor, k: Tensor, at: tuple[int, int], other: tuple[int, int]) -> float:
    """The product of a query at one place and a key at another."""
    table = rope_cache(2, (ROWS, COLUMNS), WIDTH)[2:].view(1, ROWS, COLUMNS, WIDTH // 2, 2)
    both = [
        apply_rope(x.view(1, 1, 1, WIDTH), table[:, row, column, None]) for x, (row, column) in ((q, at), (k, other))
    ]
    return float((both[0] * both[1]).sum())


def test_apply_rope_rotates_complex_pairs() -> None:
    table, x = rope_cache(1, (ROWS, COLUMNS), WIDTH), noise(1, 1 + ROWS * COLUMNS, 2, WIDTH)
    turned = apply_rope(x, table.unsqueeze(0))
    torch.testing.assert_close(turned[:, 0], x[:, 0])  # a buffer token
    for token in range(ROWS * COLUMNS):
        row, column = divmod(token, COLUMNS)
        angles = torch.tensor([row, row * BASE**-0.5, column, column * BASE**-0.5])
        numbers = torch.complex(x[0, 1 + token, :, :4], x[0, 1 + token, :, 4:]) * torch.polar(torch.ones(4), angles)
        torch.testing.assert_close(turned[0, 1 + token], torch.cat([numbers.real, numbers.imag], -1))


def test_rope_attention_depends_on_distance_only() -> None:
    q, k = noise(2, WIDTH)
    near = seen(q, k, (0, 1), (1, 3))
    assert seen(q, k, (1, 2), (2, 4)) == pytest.approx(near, abs=1e-5)
    for other in ((0, 3), (1, 2), (2, 3), (1, 4)):
        assert abs(seen(q, k, (0, 1), other) - near) > 1e-3


def test_rope_cache_is_real_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert rope_cache(2, (2, 2), 4).device.type == "cpu"


def test_rope_head_width_not_divisible_is_refused() -> None:
    with pytest.raises(ConfigError, match="rotary needs heads of a multiple of 4 features, but they have 6"):
        TrunkConfig(width=12, depth=1, num_heads=2, rotary=True)
