"""The order of a stream: each shard once an epoch, the same for any number of processes and workers, and resumable."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import NumberedShards, image_numbers

import mar.data.stream
from mar.config import ConfigError
from mar.data.images import Transform
from mar.data.loader import Augmentations, Batch, ImageBatch, batches, in_order
from mar.data.stream import ShardReader, StreamSample, StreamSampler, StreamSource

TO_TENSOR = Transform(8, 1)


class Sloping(NumberedShards):
    """The same shards, of pictures in which every pixel differs."""

    def samples(self, shard: int) -> Iterator[StreamSample]:
        for row in super().samples(shard):
            file = BytesIO()
            Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + 2 * int(row.name[1:])).save(file, "PNG")
            yield replace(row, data=file.getvalue())


class InWorkers(NumberedShards):
    """The same shards, with the window of `small_blocks` in workers too, which begin without it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        mar.data.stream.SHUFFLE_WINDOW = 8


def stream(**changes: Any) -> StreamSource:
    return StreamSource(NumberedShards(**changes), "numbered")


def some(source: StreamSource, count: int, start: int = 0, batch: int = 4, **settings: Any) -> list[Batch]:
    return list(islice(batches(source, TO_TENSOR, batch=batch, seed=1, start=start, **settings), count))


def flat(found: list[Batch]) -> list[int]:
    return [number for batch in found for number in image_numbers(batch)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two pictures, with four readers."""
    monkeypatch.setattr("mar.data.stream.SHUFFLE_WINDOW", 8)


def test_stream_epoch_has_every_image_once_in_new_order(small_blocks: None) -> None:
    seen = flat(some(stream(broken=()), 18))
    assert 22 not in seen  # which can't be fetched: another of its block stands in
    epochs = [seen[first : first + 24] for first in (0, 24, 48)]
    for epoch in epochs:
        assert len(set(epoch)) == 23
        assert sorted({*epoch, 22}) == list(range(24))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_stream_positions_labels_and_flips_match_other_sources() -> None:
    batch = some(stream(), 2, start=0)[1]
    assert batch.positions.tolist() == [4, 5, 6, 7]
    assert batch.labels.tolist() == [number % 3 for number in image_numbers(batch)]


def test_stream_augmentations_are_keyed_by_position() -> None:
    def first(**settings: Any) -> ImageBatch:
        (found,) = some(StreamSource(Sloping(), "sloping"), 1, **settings)
        assert isinstance(found, ImageBatch)
        return found

    plain, changed = first(flip=False), first(flip=True, shift=2)
    for row, position in enumerate(range(4)):
        assert torch.equal(changed.images[row], Augmentations(1, True, 2).at(position)(plain.images[row]))
    assert not torch.equal(plain.images, changed.images)
    half = first(flip=True, shift=2, rank=1, world=2, workers=1)
    assert torch.equal(half.images, changed.images[2:])


def test_stream_can_not_be_balanced() -> None:
    with pytest.raises(ConfigError, match=r"balance is 0\.5, but the data does not tell its labels"):
        some(stream(), 1, balance=0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_order_is_independent_of_processes_and_workers(small_blocks: None, workers: int) -> None:
    alone = some(stream(), 9)

    def in_workers() -> StreamSource:
        return StreamSource(InWorkers(), "numbered")

    assert flat(some(in_workers(), 9, workers=workers)) == flat(alone)
    for world in (2, 4):
        shares = [some(in_workers(), 9, rank=rank, world=world, workers=workers) for rank in range(world)]
        for step, whole in enumerate(alone):
            parts = [share[step] for share in shares]
            for name in ("positions", "labels", "images"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
            assert sorted(name for part in parts for name in part.skipped) == sorted(whole.skipped)


def test_stream_single_shard_is_shared_by_processes() -> None:
    alone = flat(some(stream(sizes=(10,)), 4))
    assert flat(some(stream(sizes=(10,)), 4, workers=2)) == alone
    shares = [some(stream(sizes=(10,)), 4, rank=rank, world=2) for rank in range(2)]
    assert [number for both in zip(*shares, strict=True) for number in flat(list(both))] == alone


def test_stream_process_reads_only_its_readers(small_blocks: None) -> None:
    source = stream()
    some(source, 3, rank=1, world=2)
    assert sorted(source.cursors) == [2, 3]
    assert source.shards.read <= 2 * (3 + 3)  # of each of its readers: what was taken, a block ahead, and one more


@pytest.mark.parametrize(("sizes", "batch"), [((6, 6, 6, 6), 4), ((1, 9, 5, 3, 7), 6), ((24,), 4), ((5, 0, 19), 8)])
def test_stream_resume_repeats_nothing(small_blocks: None, sizes: tuple[int, ...], batch: int) -> None:
    whole = flat(some(stream(sizes=sizes), 20, batch=batch))
    for stop in (1, 4, 11):
        first = stream(sizes=sizes)
        seen = flat(some(first, stop, batch=batch))
        state = pickle.loads(pickle.dumps(first.state_dict()))
        assert state.keys() == {"shards", "begun", "epoch", "places"}  # as in the files of version 0.1
        second = stream(sizes=sizes)
        told = second.load_state_dict(state, stop * batch)
        assert "0 pictures are repeated; " in told
        assert seen + flat(some(second, 20 - stop, stop * batch, batch=batch)) == whole
        readers = len(state["places"])
        passed = int(told.split("repeated; ")[1].split(" pictures")[0].replace(",", ""))
        assert 0 <= passed <= readers * max(sizes)
        third = stream(sizes=sizes)
        third.load_state_dict(state, stop * batch)
        some(third, 1, stop * batch, batch=batch)
        block = 8 // readers
        assert third.shards.read <= passed + batch + readers * (2 * block + 1) + readers * max(sizes)


def test_stream_resume_with_other_process_count_continues(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes in turns, since only what they hand each other is of interest; see tests/distributed, too."""
    sizes = (1, 9, 5, 3, 7)
    whole = flat(some(stream(sizes=sizes), 16, batch=6))
    pair = [stream(sizes=sizes) for _ in range(2)]
    shares = [some(pair[rank], 5, batch=6, rank=rank, world=2) for rank in range(2)]
    assert [number for both in zip(*shares, strict=True) for number in flat(list(both))] == whole[:30]
    monkeypatch.setattr("mar.distributed.all_gather_object", lambda mine: [process.cursors for process in pair])
    state = pair[0].state_dict()
    alone = stream(sizes=sizes)
    alone.load_state_dict(state, 30)
    assert flat(some(alone, 11, 30, batch=6)) == whole[30:]


def test_stream_resume_without_state_starts_over() -> None:
    assert flat(some(stream(), 3, start=20)) == flat(some(stream(), 8))[20:]
    with pytest.raises(ValueError, match="no batch of 4 begins at picture 6"):
        some(stream(), 1, start=6)
    with pytest.raises(ValueError, match="expected a multiple of the 3 processes"):
        some(stream(), 1, world=3)


def test_stream_other_shards_begin_a_new_epoch_and_warn() -> None:
    first = stream()
    some(first, 7)
    second = stream(sizes=(6, 6, 6, 6, 6))
    told = second.load_state_dict(first.state_dict(), 28)
    assert "(5 now, 4 then): it begins a new epoch" in told
    assert second.first_epoch == 2  # the readers were in the epoch of number 1
    seen = flat(some(second, 6, 28))
    assert len(set(seen[:20])) >= 19  # four readers of five shards, of six pictures each
    third = stream(sizes=(6, 6, 6, 6, 6))
    assert "0 pictures are repeated" in third.load_state_dict(second.state_dict(), 52)
    again = stream(sizes=(6, 6, 6, 6, 6))
    again.load_state_dict(first.state_dict(), 28)
    assert seen + flat(some(third, 2, 52)) == flat(some(again, 8, 28))


def test_stream_unreadable_images_are_replaced_nearby(small_blocks: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = some(stream(broken=(3, 9)), 12)
    assert not {3, 9, 22} & set(flat(found))
    assert {name for batch in found for name in batch.skipped} == {"p3", "p9", "p22"}
    assert caplog.text.count("skipped a picture that can't be read: p3\n") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_fatal_errors_are_one_line(workers: int) -> None:
    with pytest.raises(ValueError, match=r"^7 pictures in a row can't be read, the last of them p\d+$"):
        some(stream(broken=tuple(range(1, 24, 2)) + tuple(range(24))), 9, workers=workers)
    with pytest.raises(ValueError, match=r"^p\d+ has the label 2, but there are 2 classes$"):
        some(stream(classes=("a", "b")), 9, workers=workers)
    with pytest.raises(ValueError, match=r"^data: no pictures in 3 shards one after the other$"):
        some(stream(sizes=(0, 0)), 9, workers=workers)
    assert multiprocessing.active_children() == []


def test_stream_reader_count_divides_the_batch() -> None:
    for shards, batch, expected in ((1000, 256, 32), (10, 256, 8), (4, 7, 1), (1, 8, 1), (33, 33, 11), (3, 6, 3)):
        assert StreamSampler(shards, 0, batch).num_readers == expected
    with pytest.raises(ValueError, match="got 0 shards"):
        StreamSampler(0, 0, 8)


def test_shard_reader_reads_one_image_per_sample(small_blocks: None) -> None:
    shards = NumberedShards((40, 40, 40, 40))
    reader = iter(ShardReader(shards, StreamSampler(4, 0, 4), 0))
    next(reader)
    begun = shards.read
    for _ in range(20):
        next(reader)
    assert begun <= 2 + 2
    assert shards.read - begun <= 20 + 1


def test_stream_subset_covers_the_stream() -> None:
    source = stream(sizes=(2, 5, 1), classes=("0", "1", "2"))
    names = [row.name for row in source.preview()]
    assert names == ["p0", "p2", "p7", "p1", "p3", "p4", "p5", "p6"]
    found = list(in_order(source, TO_TENSOR, batch=2, limit=3))
    assert [len(images) for images in found] == [2, 1]
