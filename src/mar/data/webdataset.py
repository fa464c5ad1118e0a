"""Images in WebDataset shards on the disk: tar files, indexed, not unpacked."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import Label, class_names, class_number
from mar.data.paths import IMAGE_SUFFIXES


@dataclass
class _TarSample:
    """Members of one name in a shard: `a.jpg`, `a.cls`, `a.json`."""

    key: str
    image_name: str = ""
    offset: int = -1
    size: int = 0
    label: Label = None


class TarSource:
    """The images of tar files, one after the other.

    Members in a row of the same name, up to its first dot, belong together. Labels are in `.cls`, or at "label" in
    `.json`: numbers, or names of classes.
    Opening reads the headers of all files, once. Raises ValueError without images, and for a damaged tar file.
    """

    flips = True

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name, self.files = name, list(files)
        stats = [os.stat(file) for file in self.files]
        self._stats = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        samples = [(number, sample) for number, file in enumerate(self.files) for sample in _read_samples(file)]
        if not samples:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"data: no pictures in {name} ({len(self.files)} tar files): looked for {suffixes}")
        self.classes = class_names(sample.label for _, sample in samples)
        numbers = {label: number for number, label in enumerate(self.classes)}
        # Arrays, not lists: nothing counts references to their elements, so workers share their memory.
        self.labels = np.array([class_number(sample.label, numbers) for _, sample in samples])
        # Of each image: number of its file, offset, size.
        self._index = np.array([(number, sample.offset, sample.size) for number, sample in samples], dtype=np.int64)
        self._names = np.array([os.fsencode(sample.image_name) for _, sample in samples])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        number, offset, size = self._index[index].tolist()
        file = self.files[number]
        name = f"{file}/{self._member_name(index)}"
        try:
            with file.open("rb") as shard:
                stat = os.fstat(shard.fileno())
                if (stat.st_size, stat.st_mtime_ns) != self._stats[number]:
                    raise UnreadableImage(name, "its tar file is not the one that was opened")
                shard.seek(offset)
                data = shard.read(size)
        except OSError as error:
            raise UnreadableImage(name, str(error)) from error
        return Example(decode_image(BytesIO(data), name), int(self.labels[index]), name)

    def _member_name(self, index: int) -> str:
        return os.fsdecode(self._names[index].item())

    def image_names(self) -> list[str]:
        """Return shard and member of every image."""
        shards = [self.files[number].name for number in self._index[:, 0].tolist()]
        return [f"{shard}/{self._member_name(index)}" for index, shard in enumerate(shards)]

    def listing(self) -> Iterator[bytes]:
        """Yield member, label and size of every image: shards may be renamed."""
        for name, label, size in zip(self._names.tolist(), self.labels, self._index[:, 2].tolist(), strict=True):
            yield b"%b\0%d %d\n" % (name, label, size)


def _read_samples(file: Path) -> Iterator[_TarSample]:
    """Yield the samples of a shard that have an image."""
    sample = _TarSample("")
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                key, extension = _split_name(member.name)
                if not member.isreg() or not key:
                    continue
                if key != sample.key:
                    if sample.image_name:
                        yield sample
                    sample = _TarSample(key)
                _add_member(sample, shard, member, extension)
            _check_end(shard)
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data: {file} is cut short or no plain tar ({error}); fetch it again, or leave it out"
        ) from error
    if sample.image_name:
        yield sample


def _split_name(path: str) -> tuple[str, str]:
    """Split a member's path at the first dot of its name; the key of a hidden file is empty."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (f"{folder}/{stem}" if stem else ""), extension.lower()


def _add_member(sample: _TarSample, shard: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    if extension == "cls":
        sample.label = _read_label(shard, member)
    elif extension == "json" and sample.label is None:
        sample.label = _read_json_label(shard, member)
    elif not sample.image_name and f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES:
        sample.image_name, sample.offset, sample.size = member.name, member.offset_data, member.size


def _read_text(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = shard.extractfile(member)
    assert file is not None  # it is a regular one
    return file.read().decode()


def _read_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> Label:
    text = _read_text(shard, member).strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def _read_json_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> Label:
    try:
        values = json.loads(_read_text(shard, member))
    except json.JSONDecodeError:
        return None
    label = values.get("label") if isinstance(values, dict) else None
    return label if isinstance(label, int | str) else None


def _check_end(shard: tarfile.TarFile) -> None:
    """Raise ReadError for a damaged header, which tarfile takes for the end."""
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    if any(shard.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"no header at byte {shard.offset:,}")
