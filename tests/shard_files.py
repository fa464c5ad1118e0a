"""Shards of small grey pictures, each of a value of its own: 5 times its number."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mar.data.images import UnreadableImage
from mar.data.loader import Batch, ImageBatch
from mar.data.stream import StreamSample


def png_bytes(number: int) -> bytes:
    """Picture `number` (below 50), 8x8."""
    file = io.BytesIO()
    Image.new("L", (8, 8), 5 * number).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of (name, content), in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tar_shards(folder: Path, sizes: Iterable[int] = (6, 6, 6, 6), classes: int = 3) -> Path:
    """WebDataset shards of so many pictures each, whose classes take turns."""
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for i in range(number, number + size):
            members += [(f"{i:05}.png", png_bytes(i)), (f"{i:05}.cls", str(i % classes).encode())]
        write_tar(folder / f"shard-{shard:03}.tar", members)
        number += size
    return folder


@dataclass
class NumberedShards:
    """Shards of a stream, of so many pictures: those in `broken` are none, and picture 22 can't be fetched."""

    sizes: tuple[int, ...] = (6, 6, 6, 6)
    broken: tuple[int, ...] = ()
    classes: tuple[str, ...] = ("0", "1", "2")
    read: int = 0
    """Pictures that were asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"s{i}" for i in range(len(self.sizes)))

    def samples(self, shard: int) -> Iterator[StreamSample]:
        first = sum(self.sizes[:shard])
        for i in range(first, first + self.sizes[shard]):
            self.read += 1
            # Every other one is not in the shard, but somewhere else.
            data = b"no picture" if i in self.broken else png_bytes(i) if i % 2 else None
            yield StreamSample(f"p{i}", data, f"far/{i}", label=i % 3)

    def fetch(self, sample: StreamSample) -> bytes:
        if sample.path == "far/22":
            raise UnreadableImage(sample.name, "it is not there")
        return png_bytes(int(sample.name[1:]))


def image_numbers(batch: Batch) -> list[int]:
    """Which pictures a batch holds."""
    assert isinstance(batch, ImageBatch)
    return [round(float(image.mean() + 1) * 127.5 / 5) for image in batch.images]
