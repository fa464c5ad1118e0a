"""Write a latent cache: a source is encoded once, for all trainings.

A shard follows from the source, the tokenizer and the batch size alone, whichever process makes it and with however
many threads. Each is written to a temporary file and renamed: a cache that was killed goes on at the last whole shard.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from mar.backends.cpu.memory import single_threaded_pool
from mar.checkpoint.files import check_writable, require_room
from mar.checkpoint.owners import is_ours
from mar.config import ConfigError, to_dict
from mar.data.captions import Captions
from mar.data.images import Source, Transform, UnreadableImage, source_digest
from mar.data.labels import check_label
from mar.data.latent_cache import (
    CAPTIONS,
    DTYPES,
    INDEX,
    MANIFEST,
    CacheManifest,
    DamagedCache,
    empty_shard,
    is_cache,
    open_shard,
    read_captions,
    read_manifest,
    write_captions,
    write_index,
    write_manifest,
    write_shard,
)
from mar.data.loader import MAX_UNREADABLE
from mar.data.workers import make_dataloader
from mar.tokenizer import Tokenizer
from mar.tokenizer.base import fingerprint, unscaled_moments

PIXELS_PER_CALL = 2**14
"""Pixels that a CPU thread encodes at once. A constant: the last bits of latents depend on it."""

_FREE = ("tokenizer", "data", "tokenizer_kind")
"""Fields of a manifest that may differ: names for people, and what follows from the fingerprint."""
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


@dataclass(frozen=True)
class _Image:
    """An image of the source, ready to be encoded."""

    image: Tensor | None
    """None: it can't be read."""
    label: int
    name: str


class _Images(Dataset[_Image]):
    """The images of a source by index; workers have copies of it."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, index: int) -> _Image:
        try:
            example = self.source[index]
        except UnreadableImage as error:
            return _Image(None, -1, error.name)
        return _Image(self.transform(example.image), example.label, example.name)


def describe_cache(
    source: Source,
    tokenizer: Tokenizer,
    *,
    data: str,
    tokenizer_name: str,
    size: tuple[int, int],
    dtype: str = "fp16",
    flip: bool | None = None,
    shard: int = 1024,
    upright: bool = False,
) -> CacheManifest:
    """Describe a cache to be made. Raises ConfigError for a size that the tokenizer does not take.

    Args:
        source: the images.
        tokenizer: encodes them.
        data: path or name of the images, for people.
        tokenizer_name: path or name of the tokenizer, for people.
        size: height and width that images are cropped to.
        dtype: fp16, bf16 or fp32.
        flip: cache flipped images too; None: if the source allows it.
        shard: images of a shard.
        upright: turn images upright by their EXIF orientation.
    """
    height, width = size
    if expected := tokenizer.unfit(height, width):
        raise ConfigError(f"image-size: got {height}x{width}, expected {expected}")
    return CacheManifest(
        tokenizer=tokenizer_name,
        fingerprint=fingerprint(tokenizer),
        data=data,
        source=source_digest(source),
        pictures=len(source),
        classes=tuple(source.classes),
        size=size,
        shape=(tokenizer.channels, height // tokenizer.stride, width // tokenizer.stride),
        parts=1 if tokenizer.deterministic else 2,
        flips=source.flips if flip is None else flip,
        dtype=dtype,
        shard=shard,
        upright=upright,
        tokenizer_kind=str(tokenizer.config().get("kind", "")),
    )


def prepare_cache(out: Path, manifest: CacheManifest) -> list[int] | None:
    """Prepare a folder for a cache, new or begun. Returns the missing shards, None if it is finished.

    Raises ConfigError, and changes nothing, if the folder holds another cache or something else, and CheckpointError if
    its disk has too little room.
    """
    begun = is_cache(out)
    if begun:
        _check_same_cache(out, manifest)
    elif out.exists():
        _check_empty(out, manifest)
    missing = [k for k in range(manifest.shards) if not _has_shard(out, manifest, k)]
    require_room(out, sum(len(manifest.span(k)) for k in missing) * manifest.image_bytes())
    if missing or not begun:
        check_writable(out, is_file=False)
    for path in _temporary_files(out, manifest) if out.is_dir() else []:
        path.unlink(missing_ok=True)
    if not begun:
        write_manifest(out, manifest)
    return None if not missing and (out / INDEX).is_file() else missing


def _has_shard(out: Path, manifest: CacheManifest, shard: int) -> bool:
    """Tell if a shard is there. Raises DamagedCache for a damaged one, which is not removed."""
    path = out / manifest.file(shard)
    if path.is_file():
        open_shard(path, manifest, shard)
    return path.is_file()


def _check_same_cache(out: Path, manifest: CacheManifest) -> None:
    before, now = to_dict(read_manifest(out)), to_dict(manifest)
    different = [key for key in now if key not in _FREE and before[key] != now[key]]
    if not different:
        return
    words = {
        "fingerprint": f"another tokenizer ({before['tokenizer']})",
        "source": f"other pictures, or pictures that have changed since ({before['data']})",
    }
    changes = [words.get(key, f"{key} {_short(before[key])}, not {_short(now[key])}") for key in different]
    raise ConfigError(
        f"{out} was begun with {'; '.join(changes)}; give the same settings, remove it, or take another --out"
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:32]}..."


def _check_empty(out: Path, manifest: CacheManifest) -> None:
    if not out.is_dir():
        raise ConfigError(f"{out} is a file, but a cache is a folder; take another --out")
    temporary = set(_temporary_files(out, manifest))
    other = next((p for p in sorted(out.iterdir()) if p not in temporary and not is_ours(p.name)), None)
    if other is not None:
        raise ConfigError(f"{other} is there, but not from `mar cache`; take another --out")


def _temporary_files(out: Path, manifest: CacheManifest) -> Iterator[Path]:
    """Yield the unfinished files that killed processes of earlier versions left."""
    names = {MANIFEST, INDEX, CAPTIONS, *(manifest.file(k) for k in range(manifest.shards))}
    for path in out.iterdir():
        temporary = _TEMPORARY.fullmatch(path.name)
        if temporary and temporary[1] in names:
            yield path


def write_shards(
    out: Path,
    manifest: CacheManifest,
    source: Source,
    tokenizer: Tokenizer,
    shards: Sequence[int],
    *,
    device: torch.device,
    batch: int = 32,
    workers: int = 0,
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Write the given shards.

    Unreadable images keep their places, and are listed. Raises ValueError for moments not finite or beyond the range of
    the cache's dtype, for a label out of range, and for 1000 unreadable images in a row.

    Args:
        out: the cache's folder.
        manifest: describes the cache.
        source: the images.
        tokenizer: encodes them.
        shards: numbers of the shards to write.
        device: where the tokenizer runs.
        batch: images that are encoded together; the last bits of latents depend on it.
        workers: processes that read images; 0 reads in this one.
        advance: called with the number of images done.
    """
    if len(source) != manifest.pictures:
        raise ConfigError(
            f"{manifest.data} has {len(source)} pictures here, but {manifest.pictures} where the cache began"
        )
    encode = _Encoder(tokenizer, device, manifest)
    spans = [[*manifest.span(k)] for k in shards]
    batches = [span[i : i + batch] for span in spans for i in range(0, len(span), batch)]
    images = _Images(source, Transform(manifest.size, tokenizer.image_channels, manifest.upright))
    loader: Iterator[list[_Image]] = make_dataloader(
        images, workers=workers, batches=batches, collate=list, batch_bytes=batch * images.transform.nbytes
    )
    done = unreadable = 0
    for shard, span in zip(shards, spans, strict=True):
        moments, labels = empty_shard(manifest, len(span))
        skipped: dict[int, str] = {}
        for first in range(0, len(span), batch):
            loaded = next(loader)
            readable = [row for row, item in enumerate(loaded) if item.image is not None]
            skipped |= {span[first + row]: item.name for row, item in enumerate(loaded) if item.image is None}
            unreadable = 0 if readable else unreadable + len(loaded)
            if unreadable >= MAX_UNREADABLE:
                raise ValueError(f"{unreadable} pictures in a row can't be read, the last of them {loaded[-1].name}")
            if readable:
                rows = torch.tensor(readable) + first
                moments[rows] = encode([loaded[row] for row in readable])
                labels[rows] = torch.tensor([loaded[row].label for row in readable], dtype=torch.int32)
            done += len(loaded)
            advance(done)
        write_shard(out / manifest.file(shard), moments, labels, skipped)


class _Encoder:
    """Images -> moments in the type of the cache."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device, manifest: CacheManifest) -> None:
        # With mean 0 and standard deviation 1 its moments are the raw ones, to the last bit.
        self.tokenizer = copy.deepcopy(tokenizer).to(device).eval().requires_grad_(False)
        self.tokenizer.set_statistics(0.0, 1.0)
        self.device, self.manifest = device, manifest

    def __call__(self, images: Sequence[_Image]) -> Float[Tensor, "n f m c h w"]:
        for item in images:
            check_label(item.name, item.label, len(self.manifest.classes))
        pixels = torch.stack([item.image for item in images if item.image is not None]).to(self.device)
        moments = self._all_moments(pixels).cpu()
        self._check_range(moments, images)
        return moments.to(DTYPES[self.manifest.dtype])

    def _all_moments(self, pixels: Tensor) -> Tensor:
        if self.device.type != "cpu":
            return self._moments(pixels)
        pieces = pixels.split(max(1, PIXELS_PER_CALL // math.prod(self.manifest.size)))
        with single_threaded_pool() as threads:
            return torch.cat([*threads.map(self._moments, pieces)])

    @torch.no_grad()  # holds for one thread only
    def _moments(self, pixels: Tensor) -> Tensor:
        flips = [pixels, pixels.flip(-1)] if self.manifest.flips else [pixels]
        moments = [unscaled_moments(self.tokenizer, flip) for flip in flips]
        return torch.stack([torch.stack([m.mean] if m.logvar is None else [m.mean, m.logvar], 1) for m in moments], 1)

    def _check_range(self, moments: Tensor, images: Sequence[_Image]) -> None:
        limit = torch.finfo(DTYPES[self.manifest.dtype]).max
        largest = moments.flatten(1).abs().amax(1)
        for item, value in zip(images, largest.tolist(), strict=True):
            if not value < float("inf"):
                raise ValueError(f"the latents of {item.name} are not finite: is the tokenizer what it should be?")
            if value > limit:
                raise ValueError(
                    f"the latents of {item.name} reach {value:.3g}, but {self.manifest.dtype} ends at {limit:.3g}; "
                    "take --dtype bf16 or fp32, and another --out"
                )


def finish_cache(out: Path, manifest: CacheManifest, captions: Captions = ()) -> dict[int, str]:
    """Finish a cache once all shards are there, with the images' captions. Returns names of unreadable images by index.

    Raises ValueError if all are unreadable, DamagedCache if a shard is missing.
    """
    write_captions(out, captions)
    skipped = write_index(out, manifest)
    if len(skipped) == manifest.pictures:
        (out / INDEX).unlink()
        raise ValueError(f"none of the {manifest.pictures} pictures of {manifest.data} can be read")
    return skipped


def update_captions(out: Path, manifest: CacheManifest, captions: Captions) -> bool:
    """Write the captions of a finished cache anew, if they have changed. Returns whether they have.

    Args:
        out: the cache's folder.
        manifest: describes the cache.
        captions: of its images, now.
    """
    try:
        unchanged = tuple(read_captions(out, manifest)) == tuple(captions)
    except DamagedCache:
        unchanged = False
    if not unchanged:
        write_captions(out, captions)
    return not unchanged
