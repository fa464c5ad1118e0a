"""Batches for training: endless, shuffled, read ahead, resumable at any position.

A position counts the images that all ranks together have been given. Everything random about an image is keyed by its
position: a run may stop anywhere, go on with another number of workers or processes, and get the same batches.

Top to bottom: augmentation, batches, workers, then the readers of sources, caches and streams; last, what
`mar.training` calls: `batches`, `in_order`, `load_batch`, `data_state`, `resume_data`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mar.config import ConfigError
from mar.data.captions import Captions, captions_of, pick_caption
from mar.data.images import Example, Source, Transform, UnreadableImage, pixels_to_tensor, quick_digest
from mar.data.labels import check_label
from mar.data.latent_cache import LatentSource, split_moments
from mar.data.order import labels_to_balance, order_of
from mar.data.splits import Subset
from mar.data.stream import SampleWithFallbacks, ShardCursor, ShardReader, StreamSampler, StreamSource
from mar.data.workers import make_dataloader
from mar.random import hash_seed
from mar.tokenizer.base import LatentMoments

logger = logging.getLogger("mar.data")

MAX_UNREADABLE = 1000
"""More broken images in a row mean that the data as a whole is broken."""

# Each use of a seed has a stream of its own.
_FLIP, _SHIFT = 0xF11B, 0x30BE


# ---- augmentation


@dataclass(frozen=True)
class Augmentation:
    """The random change of one image: a shift, then a flip."""

    flip: bool = False
    down: int = 0
    """Pixels to shift by, after cropping; negative: upwards."""
    right: int = 0

    def __call__(self, pixels: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """Shift the image, repeating its edges, and flip it."""
        if self.down or self.right:
            height, width = pixels.shape[-2:]
            rows = (torch.arange(height) - self.down).clamp(0, height - 1)
            columns = (torch.arange(width) - self.right).clamp(0, width - 1)
            pixels = pixels[:, rows][:, :, columns]
        return pixels.flip(-1) if self.flip else pixels


NO_AUGMENTATION = Augmentation()
"""Images as they are."""


@dataclass(frozen=True)
class Augmentations:
    """The augmentation at every position of an order, keyed by its seed."""

    seed: int
    flip: bool
    """True: every other image is mirrored."""
    shift: int
    """The most pixels that an image is shifted by each way."""

    def at(self, position: int) -> Augmentation:
        """Return the augmentation of the image at a position."""
        down, right = random_shift(self.seed, position, self.shift) if self.shift else (0, 0)
        return Augmentation(self.flip and random_flip(self.seed, position), down, right)


def random_flip(seed: int, position: int) -> bool:
    """Draw, by a fair coin, if the image at `position` is mirrored."""
    return bool(hash_seed(seed, _FLIP, position) >> 63)


def random_shift(seed: int, position: int, most: int) -> tuple[int, int]:
    """Draw the shift (down, right) at `position`, each uniform in [-most, most]."""
    down, right = (hash_seed(seed, _SHIFT, position, axis) % (2 * most + 1) - most for axis in (0, 1))
    return down, right


# ---- batches


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch: images (`ImageBatch`) or their latents (`LatentBatch`)."""

    labels: Int[Tensor, "n"]
    """Class numbers; -1: none."""
    positions: Int[Tensor, "n"]
    """Positions in the endless order, which key everything random about an image."""
    skipped: tuple[str, ...]
    """Names of images that could not be read and were replaced by others."""
    captions: tuple[str, ...] = field(default=(), kw_only=True)
    """A caption of each image, "" for none; or none at all."""
    draws: Mapping[str, Shaped[Tensor, "n ..."]] = field(default_factory=dict, kw_only=True)
    """Random numbers of a `DrawFunction`, a row for each image."""

    def pin_memory(self) -> Batch:
        """Copy all tensors to pinned memory, for asynchronous copies to CUDA."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned = {name: value.pin_memory() for name, value in content.items() if hasattr(value, "pin_memory")}
        return replace(self, **pinned, draws={name: rows.pin_memory() for name, rows in self.draws.items()})


@dataclass(frozen=True)
class ImageBatch(Batch):
    """A batch of images."""

    images: Float[Tensor, "n c H W"]
    """Pixels in [-1, 1]."""


@dataclass(frozen=True)
class LatentBatch(Batch):
    """A batch from a latent cache."""

    moments: LatentMoments


AnyBatch = TypeVar("AnyBatch", bound=Batch)
"""A batch, or a kind of it."""


@dataclass(frozen=True)
class LoadedSample:
    """One image of a batch: its pixels, or its moments."""

    content: Tensor
    label: int
    position: int
    skipped: tuple[str, ...]
    caption: str = ""


def collate_images(samples: Sequence[LoadedSample]) -> ImageBatch:
    """Stack images to a batch."""
    return ImageBatch(**_batch_fields(samples), images=torch.stack([sample.content for sample in samples]))


def collate_latents(samples: Sequence[LoadedSample]) -> LatentBatch:
    """Stack moments to a batch."""
    return LatentBatch(
        **_batch_fields(samples), moments=split_moments(torch.stack([sample.content for sample in samples]))
    )


def _batch_fields(samples: Sequence[LoadedSample]) -> dict[str, Any]:
    return {
        "labels": torch.tensor([sample.label for sample in samples]),
        "positions": torch.tensor([sample.position for sample in samples]),
        "skipped": tuple(name for sample in samples for name in sample.skipped),
        "captions": tuple(sample.caption for sample in samples),
    }


Collate = Callable[[Sequence[LoadedSample]], Batch]
"""Function from loaded samples to a batch."""
DrawFunction = Callable[[Sequence[int]], Mapping[str, Tensor]]
"""Function from positions of one batch to random numbers, a row for each; called where the batch is made."""


def collate_or_error(
    collate: Collate, samples: Sequence[LoadedSample | ValueError], draw: DrawFunction | None = None
) -> Batch | ValueError:
    """Make a batch of samples, or return the first error among them.

    Workers hand errors on and do not raise them: PyTorch would make the worker's traceback the message.
    """
    error = next((sample for sample in samples if isinstance(sample, ValueError)), None)
    return error or _with_draws(collate([sample for sample in samples if isinstance(sample, LoadedSample)]), draw)


def _with_draws(batch: AnyBatch, draw: DrawFunction | None) -> AnyBatch:
    return batch if draw is None else replace(batch, draws=draw(batch.positions.tolist()))


def log_skipped(batches: Iterator[Batch | ValueError]) -> Iterator[Batch]:
    """Yield the batches and warn once about each skipped image. Raises the errors among them."""
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
        del batches  # an error's traceback keeps this frame, which must not keep the loader's workers


# ---- sources and latent caches

ReadFunction = Callable[[int, Augmentation], tuple[Tensor, int]]
"""(index, augmentation) -> an image's pixels or moments, and its class number."""


MAX_CROPS_BYTES = 2**28
"""Crops are kept by each process that reads images, if all together have at most so many bytes."""


class _ImageReader:
    """Reads and crops images; keeps crops: a picture of 12 megapixels is decoded in 100 ms, and learned in 10."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform
        self.crops: dict[int, tuple[np.ndarray, int]] = {}
        """8-bit crops and labels, by index; empty if all of them would be too many."""

    def read(self, index: int, augmentation: Augmentation) -> tuple[Tensor, int]:
        if index in self.crops:
            crop, label = self.crops[index]
        else:
            example = self.source[index]
            label = example.label
            check_label(example.name, label, len(self.source.classes))
            crop = self.transform.crop(example.image)
            if len(self.source) * crop.nbytes <= MAX_CROPS_BYTES:
                self.crops[index] = crop, label
        return augmentation(pixels_to_tensor(crop)), label


@dataclass(frozen=True)
class _LatentReader:
    source: LatentSource

    def read(self, index: int, augmentation: Augmentation) -> tuple[Tensor, int]:
        if augmentation.down or augmentation.right:
            raise ConfigError(f"{self.source.folder} holds latents, which can't be moved; train with --shift 0")
        return self.source.read(index, augmentation.flip)


def _read_function(source: Source | LatentSource, transform: Transform) -> ReadFunction:
    return _LatentReader(source).read if isinstance(source, LatentSource) else _ImageReader(source, transform).read


def _collate_function(source: Source | LatentSource) -> Collate:
    return collate_latents if isinstance(source, LatentSource) else collate_images


class _IndexedDataset(Dataset[LoadedSample | ValueError]):
    """Maps (position, index) to a sample, or to the error if there is none; workers have copies of it."""

    def __init__(self, read: ReadFunction, length: int, augmentations: Augmentations, captions: Captions = ()) -> None:
        self.read, self.length, self.augmentations, self.captions = read, length, augmentations, captions

    def __getitem__(self, key: tuple[int, int]) -> LoadedSample | ValueError:
        try:
            return self._load(*key)
        except ValueError as error:
            return error

    def _load(self, position: int, index: int) -> LoadedSample:
        augmentation = self.augmentations.at(position)
        skipped: list[str] = []
        for offset in range(min(self.length, MAX_UNREADABLE)):
            try:
                taken = (index + offset) % self.length
                content, label = self.read(taken, augmentation)
            except UnreadableImage as error:
                skipped.append(error.name)
                continue
            caption = pick_caption(self.captions[taken], self.augmentations.seed, position) if self.captions else ""
            return LoadedSample(content, label, position, tuple(skipped), caption)
        raise ValueError(f"{len(skipped)} pictures in a row can't be read, the last of them {skipped[-1]}")


# ---- streams: each process runs the readers of its share of a batch, each worker some of these


class _WorkerBatch(NamedTuple):
    """One worker's images of a batch, and its readers' cursors after them."""

    batch: ImageBatch
    cursors: dict[int, ShardCursor]


class _StreamDataset(IterableDataset[_WorkerBatch | ValueError]):
    """Yields one worker's part of the process's batches, without end, or the error that ends them."""

    def __init__(
        self,
        source: StreamSource,
        order: StreamSampler,
        transform: Transform,
        augmentations: Augmentations,
        share: range,
        start: int,
        draw: DrawFunction | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            source: the shards and their cursors.
            order: the order of shards and images.
            transform: crops images and makes tensors.
            augmentations: the random changes, by position.
            share: indices within a batch that belong to this process.
            start: position of the first batch.
            draw: draws random numbers of each batch (None: none).
        """
        self.draw = draw
        self.source, self.order, self.transform, self.augmentations = source, order, transform, augmentations
        self.share, self.start = share, start

    @property
    def readers(self) -> range:
        """Numbers of the readers that this process's share comes from."""
        of_each = self.order.images_per_reader
        return range(self.share.start // of_each, (self.share.stop - 1) // of_each + 1)

    def __iter__(self) -> Iterator[_WorkerBatch | ValueError]:
        info = get_worker_info()
        readers = self.readers if info is None else self.readers[info.id :: info.num_workers]
        try:
            yield from self._batches(readers)
        except ValueError as error:  # handed on: PyTorch would make the worker's traceback its message
            yield error

    def _batches(self, numbers: range) -> Iterator[_WorkerBatch]:
        readers = {number: self._open(number) for number in numbers}
        of_each = self.order.images_per_reader
        for first in count(self.start, self.order.batch):
            samples: list[LoadedSample] = []
            cursors: dict[int, ShardCursor] = {}
            for number, images in readers.items():
                for i in range(number * of_each, (number + 1) * of_each):
                    image = next(images)
                    cursors[number] = image.block
                    if i in self.share:
                        samples.append(self._load(image, first + i))
            yield _WorkerBatch(_with_draws(collate_images(samples), self.draw), cursors)

    def _open(self, number: int) -> Iterator[SampleWithFallbacks]:
        cursor = self.source.cursors.get(number, ShardCursor(0, number, 0))
        reader = ShardReader(self.source.shards, self.order, number, cursor)
        return islice(reader, self.order.images_before(self.start) - cursor.images_read, None)

    def _load(self, image: SampleWithFallbacks, position: int) -> LoadedSample:
        skipped = [*image.sample.unreadable]
        for sample in (image.sample, *image.fallbacks):
            try:
                example = self.source.example(sample)
            except UnreadableImage as error:
                skipped.append(error.name)
                continue
            content = self.augmentations.at(position)(self.transform(example.image))
            caption = pick_caption(example.captions, self.augmentations.seed, position)
            return LoadedSample(content, example.label, position, tuple(skipped), caption)
        raise ValueError(f"{len(skipped)} pictures in a row can't be read, the last of them {skipped[-1]}")


def _stream_batches(
    source: StreamSource,
    transform: Transform,
    augmentations: Augmentations,
    *,
    batch: int,
    start: int,
    rank: int,
    world: int,
    workers: int,
    draw: DrawFunction | None,
) -> Iterator[Batch]:
    """Implement `batches` for streams; the cursors of `source` follow the batches that were yielded."""
    if batch % world:
        raise ValueError(f"batch: got {batch}, expected a multiple of the {world} processes")
    order = StreamSampler(
        len(source.shards.names), augmentations.seed, batch, source.first_position, source.first_epoch
    )
    per_rank = batch // world
    share = range(rank * per_rank, (rank + 1) * per_rank)
    data = _StreamDataset(source, order, transform, augmentations, share, start, draw)
    source.cursors = {number: cursor for number, cursor in source.cursors.items() if number in data.readers}
    workers = min(workers, len(data.readers))
    size = transform.nbytes * per_rank // max(workers, 1)
    parts = make_dataloader(data, workers=workers, batches=None, collate=_identity, batch_bytes=size)
    return log_skipped(_join_workers(parts, source, max(workers, 1)))


def _identity(part: Any) -> Any:
    return part


def _join_workers(
    parts: Iterator[_WorkerBatch | ValueError], source: StreamSource, workers: int
) -> Iterator[Batch | ValueError]:
    """Merge the parts of all workers, which take turns, to batches."""
    while True:
        received = list(islice(parts, workers))
        if error := next((part for part in received if isinstance(part, ValueError)), None):
            yield error
            return
        complete = [part for part in received if isinstance(part, _WorkerBatch)]
        for part in complete:
            source.cursors.update(part.cursors)
        yield _merge([part.batch for part in complete])


def _merge(parts: list[ImageBatch]) -> ImageBatch:
    """Merge batches, sorted by position."""
    positions = torch.cat([part.positions for part in parts])
    captions = [caption for part in parts for caption in part.captions]
    order = positions.argsort()
    return replace(
        parts[0],
        labels=torch.cat([part.labels for part in parts])[order],
        positions=positions[order],
        skipped=tuple(sorted(name for part in parts for name in part.skipped)),
        captions=tuple(captions[i] for i in order.tolist()),
        images=torch.cat([part.images for part in parts])[order],
        draws={name: torch.cat([part.draws[name] for part in parts])[order] for name in parts[0].draws},
    )


# ---- batches of any data


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
    balance: float = 0.0,
    draw: DrawFunction | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's batches, without end, from position `start` on.

    Neither `workers` nor reading ahead changes the batches, and no global random state is used. An unreadable image is
    replaced by the next readable one (of a stream: by another of its block), named once in a warning, and listed in
    `Batch.skipped`. A latent cache gives moments, for the same positions, flips and labels as its images.

    Args:
        source: images, cached latents or a stream.
        transform: crops images and makes tensors; a latent cache does not need it.
        batch: images of a batch of all ranks.
        seed: key of the order and of the augmentations.
        start: position of the first batch.
        rank: number of this process.
        world: number of processes; divides `batch`.
        workers: processes that read ahead; 0 reads in this one.
        flip: mirror every other image; None: if the source allows it.
        shift: the most pixels to shift an image by each way; ConfigError for cached latents.
        balance: how evenly classes are drawn, from 0 (as often as they have images) to 1; ConfigError for a stream.
        draw: draws `Batch.draws` where the batch is made: by a worker, if there are any (None: no draws).
        pin: copy batches to pinned memory, for CUDA; those of a stream stay where they are.
    """
    augmentations = Augmentations(seed, source.flips if flip is None else flip, shift)
    if isinstance(source, StreamSource):
        if balance:
            labels_to_balance(source, balance)  # refuses: a stream knows none
        return _stream_batches(
            source,
            transform,
            augmentations,
            batch=batch,
            start=start,
            rank=rank,
            world=world,
            workers=workers,
            draw=draw,
        )
    order = order_of(source, seed, batch, rank, world, balance)
    data = _IndexedDataset(_read_function(source, transform), len(source), augmentations, captions_of(source))
    collate = functools.partial(collate_or_error, _collate_function(source), draw=draw)
    per_image = source.manifest.image_bytes() if isinstance(source, LatentSource) else transform.nbytes
    loader = make_dataloader(
        data,
        workers=workers,
        batches=order.batches(start),
        collate=collate,
        pin=pin,
        batch_bytes=batch // world * per_image,
    )
    return log_skipped(loader)


def in_order(
    source: Source | StreamSource, transform: Transform, *, batch: int = 64, limit: int | None = None
) -> Iterator[Float[Tensor, "n c H W"]]:
    """Yield the readable images once, in the source's order, not augmented.

    Args:
        source: images; a stream gives those of `StreamSource.preview`.
        transform: crops images and makes tensors.
        batch: images of a batch; the last one may be smaller.
        limit: the most images to read; None: all.
    """
    pending: list[Tensor] = []
    for read in _example_readers(source, limit):
        try:
            pending.append(transform(read().image))
        except UnreadableImage as error:
            logger.warning("skipped a picture that can't be read: %s", error.name)
        if len(pending) == batch:
            yield torch.stack(pending)
            pending = []
    if pending:
        yield torch.stack(pending)


def _example_readers(source: Source | StreamSource, limit: int | None) -> Iterator[Callable[[], Example]]:
    if isinstance(source, StreamSource):
        for sample in islice(source.preview(), limit):
            yield functools.partial(source.example, sample)
    else:
        for index in range(len(source) if limit is None else min(limit, len(source))):
            yield functools.partial(source.__getitem__, index)


def load_batch(source: Source | LatentSource, transform: Transform, indices: Sequence[int]) -> Batch | None:
    """Load the images of `indices`, not augmented, to a batch.

    Its positions are the indices. Unreadable images are left out with a warning; None if all are.
    """
    read, samples, captions = _read_function(source, transform), [], captions_of(source)
    for index in indices:
        caption = captions[index][0] if captions and captions[index] else ""
        try:
            samples.append(LoadedSample(*read(index, NO_AUGMENTATION), index, (), caption))
        except UnreadableImage as error:
            logger.warning("skipped a picture that can't be read: %s", error.name)
    return _collate_function(source)(samples) if samples else None


# ---- resuming


def data_digest(source: Source | LatentSource | StreamSource) -> str | None:
    """Return a hash of the images' names and sizes; None for a stream, whose state has one.

    A part of a source has that of the whole. Of large folders, the sizes of 1,000 images count.
    """
    if isinstance(source, StreamSource):
        return None
    if isinstance(source, LatentSource):
        about = source.manifest
        values = [about.source, about.fingerprint, about.size, about.dtype, about.flips, about.upright]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return quick_digest(source.source if isinstance(source, Subset) else source)


def data_state(source: Source | LatentSource | StreamSource, digest: str | None = None) -> dict[str, Any]:
    """Return the data's state for a run to save, JSON-able. Every process has to call it.

    `digest` is that of `data_digest`.
    """
    if isinstance(source, StreamSource):
        return source.state_dict()
    return {"pictures": len(source), "classes": list(source.classes), "digest": digest}


def resume_data(
    source: Source | LatentSource | StreamSource,
    state: Mapping[str, Any] | None,
    images: int,
    *,
    digest: str | None = None,
    moved_from: str | None = None,
    split_by_position: bool = False,
) -> str | None:
    """Resume from the saved state of the data. Returns a line for the log, if any.

    Only streams have a position to load: the order of other data follows from `images` and the number of images.
    Raises ConfigError for other classes, and for other images in another place.

    Args:
        source: the data now.
        state: the result of `data_state`; None: an older version saved none.
        images: images that training has been given.
        digest: that of `data_digest`, now.
        moved_from: where the data was, if it is named differently and gone from there.
        split_by_position: an older version held out images by their position; raises ConfigError for another number of
            images.
    """
    if state is None:
        return None
    if isinstance(source, StreamSource):
        if moved_from is not None and not source.has_shards(state):
            raise _other_data(moved_from, "shards", source.name)
        return source.load_state_dict(dict(state), images)
    now, then = list(source.classes), state.get("classes", list(source.classes))
    if now != then:
        names = sorted(set(now) ^ set(then))
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"the data has other classes than when the run was saved ({shown or 'in another order'}); put them back, "
            "or begin another run"
        )
    same = digest is None or state.get("digest") in (None, digest)
    if moved_from is not None and not same:
        counts = f"{state['pictures']:,} pictures to learn from then, {len(source):,} now"
        raise _other_data(moved_from, "pictures", counts)
    if len(source) == state["pictures"]:
        return None if same else (
            "warning: the data has as many pictures as when the run was saved, but other names or sizes: it goes on "
            "with those of now"
        )  # fmt: skip
    if split_by_position:
        raise ConfigError(
            f"the data has {len(source):,} pictures to learn from, but {state['pictures']:,} when the run was saved by "
            "an older version, which did not note those it held out. They would be mixed with those learned from; put "
            "the pictures back, or begin another run"
        )
    return (
        f"warning: the data holds {len(source):,} pictures, but {state['pictures']:,} when the run was saved: it goes "
        "on in another order, in which pictures of this epoch may come twice or not at all"
    )


def _other_data(moved_from: str, noun: str, more: str) -> ConfigError:
    return ConfigError(
        f"{moved_from} of this run is gone, and the {noun} here are others ({more}); give its {noun}, begin another "
        f"run, or link these to {moved_from} to go on with them"
    )
