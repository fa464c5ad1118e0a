from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mar.data.loader import InfiniteSampler, random_flip, random_shift


def positions(order: InfiniteSampler, start: int, count: int) -> list[tuple[int, int]]:
    return [key for keys in islice(order.batches(start), count) for key in keys]


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own() -> None:
    order = InfiniteSampler(length=30, seed=1, batch=4)
    epochs = [[order.index(p) for p in range(30 * e, 30 * (e + 1))] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [InfiniteSampler(length=30, seed=2, batch=4).index(p) for p in range(30)]


@given(length=st.integers(1, 40), world=st.integers(1, 4), share=st.integers(1, 5), start=st.integers(0, 200))
def test_ranks_share_each_batch_whatever_the_world(length: int, world: int, share: int, start: int) -> None:
    batch = world * share
    alone = positions(InfiniteSampler(length, 3, batch), start, 3)
    assert [p for p, _ in alone] == list(range(start, start + 3 * batch))
    shares = [list(islice(InfiniteSampler(length, 3, batch, rank, world).batches(start), 3)) for rank in range(world)]
    together = [key for keys in zip(*shares, strict=True) for part in keys for key in part]
    assert together == alone


def test_going_on_from_a_position_is_the_same_as_not_stopping() -> None:
    order = InfiniteSampler(length=7, seed=5, batch=3)
    whole = list(islice(order.batches(), 10))
    assert list(islice(order.batches(12), 6)) == whole[4:]


def test_flips_are_fair_keyed_and_not_tied_to_the_order() -> None:
    coins = [random_flip(1, p) for p in range(1000)]
    assert 440 < sum(coins) < 560
    assert coins == [random_flip(1, p) for p in range(1000)]
    assert coins != [random_flip(2, p) for p in range(1000)]


def test_shifts_are_all_alike_keyed_and_not_tied_to_the_flips() -> None:
    found = [random_shift(1, p, 2) for p in range(5000)]
    assert found == [random_shift(1, p, 2) for p in range(5000)]
    assert found != [random_shift(2, p, 2) for p in range(5000)]
    counts = Counter((*way, random_flip(1, p)) for p, way in enumerate(found))
    assert set(counts) == {(down, right, flip) for down in range(-2, 3) for right in range(-2, 3) for flip in (0, 1)}
    assert 60 < min(counts.values()) < max(counts.values()) < 145  # 100 each are expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 0}, "at least one picture"),
        ({"batch": 3, "world": 2}, "positive multiple of the 2 processes"),
        ({"batch": 0}, "positive multiple"),
        ({"rank": 2, "world": 2, "batch": 4}, "rank: got 2, expected 0 to 1"),
    ],
)
def test_bad_requests(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfiniteSampler(**{"length": 10, "seed": 0, "batch": 4, **kwargs})
