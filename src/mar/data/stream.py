"""Streams: shards of images, read from their beginning, and their order.

`datasets`, torchdata and grain save a position for each process or worker, so a run can't go on in the same order with
another number of them. Here the order follows from seed, batch size and shards alone, and a position is three numbers
for each open shard; files, formats and networks are left to `datasets`.

The order: shards are shuffled anew each epoch, and the epochs form one endless row of shards. Reader r of R reads the
shards r, r + R, r + 2R, ... of that row, so each shard of an epoch is read by one reader, once. Readers begin the next
epoch independently, so epochs overlap by about the open shards. A batch has equally many images of every reader, in the
readers' order; a process runs only the readers of its share. A reader shuffles its images by blocks, which end with the
epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from mar import distributed
from mar.data.accounts import Account
from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import LabelError, check_label
from mar.random import make_generator, permutation

logger = logging.getLogger("mar.data")

MAX_READERS = 32
"""Shards, at most, that are open at a time over all processes. Beyond so many processes, several read the same."""
SHUFFLE_WINDOW = 2048
"""Images, over all readers, that are shuffled together. About twice as many are held in memory."""

_BLOCK = 0xB10C  # keys the shuffling of blocks, beside the keys of mar.data.loader


@dataclass(frozen=True)
class StreamSample:
    """An image of a shard, not decoded yet."""

    name: str
    data: bytes | None = None
    """The image file."""
    path: str | None = None
    """Path or URL of the image file, if `data` is None."""
    label: int = -1
    unreadable: tuple[str, ...] = ()
    """Names of the ends of shards before it that could not be read."""
    captions: tuple[str, ...] = ()
    """Captions of the image; none, or several."""
    problem: str = ""
    """Error of its label, raised when the image is used."""


@runtime_checkable
class Shards(Protocol):
    """The shards of a stream. Picklable, so that workers can have a copy."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the shards, by number."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty: images have no classes."""

    def samples(self, shard: int) -> Iterator[StreamSample]:
        """Yield the images of a shard. Raises UnreadableImage for the rest if it breaks off."""

    def fetch(self, sample: StreamSample) -> bytes:
        """Read the file at the path of a sample. Raises UnreadableImage."""


class ShardCursor(NamedTuple):
    """The beginning of a block of a reader's images."""

    images_read: int
    """Images of this reader before the block."""
    shard_index: int
    """Position of its shard in the endless row of shards."""
    sample: int
    """Number of its first image in that shard."""


class StreamSource:
    """Shards to train on, and the position in them.

    `cursors`: by reader of this process, the beginning of the block in which the last batch ended. `first_position` and
    `first_epoch`: those at which the order began.
    """

    flips = True

    def __init__(self, shards: Shards, name: str, account: Account | None = None) -> None:
        self.shards, self.name, self.account = shards, name, account
        self.first_position, self.first_epoch = 0, 0
        self.cursors: dict[int, ShardCursor] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty: images have no classes."""
        return self.shards.classes

    def example(self, sample: StreamSample) -> Example:
        """Decode a sample. Raises UnreadableImage, or ValueError for a label out of range."""
        if sample.problem:
            raise LabelError(sample.problem)
        if sample.data is None and sample.path is None:
            raise UnreadableImage(sample.name, "the cell is empty")
        check_label(sample.name, sample.label, len(self.classes))
        data = self.shards.fetch(sample) if sample.data is None else sample.data
        return Example(decode_image(BytesIO(data), sample.name), sample.label, sample.name, sample.captions)

    def preview(self) -> Iterator[StreamSample]:
        """Yield images of at most MAX_READERS shards, one of each in turn."""
        count = len(self.shards.names)
        chosen = min(count, MAX_READERS)
        open_shards = [self._readable(i * count // chosen) for i in range(chosen)]
        while open_shards:
            heads = [(shard, list(islice(shard, 1))) for shard in open_shards]
            open_shards = [shard for shard, head in heads if head]
            yield from (sample for _, head in heads for sample in head)

    def _readable(self, shard: int) -> Iterator[StreamSample]:
        try:
            yield from self.shards.samples(shard)
        except UnreadableImage as error:
            logger.warning("skipped what can't be read: %s", error.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of all processes together. Each of them has to call it."""
        cursors: dict[int, ShardCursor] = {}
        for of_rank in distributed.all_gather_object(self.cursors):
            for reader, cursor in of_rank.items():
                # If several processes run a reader, the cursor of the last one serves all.
                cursors[reader] = min(cursor, cursors.get(reader, cursor))
        return {  # the keys are those of version 0.1, here and in `_shards_digest`
            "shards": self._shards_digest(),
            "begun": self.first_position,
            "epoch": self.first_epoch,
            "places": [[reader, *cursor] for reader, cursor in sorted(cursors.items())],
        }

    def load_state_dict(self, state: dict[str, Any], images: int) -> str:
        """Resume from a saved state after `images` images. Returns a line for the log."""
        self.first_position, self.first_epoch = state["begun"], state["epoch"]
        self.cursors = {reader: ShardCursor(*cursor) for reader, *cursor in state["places"]}
        before, now = state["shards"], self._shards_digest()
        if before != now:
            last = max((cursor.shard_index for cursor in self.cursors.values()), default=0)
            self.first_position, self.cursors = images, {}
            self.first_epoch += last // before["count"] + 1
            return (
                f"the shards are not those of when the run was saved ({now['count']} now, {before['count']} then): "
                "it begins a new epoch, and what the last one had shown already comes again"
            )
        readers = len(self.cursors)  # none before the first batch
        of_each = (images - self.first_position) // max(readers, 1)
        skipped = sum(cursor.sample + of_each - cursor.images_read for cursor in self.cursors.values())
        return (
            f"the stream goes on where it was: 0 pictures are repeated; {skipped:,} pictures of the {readers} open "
            "shards are read past to get there"
        )

    def has_shards(self, state: Mapping[str, Any]) -> bool:
        """Tell if the shards are those of a saved state."""
        return bool(state["shards"] == self._shards_digest())

    def _shards_digest(self) -> dict[str, Any]:
        names = self.shards.names
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        return {"count": len(names), "sha256": digest, "lanes": MAX_READERS, "window": SHUFFLE_WINDOW}


@dataclass(frozen=True)
class StreamSampler:
    """The order of shards for batches of `batch` images over all processes.

    The order begins at image `first_position` with epoch `first_epoch`.
    """

    num_shards: int
    seed: int
    batch: int
    first_position: int = 0
    first_epoch: int = 0

    def __post_init__(self) -> None:
        if self.num_shards < 1 or self.batch < 1:
            raise ValueError(
                f"stream: got {self.num_shards} shards and a batch of {self.batch}, expected at least 1 each"
            )

    @cached_property
    def num_readers(self) -> int:
        """Number of shards open at a time; it divides the batch."""
        most = min(self.num_shards, MAX_READERS)
        return max(readers for readers in range(1, most + 1) if self.batch % readers == 0)

    @property
    def images_per_reader(self) -> int:
        """Images of a batch that come from each reader."""
        return self.batch // self.num_readers

    def shard(self, shard_index: int) -> int:
        """Return the shard at an index of the endless row of shards."""
        epoch, within = divmod(shard_index, self.num_shards)
        return int(permutation(self.num_shards, self.seed, self.first_epoch + epoch)[within])

    def images_before(self, position: int) -> int:
        """Count each reader's images before the batch at `position`. Raises ValueError within a batch."""
        batches, rest = divmod(position - self.first_position, self.batch)
        if rest or batches < 0:
            raise ValueError(
                f"stream: no batch of {self.batch} begins at picture {position} (first: {self.first_position})"
            )
        return batches * self.images_per_reader


class SampleWithFallbacks(NamedTuple):
    """The next image of a reader, and fallbacks for a broken one."""

    block: ShardCursor
    """The beginning of its block."""
    sample: StreamSample
    fallbacks: list[StreamSample]
    """The others of its block, then those of the next block that have been read."""


class ShardReader:
    """The endless images of reader number `number`, from a cursor on."""

    def __init__(self, shards: Shards, order: StreamSampler, number: int, cursor: ShardCursor | None = None) -> None:
        """Open the first shard.

        Args:
            shards: the shards to read.
            order: which of them, one after the other.
            number: number of this reader.
            cursor: where to begin; None: at the reader's first shard.
        """
        self.order, self.number = order, number
        cursor = cursor or ShardCursor(0, number, 0)
        self.images_read = cursor.images_read
        self._samples = _endless_samples(shards, order, cursor.shard_index, cursor.sample)
        self._head = next(self._samples)
        self._next_block: list[tuple[int, int, StreamSample]] = []  # as far as it has been read

    def __iter__(self) -> Iterator[SampleWithFallbacks]:
        while True:
            while self._extend_block():
                pass
            shard_index, sample, _ = self._next_block[0]
            start = ShardCursor(self.images_read, shard_index, sample)
            key = make_generator(self.order.seed, _BLOCK, self.number, self.images_read)
            block = [self._next_block[i][2] for i in torch.randperm(len(self._next_block), generator=key).tolist()]
            self._next_block = []
            for offset in range(len(block)):
                self._extend_block()  # reads one image for each one yielded: no step waits for a whole block
                ahead = [sample for _, _, sample in self._next_block]
                yield SampleWithFallbacks(start, block[offset], block[offset + 1 :] + block[:offset] + ahead)
            self.images_read += len(block)

    def _extend_block(self) -> bool:
        """Read one more image of the next block; False if the block is complete."""
        block_size = max(1, SHUFFLE_WINDOW // self.order.num_readers)
        epochs = {shard_index // self.order.num_shards for shard_index, _, _ in (self._head, *self._next_block[:1])}
        if len(self._next_block) == block_size or len(epochs) > 1:
            return False
        self._next_block.append(self._head)
        self._head = next(self._samples)
        return True


def _endless_samples(
    shards: Shards, order: StreamSampler, shard_index: int, first: int
) -> Iterator[tuple[int, int, StreamSample]]:
    """Yield (shard index, number in the shard, sample) without end. Raises ValueError if all shards are empty."""
    empty, unreadable = 0, tuple[str, ...]()
    while True:
        number = -1
        try:
            for number, sample in enumerate(shards.samples(order.shard(shard_index))):
                if number >= first:
                    yield shard_index, number, replace(sample, unreadable=unreadable) if unreadable else sample
                    unreadable = ()
        except UnreadableImage as error:  # the rest of a shard: it takes no image's place
            unreadable = (*unreadable, error.name)
        empty = empty + 1 if number < 0 else 0
        if empty > order.num_shards:
            last = f", the last of them {unreadable[-1]}" if unreadable else ""
            raise ValueError(f"data: no pictures in {empty} shards one after the other{last}")
        shard_index, first = shard_index + order.num_readers, 0
