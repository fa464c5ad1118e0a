"""Batches of pictures, or of their cached latents, for training: read ahead by workers, resumable at any position."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mar.data.latents import LatentSource, unpack
from mar.data.order import Order, flipped
from mar.data.sources import Source, UnreadableImage
from mar.data.transforms import Transform
from mar.tokenizer.moments import LatentMoments

logger = logging.getLogger("mar.data")

# So many broken pictures in a row are no accident: the data as a whole is not what it should be.
_PATIENCE = 1000


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


Read = Callable[[int, bool], tuple[Tensor, int]]
"""(index, flip) -> a picture's pixels, or its moments, and its class number."""


@dataclass(frozen=True)
class _Item:
    content: Tensor
    label: int
    position: int
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class _Pictures:
    source: Source
    transform: Transform

    def read(self, index: int, flip: bool) -> tuple[Tensor, int]:
        example = self.source[index]
        return self.transform(example.image, flip), example.label


def _reading(source: Source | LatentSource, transform: Transform) -> Read:
    return source.read if isinstance(source, LatentSource) else _Pictures(source, transform).read


class _Reader(Dataset[_Item]):
    """(position, index) -> item; what workers run."""

    def __init__(self, read: Read, length: int, seed: int, flip: bool) -> None:
        self.read, self.length, self.seed, self.flip = read, length, seed, flip

    def __getitem__(self, key: tuple[int, int]) -> _Item:
        position, index = key
        flip = self.flip and flipped(self.seed, position)
        skipped: list[str] = []
        for offset in range(min(self.length, _PATIENCE)):
            try:
                content, label = self.read((index + offset) % self.length, flip)
            except UnreadableImage as error:
                skipped.append(error.name)
                continue
            return _Item(content, label, position, tuple(skipped))
        raise ValueError(f"{len(skipped)} pictures in a row can't be read, the last of them {skipped[-1]}")


def read_plain(source: Source | LatentSource, transform: Transform, numbers: Sequence[int]) -> Batch | None:
    """The pictures of these numbers, not mirrored, whose positions are their numbers. Those that can't be read are left
    out, each with a warning; None where none can."""
    read, items = _reading(source, transform), []
    for number in numbers:
        try:
            items.append(_Item(*read(number, False), number, ()))
        except UnreadableImage as error:
            logger.warning("skipped a picture that can't be read: %s", error.name)
    return _collating(source)(items) if items else None


def _collating(source: Source | LatentSource) -> Callable[[Sequence[_Item]], Batch]:
    return _latents if isinstance(source, LatentSource) else _images


def _images(items: Sequence[_Item]) -> Batch:
    return ImageBatch(**_shared(items), images=torch.stack([item.content for item in items]))


def _latents(items: Sequence[_Item]) -> Batch:
    return LatentBatch(**_shared(items), moments=unpack(torch.stack([item.content for item in items])))


def _shared(items: Sequence[_Item]) -> dict[str, Any]:
    return {
        "labels": torch.tensor([item.label for item in items]),
        "positions": torch.tensor([item.position for item in items]),
        "skipped": tuple(name for item in items for name in item.skipped),
    }


def leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a group; a worker that dies of them would stop the run from saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(
    source: Source | LatentSource,
    transform: Transform,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    flip: bool | None = None,
) -> Iterator[Batch]:
    """This rank's batches, without end, from position `start` of the order keyed by `seed`.

    `batch` counts the pictures of all ranks. `flip` mirrors every other picture at random; None: if the source says
    that its pictures may be. From a latent cache, whose pictures were transformed when it was made, come moments: for
    the same positions, flips and labels as from its pictures. A picture that can't be read is replaced by the next of
    the source that can, named once in a warning, and listed in `Batch.skipped`. Neither `workers` nor reading ahead
    changes what is yielded, and no global random state is used.
    """
    order = Order(len(source), seed, batch, rank, world)
    flip = source.flips if flip is None else flip
    loader = DataLoader(
        _Reader(_reading(source, transform), len(source), seed, flip),
        batch_sampler=order.batches(start),
        num_workers=workers,
        collate_fn=_collating(source),
        worker_init_fn=leave_signals_to_the_run,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    return _announced(iter(loader))


def _announced(items: Iterator[Batch]) -> Iterator[Batch]:
    known: set[str] = set()
    for item in items:
        for name in item.skipped:
            if name not in known:
                known.add(name)
                logger.warning("skipped a picture that can't be read: %s", name)
        yield item


def in_order(
    source: Source, transform: Transform, *, batch: int = 64, limit: int | None = None
) -> Iterator[Float[Tensor, "n c H W"]]:
    """Every picture once, in the source's order, not mirrored; at most `limit`. Those that can't be read are left out,
    each with a warning."""
    pending: list[Tensor] = []
    for index in range(len(source) if limit is None else min(limit, len(source))):
        try:
            pending.append(transform(source[index].image, False))
        except UnreadableImage as error:
            logger.warning("skipped a picture that can't be read: %s", error.name)
        if len(pending) == batch:
            yield torch.stack(pending)
            pending = []
    if pending:
        yield torch.stack(pending)
