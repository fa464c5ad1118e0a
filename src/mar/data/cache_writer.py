"""Pictures -> a latent cache: a tokenizer runs over a source once, and training never needs the pictures again.

A shard follows from the source, the tokenizer and the batch size alone, whichever process makes it and with however
many threads; each is written to a temporary file and renamed. So a cache that was killed at any moment goes on at the
last whole shard.
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
from mar.checkpoint.files import require_room
from mar.config import ConfigError, to_dict
from mar.data.fingerprint import source_digest
from mar.data.images import Source, Transform, UnreadableImage
from mar.data.labels import check_label
from mar.data.latent_cache import (
    DTYPES,
    INDEX,
    MANIFEST,
    CacheManifest,
    is_cache,
    open_shard,
    read_manifest,
    write_index,
    write_manifest,
    write_shard,
    zeros,
)
from mar.data.loader import make_dataloader
from mar.tokenizer import Tokenizer
from mar.tokenizer.base import fingerprint, unscaled_moments

MAX_UNREADABLE = 1000
"""So many pictures in a row that can't be read are no accident."""
PIECE = 2**14
"""Pixels that a thread of a CPU encodes at once. A constant, since the last bits of latents depend on it."""

_FOR_PEOPLE = ("tokenizer", "data")
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


@dataclass(frozen=True)
class _Read:
    """A picture of the source, ready to be encoded; None where it can't be read."""

    image: Tensor | None
    label: int
    name: str


class _Images(Dataset[_Read]):
    """What workers run."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, index: int) -> _Read:
        try:
            example = self.source[index]
        except UnreadableImage as error:
            return _Read(None, -1, error.name)
        return _Read(self.transform(example.image), example.label, example.name)


def describe_cache(
    source: Source, tokenizer: Tokenizer, *, data: str, tokenizer_name: str, size: tuple[int, int],
    dtype: str = "fp16", flip: bool | None = None, shard: int = 1024,
) -> CacheManifest:  # fmt: skip
    """What a cache of this source by this tokenizer is of, with pictures cut to `size` (height, width).

    `flip`: whether flipped pictures are cached too; None: where the source's may be flipped. Raises ConfigError for a
    size that the tokenizer can't cut into cells.
    """
    height, width = size
    if min(size) < 1 or height % tokenizer.stride or width % tokenizer.stride:
        raise ConfigError(f"image-size: got {height}x{width}, expected multiples of the stride {tokenizer.stride}")
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
    )


def prepare_cache(out: Path, about: CacheManifest) -> list[int] | None:
    """Makes a folder ready for a cache, new or to go on with: the shards still to be made; None where it is finished.

    Raises ConfigError, and touches nothing, where the folder holds another cache or something else, and CheckpointError
    where its disk has too little room.
    """
    begun = is_cache(out)
    if begun:
        _compare(out, about)
    elif out.exists():
        _refuse_others(out, about)
    missing = [k for k in range(about.shards) if not _is_there(out, about, k)]
    require_room(out, sum(len(about.span(k)) for k in missing) * about.picture_bytes())
    for path in _leftovers(out, about) if out.is_dir() else []:
        path.unlink(missing_ok=True)
    if not begun:
        write_manifest(out, about)
    return None if not missing and (out / INDEX).is_file() else missing


def _is_there(out: Path, about: CacheManifest, shard: int) -> bool:
    """Whether a shard is there and of this cache. A damaged one is not removed, for what it may still be good for."""
    path = out / about.file(shard)
    if path.is_file():
        open_shard(path, about, shard)
    return path.is_file()


def _compare(out: Path, about: CacheManifest) -> None:
    before, now = to_dict(read_manifest(out)), to_dict(about)
    different = [key for key in now if key not in _FOR_PEOPLE and before[key] != now[key]]
    if not different:
        return
    words = {
        "fingerprint": f"another tokenizer ({before['tokenizer']})",
        "source": f"other pictures, or pictures that have changed since ({before['data']})",
    }
    told = [words.get(key, f"{key} {_short(before[key])}, not {_short(now[key])}") for key in different]
    raise ConfigError(
        f"{out} was begun with {'; '.join(told)}; give the same settings, remove it, or take another --out"
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:32]}..."


def _refuse_others(out: Path, about: CacheManifest) -> None:
    if not out.is_dir():
        raise ConfigError(f"{out} is a file, but a cache is a folder; take another --out")
    leftovers = set(_leftovers(out, about))
    other = next((path for path in sorted(out.iterdir()) if path not in leftovers), None)
    if other is not None:
        raise ConfigError(f"{other} is there, but not from `mar cache`; take another --out")


def _leftovers(out: Path, about: CacheManifest) -> Iterator[Path]:
    """What killed processes left of files that they had not finished."""
    names = {MANIFEST, INDEX, *(about.file(k) for k in range(about.shards))}
    for path in out.iterdir():
        temporary = _TEMPORARY.fullmatch(path.name)
        if temporary and temporary[1] in names:
            yield path


def write_shards(
    out: Path, about: CacheManifest, source: Source, tokenizer: Tokenizer, shards: Sequence[int], *,
    device: torch.device, batch: int = 32, workers: int = 0, advance: Callable[[int], None] = lambda pictures: None,
) -> None:  # fmt: skip
    """Makes the given shards; tells `advance` how many pictures it has done.

    Pictures that can't be read keep their places, and are listed. Raises ValueError where moments are not finite or
    beyond the range of the cache's dtype, for a label that is no class, and for 1000 unreadable pictures in a row.
    """
    if len(source) != about.pictures:
        raise ConfigError(f"{about.data} has {len(source)} pictures here, but {about.pictures} where the cache began")
    encode = _Encoder(tokenizer, device, about)
    spans = [[*about.span(k)] for k in shards]
    batches = [span[i : i + batch] for span in spans for i in range(0, len(span), batch)]
    pictures = _Images(source, Transform(about.size, tokenizer.image_channels))
    reads: Iterator[list[_Read]] = make_dataloader(pictures, workers=workers, batches=batches, collate=list)
    done = unreadable = 0
    for shard, span in zip(shards, spans, strict=True):
        moments, labels = zeros(about, len(span))
        skipped: dict[int, str] = {}
        for first in range(0, len(span), batch):
            read = next(reads)
            good = [row for row, item in enumerate(read) if item.image is not None]
            skipped |= {span[first + row]: item.name for row, item in enumerate(read) if item.image is None}
            unreadable = 0 if good else unreadable + len(read)
            if unreadable >= MAX_UNREADABLE:
                raise ValueError(f"{unreadable} pictures in a row can't be read, the last of them {read[-1].name}")
            if good:
                rows = torch.tensor(good) + first
                moments[rows] = encode([read[row] for row in good])
                labels[rows] = torch.tensor([read[row].label for row in good], dtype=torch.int32)
            done += len(read)
            advance(done)
        write_shard(out / about.file(shard), moments, labels, skipped)


class _Encoder:
    """Pictures -> what is stored of them."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device, about: CacheManifest) -> None:
        # With mean 0 and standard deviation 1 its moments are the raw ones, to the last bit.
        self.tokenizer = copy.deepcopy(tokenizer).to(device).eval().requires_grad_(False)
        self.tokenizer.set_statistics(0.0, 1.0)
        self.device, self.about = device, about

    def __call__(self, read: Sequence[_Read]) -> Float[Tensor, "n f m c h w"]:
        for item in read:
            check_label(item.name, item.label, len(self.about.classes))
        images = torch.stack([item.image for item in read if item.image is not None]).to(self.device)
        moments = self._all_moments(images).cpu()
        self._check_range(moments, read)
        return moments.to(DTYPES[self.about.dtype])

    def _all_moments(self, images: Tensor) -> Tensor:
        if self.device.type != "cpu":
            return self._moments(images)
        pieces = images.split(max(1, PIECE // math.prod(self.about.size)))
        with single_threaded_pool() as threads:
            return torch.cat([*threads.map(self._moments, pieces)])

    @torch.no_grad()  # which holds for one thread
    def _moments(self, images: Tensor) -> Tensor:
        sides = [images, images.flip(-1)] if self.about.flips else [images]
        found = [unscaled_moments(self.tokenizer, side) for side in sides]
        return torch.stack([torch.stack([f.mean] if f.logvar is None else [f.mean, f.logvar], 1) for f in found], 1)

    def _check_range(self, moments: Tensor, read: Sequence[_Read]) -> None:
        limit = torch.finfo(DTYPES[self.about.dtype]).max
        top = moments.flatten(1).abs().amax(1)
        for item, value in zip(read, top.tolist(), strict=True):
            if not value < float("inf"):
                raise ValueError(f"the latents of {item.name} are not finite: is the tokenizer what it should be?")
            if value > limit:
                raise ValueError(
                    f"the latents of {item.name} reach {value:.3g}, but {self.about.dtype} ends at {limit:.3g}; "
                    "take --dtype bf16 or fp32, and another --out"
                )


def finish_cache(out: Path, about: CacheManifest) -> dict[int, str]:
    """Ends a cache, once all shards are there. Returns the pictures that could not be read, by number.

    Raises ValueError where none could, DamagedCache where a shard is missing.
    """
    skipped = write_index(out, about)
    if len(skipped) == about.pictures:
        (out / INDEX).unlink()
        raise ValueError(f"none of the {about.pictures} pictures of {about.data} can be read")
    return skipped
