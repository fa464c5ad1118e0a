"""The order in which training sees its pictures: endless, shuffled anew each epoch, and known at any position.

A position counts the pictures that all ranks together have seen. Everything random about a picture is keyed by its
position, so that a run can stop anywhere, go on with other workers or another world size, and see the same.

What is changed of a picture before it is learned from, at random: it may be mirrored, and moved by a few pixels.

What data loading hands to training: batches of tensors, and how they are put together.

Batches of a stream: each process reads the lanes that its share of a batch comes from, each worker some of these.

Batches of pictures, or of their cached latents, for training: read ahead by workers, resumable at any position.
"""

from __future__ import annotations

import atexit
import functools
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mar.config import ConfigError
from mar.data.images import Example, Source, Transform, UnreadableImage
from mar.data.labels import check_label
from mar.data.latent_cache import LatentSource, unpack
from mar.data.stream import SampleWithFallbacks, ShardCursor, ShardReader, StreamSampler, StreamSource
from mar.random import hash_seed, permutation
from mar.tokenizer.base import LatentMoments

# Each use of a seed has a stream of its own.
_FLIP, _MOVE = 0xF11B, 0x30BE


def random_flip(seed: int, position: int) -> bool:
    """Whether the picture at `position` is mirrored: a fair coin of its own."""
    return bool(hash_seed(seed, _FLIP, position) >> 63)


def random_shift(seed: int, position: int, most: int) -> tuple[int, int]:
    """By how many pixels the picture at `position` is moved down and to the right: each of -most to most alike."""
    down, right = (hash_seed(seed, _MOVE, position, axis) % (2 * most + 1) - most for axis in (0, 1))
    return down, right


@dataclass(frozen=True)
class InfiniteSampler:
    """What rank `rank` of `world` reads of an endless shuffled sequence of `length` pictures, in batches.

    `batch` pictures are a batch of all ranks together; a rank takes the `rank`-th of `world` equal slices of each.
    """

    length: int
    seed: int
    batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length: got {self.length}, expected at least one picture")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: got {self.rank}, expected 0 to {self.world - 1}")
        if self.batch < 1 or self.batch % self.world:
            raise ValueError(f"batch: got {self.batch}, expected a positive multiple of the {self.world} processes")

    def index(self, position: int) -> int:
        """The picture at a position."""
        return self.indices(position, 1)[0]

    def indices(self, first: int, count: int) -> list[int]:
        """The pictures at `count` positions from `first` on."""
        found: list[int] = []
        while count > len(found):
            epoch, within = divmod(first + len(found), self.length)
            order = permutation(self.length, self.seed, epoch)
            found += order[within : within + count - len(found)].tolist()
        return found

    def batches(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Lists of (position, index), without end, the first global batch beginning at position `start`."""
        share = self.batch // self.world
        first = start + self.rank * share
        while True:
            yield list(zip(range(first, first + share), self.indices(first, share), strict=True))
            first += self.batch


@dataclass(frozen=True)
class Augmentation:
    """What is changed of one picture."""

    flip: bool = False
    down: int = 0
    """Pixels that it is moved by, of what it was cut to; negative ones are upwards."""
    right: int = 0

    def __call__(self, pixels: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """The changed picture: moved, its edges repeated where nothing else is, and then mirrored."""
        if self.down or self.right:
            height, width = pixels.shape[-2:]
            rows = (torch.arange(height) - self.down).clamp(0, height - 1)
            columns = (torch.arange(width) - self.right).clamp(0, width - 1)
            pixels = pixels[:, rows][:, :, columns]
        return pixels.flip(-1) if self.flip else pixels


NO_AUGMENTATION = Augmentation()
"""Nothing."""


@dataclass(frozen=True)
class Augmentations:
    """What is changed of the picture at every position of an order, keyed by its seed."""

    seed: int
    flip: bool
    """Whether every other picture is mirrored."""
    shift: int
    """Pixels that a picture is moved by each way, at most."""

    def at(self, position: int) -> Augmentation:
        """That of the picture at a position."""
        down, right = random_shift(self.seed, position, self.shift) if self.shift else (0, 0)
        return Augmentation(self.flip and random_flip(self.seed, position), down, right)


logger = logging.getLogger("mar.data")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch: of pictures (`ImageBatch`), or of what a tokenizer said of them (`LatentBatch`)."""

    labels: Int[Tensor, "n"]
    """Class numbers; -1 where there is none."""
    positions: Int[Tensor, "n"]
    """Places in the endless order, by which everything random about a picture is keyed."""
    skipped: tuple[str, ...]
    """Names of pictures that could not be read and were replaced by the next that could."""


@dataclass(frozen=True)
class ImageBatch(Batch):
    """A batch of pictures."""

    images: Float[Tensor, "n c H W"]
    """Pixels in [-1, 1]."""


@dataclass(frozen=True)
class LatentBatch(Batch):
    """A batch from a latent cache."""

    moments: LatentMoments


@dataclass(frozen=True)
class Item:
    """One picture of a batch: its pixels, or its moments."""

    content: Tensor
    label: int
    position: int
    skipped: tuple[str, ...]


def collate_images(items: Sequence[Item]) -> ImageBatch:
    """A batch of pictures."""
    return ImageBatch(**_shared(items), images=torch.stack([item.content for item in items]))


def collate_latents(items: Sequence[Item]) -> LatentBatch:
    """A batch of moments."""
    return LatentBatch(**_shared(items), moments=unpack(torch.stack([item.content for item in items])))


def _shared(items: Sequence[Item]) -> dict[str, Any]:
    return {
        "labels": torch.tensor([item.label for item in items]),
        "positions": torch.tensor([item.position for item in items]),
        "skipped": tuple(name for item in items for name in item.skipped),
    }


def collate(build: Callable[[Sequence[Item]], Batch], items: Sequence[Item | ValueError]) -> Batch | ValueError:
    """The batch that `build` makes of `items`, or the first error among them.

    Errors are handed on and not raised by workers, whose tracebacks PyTorch makes the message.
    """
    failed = next((item for item in items if isinstance(item, ValueError)), None)
    return failed or build([item for item in items if isinstance(item, Item)])


def make_dataloader(
    data: Dataset[Any], *, workers: int, batches: Iterable[list[Any]] | None, collate: Callable[[Any], Any]
) -> Iterator[Any]:
    """What `collate` makes of the items of each of `batches`, read by so many workers; None: of each item that an
    iterable dataset yields. No global random state is used."""
    reads = iter(
        DataLoader(
            data,
            batch_size=None if batches is None else 1,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else it would draw from the global one
        )
    )
    for worker in getattr(reads, "_workers", ()):
        worker.terminate = worker.kill  # since they ignore the other signal
        _open_iterators.add(reads)
    return reads


_open_iterators: WeakSet[Any] = WeakSet()
"""The iterators that have workers."""


@atexit.register
def _end_workers() -> None:
    """Of iterators that nobody closed: the process would wait for them without end."""
    for reads in [*_open_iterators]:
        reads._shutdown_workers()


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a group; a worker that dies of them would stop the run from saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def log_skipped(batches: Iterator[Batch | ValueError]) -> Iterator[Batch]:
    """The same batches; what they had to skip is named in a warning, each name once. Raises the errors among them."""
    known: set[str] = set()
    try:
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            for name in batch.skipped:
                if name not in known:
                    known.add(name)
                    logger.warning("skipped a picture that can't be read: %s", name)
            yield batch
    finally:
        del batches  # an error's traceback keeps this frame: it shall not keep the loader's workers, too


class _Part(NamedTuple):
    """What one worker has of a batch, and where its lanes stand then."""

    batch: ImageBatch
    places: dict[int, ShardCursor]


class _Feed(IterableDataset[_Part | ValueError]):
    """The parts of a process's batches, without end, or why there are no more; what workers run."""

    def __init__(
        self,
        source: StreamSource,
        order: StreamSampler,
        transform: Transform,
        changes: Augmentations,
        slots: range,
        start: int,
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
            places: dict[int, ShardCursor] = {}
            for lane, pictures in lanes.items():
                for slot in range(lane * self.order.width, (lane + 1) * self.order.width):
                    taken = next(pictures)
                    places[lane] = taken.start
                    if slot in self.slots:
                        items.append(self._item(taken, first + slot))
            yield _Part(collate_images(items), places)

    def _open(self, lane: int) -> Iterator[SampleWithFallbacks]:
        place = self.source.places.get(lane, ShardCursor(0, lane, 0))
        pictures = ShardReader(self.source.shards, self.order, lane, place)
        return islice(pictures, self.order.needed(self.start) - place.taken, None)

    def _item(self, taken: SampleWithFallbacks, position: int) -> Item:
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
    source: StreamSource, transform: Transform, changes: Augmentations, *, batch: int, start: int = 0, rank: int = 0,
    world: int = 1, workers: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's batches of a stream, without end, from position `start`; `source` keeps up with what was yielded.

    All is as `mar.data.loader.batches` says, and the same for any number of workers and processes, which have to divide
    the batch. A picture that can't be read is replaced by another of its block.
    """
    if batch % world:
        raise ValueError(f"batch: got {batch}, expected a multiple of the {world} processes")
    order = StreamSampler(len(source.shards.names), changes.seed, batch, source.begun, source.epoch)
    share = batch // world
    slots = range(rank * share, (rank + 1) * share)
    feed = _Feed(source, order, transform, changes, slots, start)
    source.places = {lane: place for lane, place in source.places.items() if lane in feed.lanes}
    workers = min(workers, len(feed.lanes))
    reads = make_dataloader(feed, workers=workers, batches=None, collate=_as_it_is)
    return log_skipped(_joined(reads, source, max(workers, 1)))


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


__all__ = ["Batch", "ImageBatch", "LatentBatch", "batches", "in_order"]

logger = logging.getLogger("mar.data")

# So many broken pictures in a row are no accident: the data as a whole is not what it should be.
_MAX_UNREADABLE = 1000

Read = Callable[[int, Augmentation], tuple[Tensor, int]]
"""(index, what is changed) -> a picture's pixels, or its moments, and its class number."""


@dataclass(frozen=True)
class _ImageReader:
    source: Source
    transform: Transform

    def read(self, index: int, change: Augmentation) -> tuple[Tensor, int]:
        example = self.source[index]
        check_label(example.name, example.label, len(self.source.classes))
        return change(self.transform(example.image)), example.label


@dataclass(frozen=True)
class _LatentReader:
    source: LatentSource

    def read(self, index: int, change: Augmentation) -> tuple[Tensor, int]:
        if change.down or change.right:
            raise ConfigError(f"{self.source.folder} holds latents, which can't be moved; train with --shift 0")
        return self.source.read(index, change.flip)


def _read_function(source: Source | LatentSource, transform: Transform) -> Read:
    return _LatentReader(source).read if isinstance(source, LatentSource) else _ImageReader(source, transform).read


class _Dataset(Dataset[Item | ValueError]):
    """(position, index) -> item, or why there is none; what workers run."""

    def __init__(self, read: Read, length: int, changes: Augmentations) -> None:
        self.read, self.length, self.changes = read, length, changes

    def __getitem__(self, key: tuple[int, int]) -> Item | ValueError:
        try:
            return self._item(*key)
        except ValueError as error:
            return error

    def _item(self, position: int, index: int) -> Item:
        change = self.changes.at(position)
        skipped: list[str] = []
        for offset in range(min(self.length, _MAX_UNREADABLE)):
            try:
                content, label = self.read((index + offset) % self.length, change)
            except UnreadableImage as error:
                skipped.append(error.name)
                continue
            return Item(content, label, position, tuple(skipped))
        raise ValueError(f"{len(skipped)} pictures in a row can't be read, the last of them {skipped[-1]}")


def read_plain(source: Source | LatentSource, transform: Transform, numbers: Sequence[int]) -> Batch | None:
    """The pictures of these numbers, unchanged, whose positions are their numbers. Those that can't be read are left
    out, each with a warning; None where none can."""
    read, items = _read_function(source, transform), []
    for number in numbers:
        try:
            items.append(Item(*read(number, NO_AUGMENTATION), number, ()))
        except UnreadableImage as error:
            logger.warning("skipped a picture that can't be read: %s", error.name)
    return _collate_function(source)(items) if items else None


def _collate_function(source: Source | LatentSource) -> Callable[[Sequence[Item]], Batch]:
    return collate_latents if isinstance(source, LatentSource) else collate_images


def batches(
    source: Source | LatentSource | StreamSource,
    transform: Transform,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    flip: bool | None = None,
    shift: int = 0,
) -> Iterator[Batch]:
    """This rank's batches, without end, from position `start` of the order keyed by `seed`.

    `batch` counts the pictures of all ranks. `flip` mirrors every other picture at random; None: if the source says
    that its pictures may be. `shift` moves each at random by up to so many pixels up or down, and to the left or right.
    From a latent cache, whose pictures were transformed when it was made, come moments: for the same positions, flips
    and labels as from its pictures, which can't be moved (ConfigError). A picture that can't be read is replaced by the
    next of the source that can, named once in a warning, and listed in `Batch.skipped`. Neither `workers` nor reading
    ahead changes what is yielded, and no global random state is used.
    """
    changes = Augmentations(seed, source.flips if flip is None else flip, shift)
    if isinstance(source, StreamSource):
        return stream_batches(
            source, transform, changes, batch=batch, start=start, rank=rank, world=world, workers=workers
        )
    order = InfiniteSampler(len(source), seed, batch, rank, world)
    reads = make_dataloader(
        _Dataset(_read_function(source, transform), len(source), changes),
        workers=workers,
        batches=order.batches(start),
        collate=functools.partial(collate, _collate_function(source)),
    )
    return log_skipped(reads)


def in_order(
    source: Source | StreamSource, transform: Transform, *, batch: int = 64, limit: int | None = None
) -> Iterator[Float[Tensor, "n c H W"]]:
    """Every picture once, in the source's order, unchanged; at most `limit`. Those that can't be read are left out,
    each with a warning. Of a stream, pictures of some of its shards (`StreamSource.some`)."""
    pending: list[Tensor] = []
    for read in _reads(source, limit):
        try:
            pending.append(transform(read().image))
        except UnreadableImage as error:
            logger.warning("skipped a picture that can't be read: %s", error.name)
        if len(pending) == batch:
            yield torch.stack(pending)
            pending = []
    if pending:
        yield torch.stack(pending)


def _reads(source: Source | StreamSource, limit: int | None) -> Iterator[Callable[[], Example]]:
    if isinstance(source, StreamSource):
        for row in islice(source.some(), limit):
            yield functools.partial(source.example, row)
    else:
        for index in range(len(source) if limit is None else min(limit, len(source))):
            yield functools.partial(source.__getitem__, index)
