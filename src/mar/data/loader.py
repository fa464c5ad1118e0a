"""Batches of pictures for training, read ahead by workers, resumable at any position."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mar.data.order import Order, flipped
from mar.data.sources import Source, UnreadableImage
from mar.data.transforms import Transform

logger = logging.getLogger("mar.data")

# So many broken pictures in a row are no accident: the data as a whole is not what it should be.
_PATIENCE = 1000


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch."""

    images: Float[Tensor, "n c H W"]
    """Pixels in [-1, 1]."""
    labels: Int[Tensor, "n"]
    """Class numbers; -1 where there is none."""
    positions: Int[Tensor, "n"]
    """Places in the endless order, by which everything random about a picture is keyed."""
    skipped: tuple[str, ...] = ()
    """Names of pictures that could not be read and were replaced by the next that could."""


@dataclass(frozen=True)
class _Item:
    image: Tensor
    label: int
    position: int
    skipped: tuple[str, ...]


class _Reader(Dataset[_Item]):
    """(position, index) -> item; what workers run."""

    def __init__(self, source: Source, transform: Transform, seed: int, flip: bool) -> None:
        self.source, self.transform, self.seed, self.flip = source, transform, seed, flip

    def __getitem__(self, key: tuple[int, int]) -> _Item:
        position, index = key
        flip = self.flip and flipped(self.seed, position)
        skipped: list[str] = []
        for offset in range(min(len(self.source), _PATIENCE)):
            try:
                example = self.source[(index + offset) % len(self.source)]
            except UnreadableImage as error:
                skipped.append(error.name)
                continue
            return _Item(self.transform(example.image, flip), example.label, position, tuple(skipped))
        raise ValueError(f"{len(skipped)} pictures in a row can't be read, the last of them {skipped[-1]}")


def _collate(items: Sequence[_Item]) -> Batch:
    return Batch(
        images=torch.stack([item.image for item in items]),
        labels=torch.tensor([item.label for item in items]),
        positions=torch.tensor([item.position for item in items]),
        skipped=tuple(name for item in items for name in item.skipped),
    )


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a group; a worker that dies of them would stop the run from saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(
    source: Source,
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
    that its pictures may be. A picture that can't be read is replaced by the next of the source that can, named once
    in a warning, and listed in `Batch.skipped`. Neither `workers` nor reading ahead changes what is yielded, and no
    global random state is used.
    """
    order = Order(len(source), seed, batch, rank, world)
    flip = source.flips if flip is None else flip
    loader = DataLoader(
        _Reader(source, transform, seed, flip),
        batch_sampler=order.batches(start),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_run,
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
