"""What data loading hands to training: batches of tensors, and how they are put together."""

from __future__ import annotations

import atexit
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mar.data.latents import unpack
from mar.tokenizer.moments import LatentMoments

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


def images(items: Sequence[Item]) -> ImageBatch:
    """A batch of pictures."""
    return ImageBatch(**_shared(items), images=torch.stack([item.content for item in items]))


def latents(items: Sequence[Item]) -> LatentBatch:
    """A batch of moments."""
    return LatentBatch(**_shared(items), moments=unpack(torch.stack([item.content for item in items])))


def _shared(items: Sequence[Item]) -> dict[str, Any]:
    return {
        "labels": torch.tensor([item.label for item in items]),
        "positions": torch.tensor([item.position for item in items]),
        "skipped": tuple(name for item in items for name in item.skipped),
    }


def put_together(build: Callable[[Sequence[Item]], Batch], items: Sequence[Item | ValueError]) -> Batch | ValueError:
    """The batch that `build` makes of `items`, or the first error among them.

    Errors are handed on and not raised by workers, whose tracebacks PyTorch makes the message.
    """
    failed = next((item for item in items if isinstance(item, ValueError)), None)
    return failed or build([item for item in items if isinstance(item, Item)])


def read_ahead(
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
        _reading.add(reads)
    return reads


_reading: WeakSet[Any] = WeakSet()
"""The iterators that have workers."""


@atexit.register
def _end_workers() -> None:
    """Of iterators that nobody closed: the process would wait for them without end."""
    for reads in [*_reading]:
        reads._shutdown_workers()


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a group; a worker that dies of them would stop the run from saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def announced(batches: Iterator[Batch | ValueError]) -> Iterator[Batch]:
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
