"""Batches of pictures, or of their cached latents, for training: read ahead by workers, resumable at any position."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from mar.config import ConfigError
from mar.data.batch import (
    Batch,
    ImageBatch,
    Item,
    LatentBatch,
    announced,
    images,
    latents,
    put_together,
    read_ahead,
)
from mar.data.changes import PLAIN, Change, Changes
from mar.data.classes import check_label
from mar.data.examples import Example
from mar.data.feed import stream_batches
from mar.data.latents import LatentSource
from mar.data.order import Order
from mar.data.sources import Source, StreamSource, UnreadableImage
from mar.data.transforms import Transform

__all__ = ["Batch", "ImageBatch", "LatentBatch", "batches", "in_order"]

logger = logging.getLogger("mar.data")

# So many broken pictures in a row are no accident: the data as a whole is not what it should be.
_PATIENCE = 1000

Read = Callable[[int, Change], tuple[Tensor, int]]
"""(index, what is changed) -> a picture's pixels, or its moments, and its class number."""


@dataclass(frozen=True)
class _Pictures:
    source: Source
    transform: Transform

    def read(self, index: int, change: Change) -> tuple[Tensor, int]:
        example = self.source[index]
        check_label(example.name, example.label, len(self.source.classes))
        return change(self.transform(example.image)), example.label


@dataclass(frozen=True)
class _Latents:
    source: LatentSource

    def read(self, index: int, change: Change) -> tuple[Tensor, int]:
        if change.down or change.right:
            raise ConfigError(f"{self.source.folder} holds latents, which can't be moved; train with --shift 0")
        return self.source.read(index, change.flip)


def _reading(source: Source | LatentSource, transform: Transform) -> Read:
    return _Latents(source).read if isinstance(source, LatentSource) else _Pictures(source, transform).read


class _Reader(Dataset[Item | ValueError]):
    """(position, index) -> item, or why there is none; what workers run."""

    def __init__(self, read: Read, length: int, changes: Changes) -> None:
        self.read, self.length, self.changes = read, length, changes

    def __getitem__(self, key: tuple[int, int]) -> Item | ValueError:
        try:
            return self._item(*key)
        except ValueError as error:
            return error

    def _item(self, position: int, index: int) -> Item:
        change = self.changes.at(position)
        skipped: list[str] = []
        for offset in range(min(self.length, _PATIENCE)):
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
    read, items = _reading(source, transform), []
    for number in numbers:
        try:
            items.append(Item(*read(number, PLAIN), number, ()))
        except UnreadableImage as error:
            logger.warning("skipped a picture that can't be read: %s", error.name)
    return _building(source)(items) if items else None


def _building(source: Source | LatentSource) -> Callable[[Sequence[Item]], Batch]:
    return latents if isinstance(source, LatentSource) else images


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
    changes = Changes(seed, source.flips if flip is None else flip, shift)
    if isinstance(source, StreamSource):
        return stream_batches(
            source, transform, changes, batch=batch, start=start, rank=rank, world=world, workers=workers
        )
    order = Order(len(source), seed, batch, rank, world)
    reads = read_ahead(
        _Reader(_reading(source, transform), len(source), changes),
        workers=workers,
        batches=order.batches(start),
        collate=functools.partial(put_together, _building(source)),
    )
    return announced(reads)


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
