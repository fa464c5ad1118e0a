"""The balanced order: shares of classes, turns within them, the same at any position."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mar.config import ConfigError
from mar.data.images import Example
from mar.data.order import BalancedSampler, InfiniteSampler, labels_of, order_of
from mar.data.parquet import TableSource
from mar.data.splits import Subset

counts_of_classes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def jumbled(counts: list[int]) -> np.ndarray:
    """Labels in a fixed jumble, the first class being those without one."""
    labels = np.repeat(np.arange(len(counts)) - 1, counts)
    return labels[np.random.default_rng(0).permutation(len(labels))]


def drawn(labels: np.ndarray, balance: float, epochs: int, start: int = 0) -> list[int]:
    order = BalancedSampler(len(labels), seed=3, batch=1, labels=labels, balance=balance)
    return order.indices(start, epochs * len(labels))


def test_balance_1_draws_all_classes_equally_often() -> None:
    labels = jumbled([200, 20, 80])
    found = Counter(labels[drawn(labels, 1.0, epochs=1)].tolist())
    assert found == {-1: 100, 0: 100, 1: 100}


def test_balance_half_draws_by_the_square_root() -> None:
    labels = jumbled([400, 100, 4])
    found = Counter(labels[drawn(labels, 0.5, epochs=1)].tolist())
    roots = np.array([20, 10, 2]) / 32 * 501 + 1
    assert [found[label] for label in (-1, 0, 1)] == pytest.approx(roots, abs=1)


@given(counts_of_classes, st.sampled_from([1e-6, 0.3, 1.0]))
def test_balanced_class_deals_out_its_images_in_turns(counts: list[int], balance: float) -> None:
    labels = jumbled(counts)
    indices = np.array(drawn(labels, balance, epochs=5))
    for label, count in zip(range(-1, len(counts) - 1), counts, strict=True):
        of_class = indices[labels[indices] == label]
        assert len(of_class) >= 5, "no class is left out"
        often = np.bincount(of_class, minlength=len(labels))[labels == label]
        assert len(often) == count
        assert often.max() - often.min() <= 1


@given(counts_of_classes, st.integers(0, 300))
def test_balanced_order_is_the_same_from_any_position(counts: list[int], start: int) -> None:
    labels = jumbled(counts)
    whole = drawn(labels, 0.7, epochs=2 + start // len(labels))
    assert drawn(labels, 0.7, epochs=1, start=start) == whole[start:][: len(labels)]


def test_balanced_order_ranks_share_each_batch() -> None:
    labels = jumbled([30, 5])
    alone = order_of(Known(labels), 3, 8, balance=1.0)
    shares = [order_of(Known(labels), 3, 8, rank, 4, balance=1.0) for rank in range(4)]
    for batch, *parts in islice(zip(alone.batches(16), *(share.batches(16) for share in shares), strict=True), 9):
        assert batch == [key for part in parts for key in part]


def test_balanced_order_depends_on_its_seed() -> None:
    labels = jumbled([30, 5])
    orders = [order_of(Known(labels), seed, 8, balance=0.5).indices(0, 35) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


class Known:
    """A source of nothing but labels."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


def test_order_without_balance_is_plain() -> None:
    assert type(order_of(Known(np.arange(9)), 0, 4)) is InfiniteSampler


def test_balance_without_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"balance is 0\.5, but the data does not tell its labels"):
        order_of(range(9), 0, 4, balance=0.5)


# ---- labels that sources know


def test_table_knows_its_labels_and_its_parts_do(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    names = ["b", "a", None, "b"]
    table = datasets.Dataset.from_dict({"image": [picture] * 4, "label": names})
    source = TableSource(table.cast_column("image", datasets.Image()), "table")
    assert source.labels.tolist() == [source[index].label for index in range(4)] == [1, 0, -1, 1]
    labels = labels_of(Subset(source, np.array([3, 2])))
    assert labels is not None
    assert labels.tolist() == [1, -1]


def test_part_of_a_source_without_labels_has_none() -> None:
    class Plain:
        classes = ()
        flips = True

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Example:
            raise AssertionError

    assert labels_of(Subset(Plain(), np.array([0]))) is None
