"""Pictures to be judged, batch by batch: of a model, a data source, or an `.npz` file. Nothing piles up.

Letters of shapes: n pictures of a batch, c colours (1 or 3), h x w pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mar.data.images import Source, adm_center_crop, convert_channels
from mar.data.splits import stratified_indices, subset
from mar.pipeline import Pipeline
from mar.sampling.plan import STRIDE, Plan


@dataclass(frozen=True)
class ImageBatch:
    """A batch."""

    images: UInt8[Tensor, "n c h w"]
    indices: Int[Tensor, " n"]
    """Their numbers in the whole set."""
    labels: Int[Tensor, " n"]
    """Class numbers; -1 where there is none."""


@runtime_checkable
class PictureSet(Protocol):
    """A set of pictures of one size that can be walked through, in shares."""

    name: str
    """What it is, in words."""
    classes: tuple[str, ...]
    """Names of the classes by number; empty where there are none."""

    def __len__(self) -> int: ...

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        """Pictures [first, end), at most `batch` at a time."""
        ...


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """[first, end) of `count` pictures for process `rank` of `world`; shares differ by one at most."""
    return count * rank // world, count * (rank + 1) // world


class SourcePictures:
    """A data source's pictures, each as it is, or brought to `size` (height, width) by ADM's centre crop.

    `limit` takes at most so many, spread evenly over the source (`spread`), which may be sorted by class. Raises
    ValueError where pictures differ in size and none was asked for.
    """

    def __init__(
        self, source: Source, name: str, *, size: tuple[int, int] | None = None, limit: int | None = None
    ) -> None:
        self.source = source if limit is None else subset(source, limit)
        self.name, self.size = name, size
        self.classes = tuple(source.classes)
        self.first: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        for start in range(first, end, batch):
            indices = list(range(start, min(start + batch, end)))
            examples = [self.source[i] for i in indices]
            # grey pictures among colours are repeated; extractors make no difference
            grey = all(example.image.mode in ("1", "L") for example in examples)
            pictures = [self._pixels(example.image, example.name, 1 if grey else 3) for example in examples]
            labels = torch.tensor([example.label for example in examples])
            yield ImageBatch(torch.stack(pictures), torch.tensor(indices), labels)

    def _pixels(self, image: Any, name: str, channels: int) -> Tensor:
        image = convert_channels(image, channels)
        if self.size is not None:
            image = adm_center_crop(image, self.size)
        size = (image.height, image.width)
        self.first = self.first or size
        if size != self.first:
            raise ValueError(
                f"{self.name}: {name} is {size[0]}x{size[1]}, but those before it are {self.first[0]}x{self.first[1]}; "
                "bring all to one size with --image-size"
            )
        pixels = np.array(image)
        return torch.from_numpy(pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class NpzPictures:
    """The pictures of an `.npz` as ADM's evaluation suite reads them: `arr_0`, uint8 (count, h, w, 1 or 3).

    Class numbers are taken from `arr_1` where it is there. `limit` takes at most so many, spread evenly
    (`choose`). Read piece by piece, compressed or not.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, path: Path, *, limit: int | None = None) -> None:
        self.path, self.name = path, str(path)
        shape, dtype = self._kind()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (count, height, width, 1 or 3)")
        self.shape = shape
        self.numbers = stratified_indices(shape[0], shape[0] if limit is None else limit)
        self.labels = self._labels()[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        _, height, width, channels = self.shape
        size = height * width * channels
        with self._reading("its pictures"), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            at = 0
            for start in range(first, end, batch):
                numbers = self.numbers[start : min(start + batch, end)]
                data = bytearray()
                for number in numbers.tolist():
                    if number != at:
                        file.seek((number - at) * size, 1)
                    data += file.read(size)
                    at = number + 1
                if len(data) < len(numbers) * size:
                    raise EOFError("it ends before its last picture")
                pixels = np.frombuffer(data, np.uint8).reshape(len(numbers), height, width, channels)
                images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
                indices = torch.arange(start, start + len(numbers))
                yield ImageBatch(images, indices, self.labels[start : start + len(numbers)])

    def _kind(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of `arr_0`, whose checksum is kept."""
        with self._reading("pictures"), zipfile.ZipFile(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                names = ", ".join(archive.namelist()) or "nothing"
                raise ValueError(f"it has {names}, but no arr_0, uint8 (count, height, width, 1 or 3)")
            self.checksum = archive.getinfo("arr_0.npy").CRC
            with archive.open("arr_0.npy") as file:
                return _header(file)

    def _labels(self) -> Tensor:
        with self._reading("class numbers"), zipfile.ZipFile(self.path) as archive:
            if "arr_1.npy" not in archive.namelist():
                return torch.full((self.shape[0],), -1)
            with archive.open("arr_1.npy") as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
        if labels.shape != (self.shape[0],) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: arr_1 is {labels.dtype} {labels.shape}, expected ({self.shape[0]},) whole numbers"
            )
        return torch.from_numpy(labels.astype(np.int64))

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Whatever a damaged file raises, in one line."""
        try:
            yield
        except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.path}: {what} can't be read ({reason}); make it again") from None


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an `.npy` that is read from its beginning."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("its pictures lie in Fortran's order; save them in C's")
    return shape, dtype


def digest(pictures: PictureSet, count: int = 32) -> str:
    """sha256, in hex, that tells sets of one name and size apart in a moment: of `count` pictures spread over the set,
    or of the checksum that an `.npz` has of all of its pictures."""
    if isinstance(pictures, NpzPictures):
        return hashlib.sha256(f"{len(pictures)} {pictures.shape} {pictures.checksum}".encode()).hexdigest()
    held = hashlib.sha256()
    for number in stratified_indices(len(pictures), count).tolist():
        for part in pictures.batches(1, number, number + 1):
            held.update(f"{number} {tuple(part.images.shape)}".encode())
            held.update(part.images.contiguous().numpy().tobytes())
    return held.hexdigest()


class DrawnPictures:
    """Pictures that a model draws as they are asked for: picture i depends on (seed, i) and its class alone."""

    def __init__(
        self, pipeline: Pipeline, plan: Plan, *, name: str, advance: Callable[[float], None] | None = None,
        allow_broken: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        self.pipeline, self.plan, self.name, self.settings = pipeline, plan, name, settings
        self.allow_broken, self.advance = allow_broken, advance
        self.classes = tuple(pipeline.classes)

    def __len__(self) -> int:
        return len(self.plan)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        numbers = list(range(first, end))
        labels = [self.plan.labels[i] for i in numbers]
        stream = self.pipeline.stream(
            [None if label < 0 else label for label in labels],
            [self.plan.seed * STRIDE + i for i in numbers],
            batch=batch,
            allow_broken=self.allow_broken,
            advance=self.advance,
            **self.settings,
        )
        for images in stream:
            n = len(images)
            yield ImageBatch(images, torch.tensor(numbers[:n]), torch.tensor(labels[:n]))
            numbers, labels = numbers[n:], labels[n:]
