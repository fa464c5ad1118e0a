"""Batches: their order, augmentation, workers, and images that can't be read."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mar.data import loader
from mar.data.folder import FolderSource
from mar.data.images import Example, Transform
from mar.data.loader import (
    NO_AUGMENTATION,
    Augmentation,
    Augmentations,
    Batch,
    batches,
    load_batch,
    random_flip,
    random_shift,
)
from mar.data.order import InfiniteSampler
from mar.data.sources import FashionSource


def positions(order: InfiniteSampler, start: int, count: int) -> list[tuple[int, int]]:
    return [key for keys in islice(order.batches(start), count) for key in keys]


def test_sampler_epoch_has_every_image_once_in_new_order() -> None:
    order = InfiniteSampler(length=30, seed=1, batch=4)
    epochs = [[order.index(p) for p in range(30 * e, 30 * (e + 1))] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [InfiniteSampler(length=30, seed=2, batch=4).index(p) for p in range(30)]


@given(length=st.integers(1, 40), world=st.integers(1, 4), share=st.integers(1, 5), start=st.integers(0, 200))
def test_sampler_ranks_share_the_same_batches(length: int, world: int, share: int, start: int) -> None:
    batch = world * share
    alone = positions(InfiniteSampler(length, 3, batch), start, 3)
    assert [p for p, _ in alone] == list(range(start, start + 3 * batch))
    shares = [list(islice(InfiniteSampler(length, 3, batch, rank, world).batches(start), 3)) for rank in range(world)]
    together = [key for keys in zip(*shares, strict=True) for part in keys for key in part]
    assert together == alone


def test_sampler_resumed_equals_uninterrupted() -> None:
    order = InfiniteSampler(length=7, seed=5, batch=3)
    whole = list(islice(order.batches(), 10))
    assert list(islice(order.batches(12), 6)) == whole[4:]


def test_flips_are_fair_keyed_and_independent_of_order() -> None:
    coins = [random_flip(1, p) for p in range(1000)]
    assert 440 < sum(coins) < 560
    assert coins == [random_flip(1, p) for p in range(1000)]
    assert coins != [random_flip(2, p) for p in range(1000)]


def test_shifts_are_uniform_keyed_and_independent_of_flips() -> None:
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
def test_loader_invalid_arguments_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfiniteSampler(**{"length": 10, "seed": 0, "batch": 4, **kwargs})


# ---- augmentation

IMAGE = torch.arange(24.0).reshape(2, 3, 4)


def test_random_shift_repeats_the_edges() -> None:
    row = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert Augmentation(right=1)(row).tolist() == [[[1, 1, 2, 3]]]
    assert Augmentation(right=-2)(row).tolist() == [[[3, 4, 4, 4]]]
    assert Augmentation(right=9)(row).tolist() == [[[1, 1, 1, 1]]]
    assert Augmentation(down=5)(row).tolist() == row.tolist()
    down = Augmentation(down=1)(IMAGE)
    assert torch.equal(down[:, 1:], IMAGE[:, :-1])
    assert torch.equal(down[:, 0], IMAGE[:, 0])
    both = Augmentation(down=-1, right=1)(IMAGE)
    assert torch.equal(both[:, :-1, 1:], IMAGE[:, 1:, :-1])


def test_augmentation_flips_after_the_shift() -> None:
    assert torch.equal(Augmentation(flip=True)(IMAGE), IMAGE.flip(-1))
    assert torch.equal(Augmentation(True, 1, 2)(IMAGE), Augmentation(False, 1, 2)(IMAGE).flip(-1))
    assert NO_AUGMENTATION(IMAGE) is IMAGE


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_augmentation_follows_the_position(flip: bool, shift: int) -> None:
    changes = Augmentations(7, flip, shift)
    for position in range(40):
        expected = Augmentation(
            flip and random_flip(7, position), *(random_shift(7, position, shift) if shift else (0, 0))
        )
        assert changes.at(position) == expected
        assert max(abs(expected.down), abs(expected.right)) <= shift


# ---- batches and workers


@pytest.fixture(scope="module")
def fashion() -> FashionSource:
    return FashionSource("test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures, each of one grey value of its own (20 x its number), in two classes."""
    for i in range(12):
        path = tmp_path / ("even" if i % 2 == 0 else "odd") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(path)
    return tmp_path


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))
    )


def test_batches_follow_the_sampler(fashion: FashionSource) -> None:
    order = InfiniteSampler(len(fashion), seed=3, batch=8)
    batch = next(islice(batches(fashion, Transform(28, 1), batch=8, seed=3, start=5), 1, None))
    assert batch.positions.tolist() == list(range(13, 21))
    for row, position in enumerate(range(13, 21)):
        example = fashion[order.index(position)]
        assert int(batch.labels[row]) == example.label
        pixels = ((batch.images[row, 0] + 1) * 127.5).round().byte().numpy()
        assert np.array_equal(pixels, example.image)


def test_batches_are_independent_of_workers_and_restarts(fashion: FashionSource) -> None:
    def some(start: int, workers: int, count: int) -> list[Batch]:
        stream = batches(fashion, Transform(28, 1), batch=6, seed=1, start=start, workers=workers, flip=True, shift=2)
        return list(islice(stream, count))

    state = torch.get_rng_state()
    whole = some(0, 0, 6)
    assert all(map(same, whole, some(0, 2, 6)))
    assert all(map(same, whole[4:], some(24, 2, 2)))
    assert torch.equal(torch.get_rng_state(), state), "global random state was used"


def test_batches_of_ranks_add_up_to_one_process(fashion: FashionSource) -> None:
    def first(**share: int) -> Batch:
        return next(batches(fashion, Transform(28, 1), batch=6, seed=1, flip=True, shift=2, **share))

    alone, parts = first(), [first(rank=r, world=3) for r in range(3)]
    assert torch.equal(torch.cat([part.images for part in parts]), alone.images)


def test_flips_follow_position_and_source(fashion: FashionSource) -> None:
    transform = Transform(28, 1)
    as_is = next(batches(fashion, transform, batch=32, seed=1))
    never = next(batches(fashion, transform, batch=32, seed=1, flip=False))
    coins = next(batches(fashion, transform, batch=32, seed=1, flip=True))
    assert torch.equal(as_is.images, never.images), "the bundled shoes all face one way"
    for row, position in enumerate(coins.positions.tolist()):
        expected = never.images[row].flip(-1) if random_flip(1, position) else never.images[row]
        assert torch.equal(coins.images[row], expected)
    assert FolderSource.flips


def test_shifts_follow_position(fashion: FashionSource) -> None:
    transform = Transform(28, 1)
    plain = next(batches(fashion, transform, batch=32, seed=1, flip=False))
    moved = next(batches(fashion, transform, batch=32, seed=1, flip=True, shift=3))
    changes = [Augmentations(1, True, 3).at(position) for position in moved.positions.tolist()]
    assert len(set(changes)) > 20
    for row, change in enumerate(changes):
        assert torch.equal(moved.images[row], change(plain.images[row]))
    assert torch.equal(moved.labels, plain.labels)
    unchanged = load_batch(fashion, transform, [0, 5])
    assert unchanged is not None
    assert torch.equal(unchanged.images[1], transform(fashion[5].image))


class Counting(FolderSource):
    """Counts how often each picture is decoded."""

    def __getitem__(self, index: int) -> Example:
        self.decoded = getattr(self, "decoded", Counter())
        self.decoded[index] += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("room", "decoded"), [(0, 4), (5, 4), (6, 1)])
def test_crops_are_decoded_once_if_all_find_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, decoded: int
) -> None:
    for i in range(6):
        Image.effect_noise((9, 12), 10 + i).save(tmp_path / f"{i}.png")
    transform = Transform((8, 8), 3)
    plain = [next(batches(FolderSource(tmp_path), transform, batch=24, seed=1, flip=True))]
    monkeypatch.setattr(loader, "MAX_CROPS_BYTES", room * 8 * 8 * 3 + 7)
    source = Counting(tmp_path)
    assert same(next(batches(source, transform, batch=24, seed=1, flip=True)), plain[0])
    assert source.decoded.total() == 6 * decoded


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named_once_and_replaced(
    folder: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = folder / "even" / "4.png"
    broken.write_bytes(broken.read_bytes()[:40])
    source = FolderSource(folder)
    with caplog.at_level(logging.WARNING, "mar.data"):
        seen = list(islice(batches(source, Transform(8, 1), batch=6, seed=0, workers=workers), 4))
    assert [name for batch in seen for name in batch.skipped] == [str(broken)] * 2
    assert [record.getMessage() for record in caplog.records].count(
        f"skipped a picture that can't be read: {broken}"
    ) == 1
    values = [round((float(image.mean()) + 1) * 127.5 / 20) for batch in seen[:2] for image in batch.images]
    # In class order 4 is followed by 6, which now comes twice an epoch.
    assert sorted(values) == [0, 1, 2, 3, 5, 6, 6, 7, 8, 9, 10, 11]
    labels = [int(label) for batch in seen[:2] for label in batch.labels]
    assert labels == [value % 2 for value in values]


def test_loader_without_readable_images_is_an_error(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="3 pictures in a row can't be read"):
        next(batches(FolderSource(tmp_path), Transform(8), batch=1, seed=0))


def test_images_without_classes_have_label_minus_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    batch = next(batches(FolderSource(tmp_path), Transform(8), batch=2, seed=0))
    assert batch.labels.tolist() == [-1, -1]
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_end_while_a_traceback_is_kept(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="1 pictures in a row can't be read") as caught:
        next(batches(FolderSource(tmp_path), Transform(8, 1), batch=1, seed=0, workers=workers))
    assert multiprocessing.active_children() == []
    assert caught.value.__traceback__ is not None


LEFT_OPEN = """
import torch
from mar.data.loader import make_dataloader

class Stuck(torch.utils.data.Dataset):
    def __getitem__(self, index):
        while index:
            pass
        return index

if __name__ == "__main__":
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # how long a worker may take to end by itself
    reads = make_dataloader(Stuck(), workers=1, batches=[[0], [1]], collate=list)
    print(next(reads))
"""


def test_workers_of_an_open_iterator_end_with_the_process(tmp_path: Path) -> None:
    """Even one that is stuck, though workers ignore SIGTERM."""
    (tmp_path / "left_open.py").write_text(LEFT_OPEN)  # workers import the classes of a script
    command = [sys.executable, str(tmp_path / "left_open.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[0]\n"
