"""The files of a latent cache: `cache.json` (what it is of), shards of safetensors, `index.json` once all are there.

Shard k holds the pictures from k * `About.shard` on, in two tensors: `moments` (n, flips, 1 or 2, c, h, w), whose axes
are plain and flipped, mean and log-variance; and `labels` (n). A picture that could not be read keeps its place, with
zeros, so that picture i is always row i % shard of shard i // shard. Every byte is under a sha256: a shard's tensors
under one in its metadata, its header under one in the index, and the two JSON files under one of their own.

A latent cache as data to train on: moments of any picture by its number, mapped to memory.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors.torch import save
from torch import Tensor

from mar.checkpoint.files import size_text, write_atomically, write_text
from mar.config import ConfigError, to_dict
from mar.data.images import UnreadableImage
from mar.tokenizer.base import LatentMoments

FORMAT = "mar-latents/1"
"""Version of the cache's format."""
MANIFEST = "cache.json"
"""Name of the file that describes tokenizer and images."""
INDEX = "index.json"
"""Name of the file that lists the shards."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""How moments may be stored. float16 is for the disk alone: they are float32 again when they are read."""

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
_LONGEST_HEADER = 100_000_000


class DamagedCache(ConfigError):
    """A file of a cache that is not what was written: one line that says which, and how to make it anew."""


@dataclass(frozen=True)
class CacheManifest:
    """What a cache is of: all that its latents depend on, and where they came from."""

    tokenizer: str
    """Its name, for people; the fingerprint counts."""
    fingerprint: str
    """Of the tokenizer (`mar.tokenizer.base.fingerprint`)."""
    data: str
    """Where the pictures were, for people; the digest counts."""
    source: str
    """Digest of the list of pictures (`mar.data.fingerprint`)."""
    pictures: int
    classes: tuple[str, ...]
    size: tuple[int, int]
    """Height and width that the pictures were cut to (ADM's centre crop)."""
    shape: tuple[int, int, int]
    """Channels, height and width of a latent."""
    parts: int
    """2: mean and log-variance; 1: means only, of a deterministic tokenizer."""
    flips: bool
    """Whether moments of the flipped pictures are there too."""
    dtype: str
    """fp16, bf16 or fp32."""
    shard: int
    """Pictures of a shard."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype of the cache: got {self.dtype!r}, expected {', '.join(DTYPES)}")
        if self.shard < 1 or self.pictures < 1:
            raise ConfigError(
                f"cache: got {self.pictures} pictures in shards of {self.shard}, expected at least 1 each"
            )

    @property
    def shards(self) -> int:
        """How many there are."""
        return math.ceil(self.pictures / self.shard)

    def span(self, shard: int) -> range:
        """The pictures of a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.pictures))

    def file(self, shard: int) -> str:
        """A shard's name: its number in as many digits as every shard has, at least five."""
        return f"{shard:0{max(5, len(str(self.shards - 1)))}}.safetensors"

    def row(self) -> tuple[int, ...]:
        """The shape of what is kept of a picture."""
        return (1 + self.flips, self.parts, *self.shape)

    def picture_bytes(self) -> int:
        """Bytes of a picture in a shard, its label included."""
        return math.prod(self.row()) * DTYPES[self.dtype].itemsize + torch.int32.itemsize


@dataclass(frozen=True)
class Shard:
    """A shard of a cache, its tensors mapped to memory: nothing is read before it is used."""

    moments: Shaped[Tensor, "n f m c h w"]
    labels: Int[Tensor, " n"]
    sha256: str
    """Of the bytes of both, as noted when they were written."""
    header: str
    """sha256 of the file's header."""
    skipped: dict[int, str]
    """Pictures that could not be read: numbers and names."""
    size: int
    """Bytes of the file."""

    def intact(self) -> bool:
        """Whether the tensors are what was written; reads all of them."""
        return tensors_digest(self.moments, self.labels) == self.sha256


def tensors_digest(moments: Shaped[Tensor, "..."], labels: Int[Tensor, " n"]) -> str:
    """sha256, in hex, of the bytes of a shard's tensors."""
    digest = hashlib.sha256()
    for tensor in (moments, labels):
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_shard(
    path: Path, moments: Shaped[Tensor, "n f m c h w"], labels: Int[Tensor, " n"], skipped: Mapping[int, str]
) -> None:
    """Writes a shard, whole or not at all. Raises CheckpointError where the disk refuses."""
    note = {"format": FORMAT, "sha256": tensors_digest(moments, labels), "skipped": {**skipped}}
    data = save({"moments": moments, "labels": labels}, {"mar": json.dumps(note)})

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write, len(data))


def open_shard(path: Path, about: CacheManifest, shard: int) -> Shard:
    """Maps a shard to memory. Raises DamagedCache where it is missing, cut short, or not of this cache."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _LONGEST_HEADER))
    except OSError as error:
        raise DamagedCache(f"{path} can't be read ({error.strerror}){remake(about)}") from error
    count = len(about.span(shard))
    expected = 8 + length + count * about.picture_bytes()
    if length > _LONGEST_HEADER:
        raise DamagedCache(f"{path} is damaged: its header can't be {length:,} bytes long{remake(about)}")
    if size < 8 or length != len(header) or size < expected:
        raise DamagedCache(f"{path} is cut short: {size_text(size)} of {size_text(expected)}{remake(about)}")
    try:
        entries = json.loads(header)
        note = json.loads(entries["__metadata__"]["mar"])
        skipped = {int(number): str(name) for number, name in note["skipped"].items()}
        kept = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        moments = _tensor(kept, entries["moments"], DTYPES[about.dtype], (count, *about.row()))
        labels = _tensor(kept, entries["labels"], torch.int32, (count,))
        digest = hashlib.sha256(length.to_bytes(8, "little") + header).hexdigest()
        return Shard(moments, labels, str(note["sha256"]), digest, skipped, size)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedCache(f"{path} is damaged: its header is not this cache's ({error}){remake(about)}") from error


def _tensor(kept: Tensor, entry: Mapping[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if (entry["dtype"], tuple(entry["shape"])) != (_NAMES[dtype], shape):
        raise ValueError(f"{entry['dtype']} {entry['shape']}, not {_NAMES[dtype]} {list(shape)}")
    first, end = entry["data_offsets"]
    if end - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= end <= len(kept):
        raise ValueError(f"bytes {first} to {end}")
    return kept[first:end].view(dtype).view(shape)


def remake(about: CacheManifest) -> str:
    """What to do about a shard, as the end of a line."""
    return (
        f"; delete it if it is there, and run the `mar cache` that made the folder again ({about.data} by the "
        f"tokenizer {about.tokenizer}): it makes only the shards that are missing"
    )


def is_cache(folder: Path) -> bool:
    """Whether `mar cache` made or began this folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> CacheManifest:
    """What the cache in `folder` is of; DamagedCache where that can't be read."""
    path = folder / MANIFEST
    values = _unseal(path, "the cache has to be made anew")
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return CacheManifest(**values)
    except (TypeError, ValueError) as error:
        raise DamagedCache(f"{path} can't be understood ({error}); the cache has to be made anew") from error


def write_manifest(folder: Path, about: CacheManifest) -> None:
    """Begins a cache."""
    _seal(folder / MANIFEST, to_dict(about))


def write_index(folder: Path, about: CacheManifest) -> dict[int, str]:
    """Ends a cache, all of whose shards are there. Returns the pictures that could not be read."""
    shards = [(about.file(k), open_shard(folder / about.file(k), about, k)) for k in range(about.shards)]
    skipped = {number: name for _, shard in shards for number, name in shard.skipped.items()}
    listed = [{"file": f, "bytes": s.size, "sha256": s.sha256, "header": s.header} for f, s in shards]
    _seal(folder / INDEX, {"shards": listed, "skipped": {str(n): name for n, name in skipped.items()}})
    return skipped


@dataclass(frozen=True)
class Index:
    """What a finished cache says of its shards, by number."""

    files: tuple[str, ...]
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]
    headers: tuple[str, ...]
    skipped: dict[int, str]


def read_index(folder: Path, about: CacheManifest) -> Index:
    """The index of a finished cache. ConfigError where it is not finished; DamagedCache where it can't be read."""
    path = folder / INDEX
    if not path.is_file():
        there = sum((folder / about.file(k)).is_file() for k in range(about.shards))
        raise ConfigError(
            f"{folder} is a cache that is not finished ({there} of {about.shards} shards); "
            "run the `mar cache` that began it again, which goes on"
        )
    values = _unseal(path, "delete it and run the `mar cache` that made the folder again: shards that are there stay")
    shards = values["shards"]
    return Index(
        files=tuple(shard["file"] for shard in shards),
        sizes=tuple(shard["bytes"] for shard in shards),
        sha256=tuple(shard["sha256"] for shard in shards),
        headers=tuple(shard["header"] for shard in shards),
        skipped={int(number): name for number, name in values["skipped"].items()},
    )


def check_shard(folder: Path, about: CacheManifest, index: Index, shard: int) -> Shard:
    """`open_shard`, and DamagedCache where its header is not the one that the index knows."""
    found = open_shard(folder / index.files[shard], about, shard)
    if (found.header, found.sha256, found.size) != (index.headers[shard], index.sha256[shard], index.sizes[shard]):
        raise DamagedCache(f"{folder / index.files[shard]} is damaged: its header is not the index's{remake(about)}")
    return found


def _seal(path: Path, content: dict[str, Any]) -> None:
    values = json.loads(json.dumps(content))
    write_text(path, json.dumps({"format": FORMAT, "sha256": _json_digest(values), "content": values}, indent=1) + "\n")


def _unseal(path: Path, advice: str) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        if sealed["format"] != FORMAT and str(sealed["format"]).startswith("mar-latents/"):
            raise ConfigError(f"{path} is of format {sealed['format']}, but this mar reads {FORMAT}; update mar")
        content: dict[str, Any] = sealed["content"]
        whole = _json_digest(content) == sealed["sha256"] and sealed["format"] == FORMAT
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        whole = False
    if not whole:
        raise DamagedCache(f"{path} is damaged; {advice}")
    return content


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def zeros(about: CacheManifest, count: int) -> tuple[Shaped[Tensor, "n f m c h w"], Int[Tensor, " n"]]:
    """Moments and labels for `count` pictures, to be filled: those that never are stay zero, with label -1."""
    moments = torch.zeros(count, *about.row(), dtype=DTYPES[about.dtype])
    return moments, torch.full((count,), -1, dtype=torch.int32)


class LatentSource:
    """The latents that `mar cache` made, in the order of the pictures; picklable, so that workers can have a copy.

    Opening reads the index and looks at the size of every shard. Raises ConfigError where the cache is not finished,
    DamagedCache where a shard is missing, cut short, or not what the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = read_manifest(self.folder)
        self.index = read_index(self.folder, self.about)
        self.classes = self.about.classes
        self.flips = self.about.flips
        self.rows = np.arange(self.about.pictures)
        self._shards: dict[int, Shard] = {}
        for file, size in zip(self.index.files, self.index.sizes, strict=True):
            path = self.folder / file
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
                raise DamagedCache(f"{path} {what}{remake(self.about)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}  # each process maps files itself

    def part(self, rows: np.ndarray) -> LatentSource:
        """The same cache with these of its pictures only, numbered anew."""
        chosen = copy.copy(self)
        chosen.rows = self.rows[rows]
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, flip: bool) -> tuple[Float[Tensor, "m c h w"], int]:
        """Mean and log-variance (means alone where m is 1) of the raw latents of picture `index`, plain or flipped, in
        float32; and its class number, -1 where it has none.

        Raises UnreadableImage for a picture that could not be read when the cache was made; ConfigError for a flipped
        one where there are only plain ones; DamagedCache.
        """
        index = int(self.rows[index])
        if index in self.index.skipped:
            raise UnreadableImage(self.index.skipped[index], "it could not be read when the cache was made")
        if flip and not self.flips:
            raise ConfigError(
                f"{self.folder} holds no flipped pictures; train with --flip False, or cache them anew with --flip True"
            )
        shard, row = divmod(index, self.about.shard)
        if shard not in self._shards:
            self._shards[shard] = check_shard(self.folder, self.about, self.index, shard)
        found = self._shards[shard]
        return found.moments[row, int(flip)].float(), int(found.labels[row])

    def in_order(self, limit: int | None = None) -> Iterator[LatentMoments]:
        """The plain moments of every picture that could be read, once, by shards; of the first `limit` pictures."""
        wanted = np.zeros(self.about.pictures, dtype=bool)
        wanted[self.rows[:limit]] = True
        wanted[list(self.index.skipped)] = False
        for number in range(self.about.shards):
            span = self.about.span(number)
            rows = np.flatnonzero(wanted[span.start : span.stop]).tolist()
            if rows:
                shard = check_shard(self.folder, self.about, self.index, number)
                yield unpack(shard.moments[rows, 0].float())


def unpack(moments: Float[Tensor, "n m c h w"]) -> LatentMoments:
    """The two of an axis of mean and log-variance, or of means alone, by name."""
    return LatentMoments(moments[:, 0], moments[:, 1] if moments.shape[1] == 2 else None)


def verify(folder: str | Path, advance: Callable[[float], None] = lambda pictures: None) -> LatentSource:
    """Holds every byte of a finished cache against its checksums; tells `advance` how many pictures are done.

    Raises DamagedCache, in one line, for the shards that are not what was written; ConfigError for no cache at all.
    """
    folder = Path(folder)
    about = read_manifest(folder)
    index = read_index(folder, about)
    damaged: list[str] = []
    for number in range(about.shards):
        try:
            intact = check_shard(folder, about, index, number).intact()
        except DamagedCache:
            intact = False
        if not intact:
            damaged.append(index.files[number])
        advance(about.span(number).stop)
    if damaged:
        which = ", ".join(damaged[:8]) + (", ..." if len(damaged) > 8 else "")
        raise DamagedCache(f"{folder}: {len(damaged)} of {about.shards} shards are damaged: {which}{remake(about)}")
    return LatentSource(folder)
