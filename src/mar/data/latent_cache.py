"""Latent caches: moments of images, encoded once and mapped to memory.

`mar.data.cache_writer` makes them. A cache is a folder: the manifest `cache.json` (all that its latents depend on),
shards of safetensors, and `index.json` once all shards are there. Shard k holds the images from k *
`CacheManifest.shard` on in two tensors: `labels` (n), and `moments` (n, flips, 1 or 2, c, h, w), with axes plain and
flipped, mean and log-variance. An unreadable image keeps its place, with zeros, so image i is always row i % shard of
shard i // shard. Every byte is under a sha256: a shard's tensors under one in its metadata, its header under one in the
index, the JSON files under one of their own. Each image has a CRC-32 besides, compared when it is first read; shards of
earlier versions have none, and are compared as a whole. The images' captions, if any, are in `captions.json`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors.torch import save
from torch import Tensor

from mar.checkpoint import checksums
from mar.checkpoint.files import newer_format, parse_json, size_text, write_atomically, write_text
from mar.config import ConfigError, from_dict, to_dict
from mar.data.accounts import Account
from mar.data.captions import Captions, chosen_captions
from mar.data.images import UnreadableImage
from mar.tokenizer.base import LatentMoments

FORMAT = "mar-latents/1"
"""Version of the cache's format."""
MANIFEST = "cache.json"
"""Name of the file that describes tokenizer and images."""
INDEX = "index.json"
"""Name of the file that lists the shards."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of stored moments. float16 is for the disk alone: reading makes them float32 again."""

CAPTIONS = "captions.json"
"""Name of the file with the images' captions, where they have any."""

_SAFETENSORS_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
_MAX_HEADER = 100_000_000


class DamagedCache(ConfigError):
    """A file of a cache is damaged; says what to do."""


@dataclass(frozen=True)
class CacheManifest:
    """All that a cache's latents depend on. Its fields are the keys of `cache.json`."""

    tokenizer: str
    """The tokenizer's name, for people; caches are compared by `fingerprint`."""
    fingerprint: str
    """The tokenizer's (`mar.tokenizer.base.fingerprint`)."""
    data: str
    """The images' path or name, for people; caches are compared by `source`."""
    source: str
    """Digest of the images (`mar.data.images.source_digest`)."""
    pictures: int
    """Number of images."""
    classes: tuple[str, ...]
    size: tuple[int, int]
    """Height and width that images were cropped to."""
    shape: tuple[int, int, int]
    """Channels, height and width of a latent."""
    parts: int
    """2: mean and log-variance; 1: mean only, of a deterministic tokenizer."""
    flips: bool
    """True: moments of the flipped images are there too."""
    dtype: str
    """fp16, bf16 or fp32."""
    shard: int
    """Images of a shard."""
    upright: bool = False
    """True: images were turned upright by their EXIF orientation; caches of earlier versions do not say it."""
    tokenizer_kind: str = ""
    """The tokenizer's kind (`mar.tokenizer.TOKENIZERS`); caches of earlier versions do not say it."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype of the cache: got {self.dtype!r}, expected {', '.join(DTYPES)}")
        if self.shard < 1 or self.pictures < 1:
            raise ConfigError(
                f"cache: got {self.pictures} pictures in shards of {self.shard}, expected at least 1 each"
            )

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.pictures / self.shard)

    def span(self, shard: int) -> range:
        """Return the indices of a shard's images."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.pictures))

    def file(self, shard: int) -> str:
        """Return a shard's file name, with at least five digits, all alike."""
        return f"{shard:0{max(5, len(str(self.shards - 1)))}}.safetensors"

    def image_shape(self) -> tuple[int, ...]:
        """Return the shape of an image's moments."""
        return (1 + self.flips, self.parts, *self.shape)

    def image_bytes(self) -> int:
        """Return the bytes of an image in a shard, its label included."""
        return math.prod(self.image_shape()) * DTYPES[self.dtype].itemsize + torch.int32.itemsize


@dataclass(frozen=True)
class Shard:
    """A shard of a cache, mapped to memory."""

    moments: Shaped[Tensor, "n f m c h w"]
    labels: Int[Tensor, " n"]
    sha256: str
    """The tensors' sha256, noted when they were written."""
    header: str
    """The header's sha256."""
    skipped: dict[int, str]
    """Unreadable images: indices and names."""
    size: int
    """Size of the file in bytes."""
    crc32: tuple[int, ...] = ()
    """Checksums of the images; () in a shard of an earlier version."""
    _compared: set[int] = field(default_factory=set)
    """Images that have been compared."""

    def intact(self) -> bool:
        """Compare the tensors with their sha256; reads all of them."""
        return tensors_digest(self.moments, self.labels) == self.sha256

    def row_intact(self, row: int) -> bool:
        """Compare an image with its checksum, once; without one, the whole shard."""
        if row in self._compared:
            return True
        if not self.crc32:
            intact = self.intact()
            self._compared.update(range(len(self.labels)) if intact else ())
            return intact
        intact = row_checksum(self.moments[row], self.labels[row]) == self.crc32[row]
        self._compared.update([row] if intact else ())
        return intact


def tensors_digest(moments: Shaped[Tensor, "..."], labels: Int[Tensor, " n"]) -> str:
    """Return the sha256, in hex, of a shard's tensors."""
    digest = hashlib.sha256()
    for tensor in (moments, labels):
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def row_checksum(moments: Shaped[Tensor, "f m c h w"], label: Int[Tensor, ""]) -> int:
    """Return the CRC-32 of an image's moments and label."""
    data = moments.contiguous().flatten().view(torch.uint8).numpy().data
    return zlib.crc32(label.numpy().tobytes(), zlib.crc32(data))


def write_shard(
    path: Path, moments: Shaped[Tensor, "n f m c h w"], labels: Int[Tensor, " n"], skipped: Mapping[int, str]
) -> None:
    """Write a shard, complete or not at all. Raises CheckpointError if the disk refuses.

    Args:
        path: the file to write.
        moments: moments of its images, in order.
        labels: class numbers; -1: none.
        skipped: indices and names of unreadable images.
    """
    crc32 = [row_checksum(image, label) for image, label in zip(moments, labels, strict=True)]
    note = {"format": FORMAT, "sha256": tensors_digest(moments, labels), "skipped": {**skipped}, "crc32": crc32}
    data = save({"moments": moments, "labels": labels}, {"mar": json.dumps(note)})

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write, len(data))


def open_shard(path: Path, manifest: CacheManifest, shard: int) -> Shard:
    """Map a shard to memory. Raises DamagedCache if it is missing, cut short, or of another cache."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _MAX_HEADER))
    except OSError as error:
        raise DamagedCache(f"{path} can't be read ({error.strerror}){_remake_hint(manifest)}") from error
    count = len(manifest.span(shard))
    expected = 8 + length + count * manifest.image_bytes()
    if length > _MAX_HEADER:
        raise DamagedCache(f"{path} is damaged: its header can't be {length:,} bytes long{_remake_hint(manifest)}")
    if size < 8 or length != len(header) or size < expected:
        raise DamagedCache(f"{path} is cut short: {size_text(size)} of {size_text(expected)}{_remake_hint(manifest)}")
    try:
        entries = parse_json(header)
        note = parse_json(entries["__metadata__"]["mar"])
        crc32 = tuple(int(value) for value in note.get("crc32", ()))
        if len(crc32) not in (0, count):
            raise ValueError(f"checksums of {len(crc32)} pictures, not {count}")
        skipped = {int(number): str(name) for number, name in note["skipped"].items()}
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        moments = _map_tensor(data, entries["moments"], DTYPES[manifest.dtype], (count, *manifest.image_shape()))
        labels = _map_tensor(data, entries["labels"], torch.int32, (count,))
        digest = hashlib.sha256(length.to_bytes(8, "little") + header).hexdigest()
        return Shard(moments, labels, str(note["sha256"]), digest, skipped, size, crc32)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise DamagedCache(
            f"{path} is damaged: its header is not this cache's ({error}){_remake_hint(manifest)}"
        ) from error


def _map_tensor(data: Tensor, entry: Mapping[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if (entry["dtype"], tuple(entry["shape"])) != (_SAFETENSORS_TYPES[dtype], shape):
        raise ValueError(f"{entry['dtype']} {entry['shape']}, not {_SAFETENSORS_TYPES[dtype]} {list(shape)}")
    first, end = entry["data_offsets"]
    if end - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= end <= len(data):
        raise ValueError(f"bytes {first} to {end}")
    return data[first:end].view(dtype).view(shape)


def _remake_hint(manifest: CacheManifest) -> str:
    """Return the end of an error message: how to make a shard anew."""
    return (
        f"; delete it if it is there, and run the `mar cache` that made the folder again ({manifest.data} by the "
        f"tokenizer {manifest.tokenizer}): it makes only the shards that are missing"
    )


def is_cache(folder: Path) -> bool:
    """Tell if `mar cache` made or began this folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> CacheManifest:
    """Read the manifest of the cache in `folder`. Raises DamagedCache."""
    path = folder / MANIFEST
    values = _read_sealed(path, "the cache has to be made anew")
    try:
        manifest = from_dict(CacheManifest, values)
        if min(manifest.size + manifest.shape) < 1 or manifest.parts not in (1, 2):
            raise ValueError(f"{manifest.parts} parts of {manifest.shape}, of pictures of {manifest.size}")
        return manifest
    except (TypeError, ValueError, AttributeError) as error:
        raise DamagedCache(f"{path} can't be understood ({error}); the cache has to be made anew") from error


def write_manifest(folder: Path, manifest: CacheManifest) -> None:
    """Start a cache with its manifest."""
    _write_sealed(folder / MANIFEST, to_dict(manifest))


def write_index(folder: Path, manifest: CacheManifest) -> dict[int, str]:
    """Finish a cache with the index of its shards. Returns the unreadable images."""
    shards = [(manifest.file(k), open_shard(folder / manifest.file(k), manifest, k)) for k in range(manifest.shards)]
    skipped = {number: name for _, shard in shards for number, name in shard.skipped.items()}
    entries = [{"file": f, "bytes": s.size, "sha256": s.sha256, "header": s.header} for f, s in shards]
    _write_sealed(folder / INDEX, {"shards": entries, "skipped": {str(n): name for n, name in skipped.items()}})
    return skipped


def write_captions(folder: Path, captions: Captions) -> None:
    """Write the captions of the images, in their order; without any, remove those that are there."""
    if captions:
        _write_sealed(folder / CAPTIONS, {"captions": [list(each) for each in captions]})
    else:
        (folder / CAPTIONS).unlink(missing_ok=True)


def read_captions(folder: Path, manifest: CacheManifest) -> Captions:
    """Read the captions of the images; empty if they have none. Raises DamagedCache."""
    path = folder / CAPTIONS
    if not path.is_file():
        return ()
    try:
        listed = _read_sealed(path, "run the `mar cache` that made the folder again")["captions"]
        captions = tuple(tuple(str(caption) for caption in each) for each in listed)
    except (LookupError, TypeError) as error:
        raise DamagedCache(f"{path} can't be understood ({error}){_remake_hint(manifest)}") from error
    if len(captions) != manifest.pictures:
        raise DamagedCache(f"{path} has captions of {len(captions):,} pictures, expected {manifest.pictures:,}")
    return captions


@dataclass(frozen=True)
class Index:
    """The shards of a finished cache, by number."""

    files: tuple[str, ...]
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]
    headers: tuple[str, ...]
    skipped: dict[int, str]


def read_index(folder: Path, manifest: CacheManifest) -> Index:
    """Read the index of a cache. Raises ConfigError if it is not finished, DamagedCache."""
    path = folder / INDEX
    if not path.is_file():
        there = sum((folder / manifest.file(k)).is_file() for k in range(manifest.shards))
        raise ConfigError(
            f"{folder} is a cache, but not finished ({there} of {manifest.shards} shards); "
            "run the `mar cache` that began it again: it goes on"
        )
    values = _read_sealed(
        path, "delete it and run the `mar cache` that made the folder again: shards that are there stay"
    )
    try:
        shards = values["shards"]
        index = Index(
            files=tuple(str(shard["file"]) for shard in shards),
            sizes=tuple(int(shard["bytes"]) for shard in shards),
            sha256=tuple(str(shard["sha256"]) for shard in shards),
            headers=tuple(str(shard["header"]) for shard in shards),
            skipped={int(number): str(name) for number, name in values["skipped"].items()},
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedCache(f"{path} can't be understood ({error}){_remake_hint(manifest)}") from error
    if len(index.files) != manifest.shards:
        raise DamagedCache(
            f"{path} lists {len(index.files)} shards, expected {manifest.shards}{_remake_hint(manifest)}"
        )
    for number, file in enumerate(index.files):
        if file != manifest.file(number):
            raise DamagedCache(f"{path} names {file!r}, expected {manifest.file(number)}{_remake_hint(manifest)}")
    if outside := [number for number in index.skipped if not 0 <= number < manifest.pictures]:
        raise DamagedCache(f"{path} leaves out picture {outside[0]} of {manifest.pictures}{_remake_hint(manifest)}")
    return index


def check_shard(folder: Path, manifest: CacheManifest, index: Index, shard: int) -> Shard:
    """Open a shard and compare its header with the index. Raises DamagedCache.

    Args:
        folder: the cache.
        manifest: of the cache.
        index: of the cache.
        shard: number of the shard.
    """
    path = folder / index.files[shard]
    opened = open_shard(path, manifest, shard)
    if (opened.header, opened.sha256, opened.size) != (index.headers[shard], index.sha256[shard], index.sizes[shard]):
        raise DamagedCache(
            f"{folder / index.files[shard]} is damaged: its header is not the index's{_remake_hint(manifest)}"
        )
    return opened


def _write_sealed(path: Path, content: dict[str, Any]) -> None:
    values = json.loads(json.dumps(content))
    write_text(path, json.dumps({"format": FORMAT, "sha256": _json_digest(values), "content": values}, indent=1) + "\n")


def _read_sealed(path: Path, advice: str) -> dict[str, Any]:
    try:
        sealed = parse_json(path.read_text(encoding="utf-8"))
        if sealed["format"] != FORMAT and str(sealed["format"]).startswith("mar-latents/"):
            raise ConfigError(str(newer_format(path, str(sealed["format"]), FORMAT)))
        content: dict[str, Any] = sealed["content"]
        intact = _json_digest(content) == sealed["sha256"] and sealed["format"] == FORMAT and isinstance(content, dict)
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise DamagedCache(f"{path} is damaged; {advice}")
    return content


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def empty_shard(manifest: CacheManifest, count: int) -> tuple[Shaped[Tensor, "n f m c h w"], Int[Tensor, " n"]]:
    """Return zero moments and labels -1 of `count` images, to be filled."""
    moments = torch.zeros(count, *manifest.image_shape(), dtype=DTYPES[manifest.dtype])
    return moments, torch.full((count,), -1, dtype=torch.int32)


class LatentSource:
    """The latents of a cache, in the order of its images.

    Picklable, so that workers can have a copy.

    Opening reads the index and checks the size of every shard. Raises ConfigError if the cache is not finished,
    DamagedCache if a shard is missing, cut short, or does not match the index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.index = read_index(self.folder, self.manifest)
        self.classes = self.manifest.classes
        self.indices = np.arange(self.manifest.pictures)
        self.captions = read_captions(self.folder, self.manifest)
        self.flips = self.manifest.flips
        self.account: Account | None = None
        """Set by `open_data`."""
        self._shards: dict[int, Shard] = {}
        for file, size in zip(self.index.files, self.index.sizes, strict=True):
            path = self.folder / file
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                state = "is missing" if actual is None else f"has {actual:,} bytes instead of {size:,}"
                raise DamagedCache(f"{path} {state}{_remake_hint(self.manifest)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}  # each process maps files itself

    def subset(self, indices: np.ndarray) -> LatentSource:
        """Return the same cache with the images of `indices` only, numbered anew."""
        chosen = copy.copy(self)
        chosen.indices = self.indices[indices]
        chosen.captions = chosen_captions(self.captions, indices)
        return chosen

    @property
    def labels(self) -> np.ndarray:
        """Class numbers of the images, -1 for none; an unreadable one has that of the next, which is read for it."""
        shards = [self._open(number).labels.numpy() for number in range(self.manifest.shards)]
        labels = np.concatenate(shards)[self.indices]
        skipped = np.isin(self.indices, [*self.index.skipped])
        readable = np.flatnonzero(~skipped)
        if skipped.any() and len(readable):
            following = np.searchsorted(readable, np.flatnonzero(skipped)) % len(readable)
            labels[skipped] = labels[readable[following]]
        return labels

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, flip: bool) -> tuple[Float[Tensor, "m c h w"], int]:
        """Read raw moments, in float32, and the class number of an image.

        Moments are mean and log-variance, or the mean alone (m is 1). Class -1: none. Raises UnreadableImage if the
        image could not be read when the cache was made, ConfigError if only plain images are cached, DamagedCache.
        """
        index = int(self.indices[index])
        if index in self.index.skipped:
            raise UnreadableImage(self.index.skipped[index], "it could not be read when the cache was made")
        if flip and not self.flips:
            raise ConfigError(
                f"{self.folder} holds no flipped pictures; train with --flip False, or cache them anew with --flip True"
            )
        shard, row = divmod(index, self.manifest.shard)
        opened = self._open(shard)
        if checksums.enabled() and not opened.row_intact(row):
            raise self._damaged(shard, f"picture {index}")
        return opened.moments[row, int(flip)].float(), int(opened.labels[row])

    def _open(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = check_shard(self.folder, self.manifest, self.index, number)
        return self._shards[number]

    def _damaged(self, shard: int, what: str) -> DamagedCache:
        return DamagedCache(
            f"{self.folder / self.index.files[shard]} is damaged: {what} is not as it was written"
            f"{_remake_hint(self.manifest)}"
        )

    def in_order(self, limit: int | None = None) -> Iterator[LatentMoments]:
        """Yield the plain moments of readable images, by shards. `limit`: the first so many."""
        chosen = np.zeros(self.manifest.pictures, dtype=bool)
        chosen[self.indices[:limit]] = True
        chosen[list(self.index.skipped)] = False
        for number in range(self.manifest.shards):
            span = self.manifest.span(number)
            rows = np.flatnonzero(chosen[span.start : span.stop]).tolist()
            if rows:
                shard = check_shard(self.folder, self.manifest, self.index, number)
                if checksums.enabled() and (bad := [row for row in rows if not shard.row_intact(row)]):
                    raise self._damaged(number, f"picture {span[bad[0]]}")
                yield split_moments(shard.moments[rows, 0].float())


def split_moments(moments: Float[Tensor, "n m c h w"]) -> LatentMoments:
    """Split an axis of mean and log-variance, or of the mean alone."""
    return LatentMoments(moments[:, 0], moments[:, 1] if moments.shape[1] == 2 else None)


def verify(folder: str | Path, advance: Callable[[float], None] = lambda images: None) -> LatentSource:
    """Compare every byte of a finished cache with its checksums.

    Calls `advance` with the number of images done. Raises DamagedCache with the names of damaged shards, ConfigError if
    it is no finished cache.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    damaged: list[str] = []
    for number in range(manifest.shards):
        try:
            intact = check_shard(folder, manifest, index, number).intact()
        except DamagedCache:
            intact = False
        if not intact:
            damaged.append(index.files[number])
        advance(manifest.span(number).stop)
    if damaged:
        names = ", ".join(damaged[:8]) + (", ..." if len(damaged) > 8 else "")
        raise DamagedCache(
            f"{folder}: {len(damaged)} of {manifest.shards} shards are damaged: {names}{_remake_hint(manifest)}"
        )
    return LatentSource(folder)
