"""Pictures in passing: shards that are read from their beginning, near or far, and never counted.

The order in which training sees them is `mar.data.lanes`' work. It is known at any position, like that of other
sources; but what is there has to be read through. So a run keeps where its open shards stand.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mar import runtime
from mar.data.classes import check_label
from mar.data.examples import Example, UnreadableImage, decode_image

logger = logging.getLogger("mar.data")

LANES = 32
"""Shards, at most, that are open at a time, over all processes: beyond so many processes, several read the same."""
WINDOW = 2048
"""Pictures, over all lanes, within which they are shuffled; about twice as many are held in memory."""


@dataclass(frozen=True)
class Row:
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

    def rows(self, shard: int) -> Iterator[Row]:
        """The pictures of a shard, from its first. UnreadableImage, for the rest of them, where it breaks off."""

    def fetch(self, row: Row) -> bytes:
        """The file of a row that only says where it is. UnreadableImage where it can't be read."""


class Place(NamedTuple):
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
        self.places: dict[int, Place] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty where pictures have no classes."""
        return self.shards.classes

    def example(self, row: Row) -> Example:
        """A row's picture. UnreadableImage for a broken one, ValueError for a label that is no class."""
        if row.data is None and row.path is None:
            raise UnreadableImage(row.name, "the cell is empty")
        check_label(row.name, row.label, len(self.classes))
        data = self.shards.fetch(row) if row.data is None else row.data
        return Example(decode_image(BytesIO(data), row.name), row.label, row.name)

    def some(self) -> Iterator[Row]:
        """Pictures of at most LANES shards in turns, the same ones each time."""
        count = len(self.shards.names)
        kept = min(count, LANES)
        open_shards = [self._readable(i * count // kept) for i in range(kept)]
        while open_shards:
            heads = [(shard, list(islice(shard, 1))) for shard in open_shards]
            open_shards = [shard for shard, head in heads if head]
            yield from (row for _, head in heads for row in head)

    def _readable(self, shard: int) -> Iterator[Row]:
        try:
            yield from self.shards.rows(shard)
        except UnreadableImage as error:
            logger.warning("skipped what can't be read: %s", error.name)

    def state_dict(self) -> dict[str, Any]:
        """How far all processes together have read; each of them has to call it."""
        places: dict[int, Place] = {}
        for part in runtime.gather(self.places):
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
        self.places = {lane: Place(*place) for lane, *place in state["places"]}
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
