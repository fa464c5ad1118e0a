"""Batches of a stream: each process reads the lanes that its share of a batch comes from, each worker some of these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mar.data.batch import Batch, ImageBatch, Item, announced, images, read_ahead
from mar.data.changes import Changes
from mar.data.examples import UnreadableImage
from mar.data.lanes import Lane, StreamOrder, Taken
from mar.data.streams import Place, StreamSource
from mar.data.transforms import Transform


class _Part(NamedTuple):
    """What one worker has of a batch, and where its lanes stand then."""

    batch: ImageBatch
    places: dict[int, Place]


class _Feed(IterableDataset[_Part | ValueError]):
    """The parts of a process's batches, without end, or why there are no more; what workers run."""

    def __init__(
        self, source: StreamSource, order: StreamOrder, transform: Transform, changes: Changes, slots: range, start: int
    ) -> None:
        self.source, self.order, self.transform, self.changes = source, order, transform, changes
        self.slots, self.start = slots, start
        """Which pictures of a batch are this process's."""

    @property
    def lanes(self) -> range:
        """Where they come from."""
        return range(self.slots.start // self.order.width, (self.slots.stop - 1) // self.order.width + 1)

    def __iter__(self) -> Iterator[_Part | ValueError]:
        info = get_worker_info()
        mine = self.lanes if info is None else self.lanes[info.id :: info.num_workers]
        try:
            yield from self._parts(mine)
        except ValueError as error:  # handed on: PyTorch would make the worker's traceback its message
            yield error

    def _parts(self, mine: range) -> Iterator[_Part]:
        lanes = {lane: self._open(lane) for lane in mine}
        for first in count(self.start, self.order.batch):
            items: list[Item] = []
            places: dict[int, Place] = {}
            for lane, pictures in lanes.items():
                for slot in range(lane * self.order.width, (lane + 1) * self.order.width):
                    taken = next(pictures)
                    places[lane] = taken.start
                    if slot in self.slots:
                        items.append(self._item(taken, first + slot))
            yield _Part(images(items), places)

    def _open(self, lane: int) -> Iterator[Taken]:
        place = self.source.places.get(lane, Place(0, lane, 0))
        pictures = Lane(self.source.shards, self.order, lane, place)
        return islice(pictures, self.order.needed(self.start) - place.taken, None)

    def _item(self, taken: Taken, position: int) -> Item:
        skipped = [*taken.row.lost]
        for row in (taken.row, *taken.others):
            try:
                example = self.source.example(row)
            except UnreadableImage as error:
                skipped.append(error.name)
                continue
            content = self.changes.at(position)(self.transform(example.image))
            return Item(content, example.label, position, tuple(skipped))
        raise ValueError(f"{len(skipped)} pictures in a row can't be read, the last of them {skipped[-1]}")


def stream_batches(
    source: StreamSource, transform: Transform, changes: Changes, *, batch: int, start: int = 0, rank: int = 0,
    world: int = 1, workers: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's batches of a stream, without end, from position `start`; `source` keeps up with what was yielded.

    All is as `mar.data.loader.batches` says, and the same for any number of workers and processes, which have to divide
    the batch. A picture that can't be read is replaced by another of its block.
    """
    if batch % world:
        raise ValueError(f"batch: got {batch}, expected a multiple of the {world} processes")
    order = StreamOrder(len(source.shards.names), changes.seed, batch, source.begun, source.epoch)
    share = batch // world
    slots = range(rank * share, (rank + 1) * share)
    feed = _Feed(source, order, transform, changes, slots, start)
    source.places = {lane: place for lane, place in source.places.items() if lane in feed.lanes}
    workers = min(workers, len(feed.lanes))
    reads = read_ahead(feed, workers=workers, batches=None, collate=_as_it_is)
    return announced(_joined(reads, source, max(workers, 1)))


def _as_it_is(part: Any) -> Any:
    return part


def _joined(parts: Iterator[_Part | ValueError], source: StreamSource, workers: int) -> Iterator[Batch | ValueError]:
    """Batches from the parts of all workers, which come in turns."""
    while True:
        found = list(islice(parts, workers))
        if failed := next((part for part in found if isinstance(part, ValueError)), None):
            yield failed
            return
        whole = [part for part in found if isinstance(part, _Part)]
        for part in whole:
            source.places.update(part.places)
        yield _merged([part.batch for part in whole])


def _merged(parts: list[ImageBatch]) -> ImageBatch:
    """One batch, its pictures by their positions."""
    positions = torch.cat([part.positions for part in parts])
    order = positions.argsort()
    return replace(
        parts[0],
        labels=torch.cat([part.labels for part in parts])[order],
        positions=positions[order],
        skipped=tuple(sorted(name for part in parts for name in part.skipped)),
        images=torch.cat([part.images for part in parts])[order],
    )
