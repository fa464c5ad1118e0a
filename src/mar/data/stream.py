"""Pictures in passing: shards that are read from their beginning, near or far, and never counted.

The order in which training sees them is `mar.data.stream`' work. It is known at any position, like that of other
sources; but what is there has to be read through. So a run keeps where its open shards stand.

The order in which training sees the pictures of a stream: it is the same for any number of processes and workers.

Shards are shuffled anew each epoch, one epoch after the other in an endless row: their turns. Lane l of L reads turns
l, l + L, l + 2L, ...: each shard of an epoch is read by one lane, once. Lanes begin the next epoch each by itself, so
that epochs overlap by about the open shards. A batch has equally many pictures of every lane, in the lanes' order: a
process reads only the lanes that its share of a batch comes from. Within a lane, pictures are shuffled by blocks, which
end with the epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from mar import distributed
from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import check_label
from mar.random import make_generator, permutation

logger = logging.getLogger("mar.data")

LANES = 32
"""Shards, at most, that are open at a time, over all processes: beyond so many processes, several read the same."""
WINDOW = 2048
"""Pictures, over all lanes, within which they are shuffled; about twice as many are held in memory."""


@dataclass(frozen=True)
class StreamSample:
    """A picture of a shard, not decoded yet."""

    name: str
    data: bytes | None = None
    """The picture's file."""
    path: str | None = None
    """Where it is, if it is not here."""
    label: int = -1
    lost: tuple[str, ...] = ()
    """Ends of shards before it that could not be read."""


@runtime_checkable
class Shards(Protocol):
    """What a stream is read from; picklable, so that workers can have a copy."""

    @property
    def names(self) -> tuple[str, ...]:
        """What each shard is called."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty where pictures have no classes."""

    def rows(self, shard: int) -> Iterator[StreamSample]:
        """The pictures of a shard, from its first. UnreadableImage, for the rest of them, where it breaks off."""

    def fetch(self, row: StreamSample) -> bytes:
        """The file of a row that only says where it is. UnreadableImage where it can't be read."""


class ShardCursor(NamedTuple):
    """Where a block of pictures of a lane begins."""

    taken: int
    """Pictures of the lane before it."""
    turn: int
    """Number of its shard in the endless order of shards."""
    row: int
    """Number of its first picture in that shard."""


class StreamSource:
    """Shards as a source to train on, and how far training has read them: that is saved with the run.

    `places` holds, of the lanes that this process reads, where the block begins in which the last batch ended.
    """

    flips = True

    def __init__(self, shards: Shards, name: str) -> None:
        self.shards, self.name = shards, name
        self.begun, self.epoch = 0, 0
        self.places: dict[int, ShardCursor] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty where pictures have no classes."""
        return self.shards.classes

    def example(self, row: StreamSample) -> Example:
        """A row's picture. UnreadableImage for a broken one, ValueError for a label that is no class."""
        if row.data is None and row.path is None:
            raise UnreadableImage(row.name, "the cell is empty")
        check_label(row.name, row.label, len(self.classes))
        data = self.shards.fetch(row) if row.data is None else row.data
        return Example(decode_image(BytesIO(data), row.name), row.label, row.name)

    def some(self) -> Iterator[StreamSample]:
        """Pictures of at most LANES shards in turns, the same ones each time."""
        count = len(self.shards.names)
        kept = min(count, LANES)
        open_shards = [self._readable(i * count // kept) for i in range(kept)]
        while open_shards:
            heads = [(shard, list(islice(shard, 1))) for shard in open_shards]
            open_shards = [shard for shard, head in heads if head]
            yield from (row for _, head in heads for row in head)

    def _readable(self, shard: int) -> Iterator[StreamSample]:
        try:
            yield from self.shards.rows(shard)
        except UnreadableImage as error:
            logger.warning("skipped what can't be read: %s", error.name)

    def state_dict(self) -> dict[str, Any]:
        """How far all processes together have read; each of them has to call it."""
        places: dict[int, ShardCursor] = {}
        for part in distributed.all_gather_object(self.places):
            for lane, place in part.items():
                # Of a lane that several processes read, the one that is behind has what all need.
                places[lane] = min(place, places.get(lane, place))
        return {
            "shards": self._shards(),
            "begun": self.begun,
            "epoch": self.epoch,
            "places": [[lane, *place] for lane, place in sorted(places.items())],
        }

    def load_state_dict(self, state: dict[str, Any], images: int) -> str:
        """Goes on from a saved state, after `images` pictures. Returns what people should know of it."""
        self.begun, self.epoch = state["begun"], state["epoch"]
        self.places = {lane: ShardCursor(*place) for lane, *place in state["places"]}
        before, now = state["shards"], self._shards()
        if before != now:
            last = max((place.turn for place in self.places.values()), default=0)
            self.begun, self.epoch, self.places = images, self.epoch + last // before["count"] + 1, {}
            return (
                f"the shards are not those of when the run was saved ({now['count']} now, {before['count']} then): "
                "it begins a new epoch, and what the last one had shown already comes again"
            )
        lanes = len(self.places)
        passed = sum(place.row + (images - self.begun) // lanes - place.taken for place in self.places.values())
        return (
            f"the stream goes on where it was: 0 pictures are repeated; {passed:,} pictures of the {lanes} open shards "
            "are read past to get there"
        )

    def _shards(self) -> dict[str, Any]:
        names = self.shards.names
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        return {"count": len(names), "sha256": digest, "lanes": LANES, "window": WINDOW}


_BLOCK = 0xB10C  # key of the shuffling of blocks, beside those of mar.data.loader


class SampleWithFallbacks(NamedTuple):
    """The next picture of a lane, and those that stand in where it can't be read: the others of its block, then those
    of the next block that have been read."""

    start: ShardCursor
    """Where the block begins."""
    row: StreamSample
    others: list[StreamSample]


@dataclass(frozen=True)
class StreamSampler:
    """What is read of `shards` shards for batches of `batch` pictures over all processes.

    `begun`: the position at which this order began, and `epoch`: the number of its first epoch.
    """

    shards: int
    seed: int
    batch: int
    begun: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.shards < 1 or self.batch < 1:
            raise ValueError(f"stream: got {self.shards} shards and a batch of {self.batch}, expected at least 1 each")

    @cached_property
    def lanes(self) -> int:
        """How many shards are open at a time: a number that divides the batch."""
        return max(lanes for lanes in range(1, min(self.shards, LANES) + 1) if self.batch % lanes == 0)

    @property
    def width(self) -> int:
        """Pictures of a batch that come from each lane."""
        return self.batch // self.lanes

    def shard(self, turn: int) -> int:
        """The shard whose turn it is."""
        epoch, within = divmod(turn, self.shards)
        return int(permutation(self.shards, self.seed, self.epoch + epoch)[within])

    def needed(self, position: int) -> int:
        """How many pictures of each lane come before the batch at `position`. ValueError where none begins there."""
        batches, rest = divmod(position - self.begun, self.batch)
        if rest or batches < 0:
            raise ValueError(f"stream: no batch of {self.batch} begins at picture {position} (first: {self.begun})")
        return batches * self.width


class ShardReader:
    """The endless pictures of a lane, from a place on."""

    def __init__(self, shards: Shards, order: StreamSampler, number: int, place: ShardCursor | None = None) -> None:
        self.order, self.number = order, number
        place = place or ShardCursor(0, number, 0)
        self.taken = place.taken
        self.reader = _read(shards, order, place.turn, place.row)
        self.head = next(self.reader)
        self.ahead: list[tuple[int, int, StreamSample]] = []
        """What of the next block has been read."""

    def _grow(self) -> bool:
        """Reads one more picture of the next block; False where the block is whole."""
        epochs = [turn // self.order.shards for turn, _, _ in (self.head, *self.ahead[:1])]
        if len(self.ahead) == max(1, WINDOW // self.order.lanes) or len(set(epochs)) > 1:
            return False
        self.ahead.append(self.head)
        self.head = next(self.reader)
        return True

    def __iter__(self) -> Iterator[SampleWithFallbacks]:
        while True:
            while self._grow():
                pass
            turn, row, _ = self.ahead[0]
            start = ShardCursor(self.taken, turn, row)
            key = make_generator(self.order.seed, _BLOCK, self.number, self.taken)
            rows = [self.ahead[i][2] for i in torch.randperm(len(self.ahead), generator=key).tolist()]
            self.ahead = []
            for offset in range(len(rows)):
                self._grow()  # one is read as one is taken, so that no step waits for a whole block
                ahead = [found for _, _, found in self.ahead]
                yield SampleWithFallbacks(start, rows[offset], rows[offset + 1 :] + rows[:offset] + ahead)
            self.taken += len(rows)


def _read(shards: Shards, order: StreamSampler, turn: int, row: int) -> Iterator[tuple[int, int, StreamSample]]:
    """(turn, number in its shard, row), without end. ValueError where there is none in any shard."""
    empty, lost = 0, tuple[str, ...]()
    while True:
        number = -1
        try:
            for number, found in enumerate(shards.rows(order.shard(turn))):
                if number >= row:
                    yield turn, number, replace(found, lost=lost) if lost else found
                    lost = ()
        except UnreadableImage as error:  # the rest of a shard, which takes no picture's place
            lost = (*lost, error.name)
        empty = empty + 1 if number < 0 else 0
        if empty > order.shards:
            raise ValueError(f"data: no pictures in {empty} shards one after the other{_last(lost)}")
        turn, row = turn + order.lanes, 0


def _last(lost: tuple[str, ...]) -> str:
    return f", the last of them {lost[-1]}" if lost else ""
