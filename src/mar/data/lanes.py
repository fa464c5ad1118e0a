"""The order in which training sees the pictures of a stream: it is the same for any number of processes and workers.

Shards are shuffled anew each epoch, one epoch after the other in an endless row: their turns. Lane l of L reads turns
l, l + L, l + 2L, ...: each shard of an epoch is read by one lane, once. Lanes begin the next epoch each by itself, so
that epochs overlap by about the open shards. A batch has equally many pictures of every lane, in the lanes' order: a
process reads only the lanes that its share of a batch comes from. Within a lane, pictures are shuffled by blocks, which
end with the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from mar.data.examples import UnreadableImage
from mar.data.order import permutation
from mar.data.streams import LANES, WINDOW, Place, Row, Shards
from mar.runtime import generator

_BLOCK = 0xB10C  # key of the shuffling of blocks, beside those of mar.data.order


class Taken(NamedTuple):
    """The next picture of a lane, and those that stand in where it can't be read: the others of its block, then those
    of the next block that have been read."""

    start: Place
    """Where the block begins."""
    row: Row
    others: list[Row]


@dataclass(frozen=True)
class StreamOrder:
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


class Lane:
    """The endless pictures of a lane, from a place on."""

    def __init__(self, shards: Shards, order: StreamOrder, number: int, place: Place | None = None) -> None:
        self.order, self.number = order, number
        place = place or Place(0, number, 0)
        self.taken = place.taken
        self.reader = _read(shards, order, place.turn, place.row)
        self.head = next(self.reader)
        self.ahead: list[tuple[int, int, Row]] = []
        """What of the next block has been read."""

    def _grow(self) -> bool:
        """Reads one more picture of the next block; False where the block is whole."""
        epochs = [turn // self.order.shards for turn, _, _ in (self.head, *self.ahead[:1])]
        if len(self.ahead) == max(1, WINDOW // self.order.lanes) or len(set(epochs)) > 1:
            return False
        self.ahead.append(self.head)
        self.head = next(self.reader)
        return True

    def __iter__(self) -> Iterator[Taken]:
        while True:
            while self._grow():
                pass
            turn, row, _ = self.ahead[0]
            start = Place(self.taken, turn, row)
            key = generator(self.order.seed, _BLOCK, self.number, self.taken)
            rows = [self.ahead[i][2] for i in torch.randperm(len(self.ahead), generator=key).tolist()]
            self.ahead = []
            for offset in range(len(rows)):
                self._grow()  # one is read as one is taken, so that no step waits for a whole block
                ahead = [found for _, _, found in self.ahead]
                yield Taken(start, rows[offset], rows[offset + 1 :] + rows[:offset] + ahead)
            self.taken += len(rows)


def _read(shards: Shards, order: StreamOrder, turn: int, row: int) -> Iterator[tuple[int, int, Row]]:
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
