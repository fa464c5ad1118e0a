"""Pictures in WebDataset shards on the disk: tar files, read at any place, not unpacked."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from mar.data.folder import EXTENSIONS
from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import Label, class_names, class_number


@dataclass
class _Sample:
    """Files of one name in a shard: `a.jpg`, `a.cls`, `a.json`."""

    key: str
    picture: str = ""
    offset: int = -1
    size: int = 0
    label: Label = None


class TarSource:
    """The pictures of tar files, one after the other; each with the label in its `.cls`, or at "label" in its `.json`.

    Files that follow each other and have the same name, up to its first dot, belong together. Labels are numbers, or
    names of classes. Opening reads the headers of all files, once. Raises ValueError where there is no picture, and for
    a tar that is cut short or none.
    """

    flips = True

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name, self.files = name, list(files)
        stats = [os.stat(file) for file in self.files]
        self._states = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        found = [(number, sample) for number, file in enumerate(self.files) for sample in _samples(file)]
        if not found:
            kinds = " ".join(sorted(EXTENSIONS))
            raise ValueError(f"data: no pictures in {name} ({len(self.files)} tar files): looked for {kinds}")
        self.classes = class_names(sample.label for _, sample in found)
        numbers = {label: number for number, label in enumerate(self.classes)}
        # Arrays, not lists: workers share their memory, since nothing counts references to what is in them.
        self.labels = np.array([class_number(sample.label, numbers) for _, sample in found])
        self._places = np.array([(number, sample.offset, sample.size) for number, sample in found], dtype=np.int64)
        self._names = np.array([os.fsencode(sample.picture) for _, sample in found])

    def __len__(self) -> int:
        return len(self._places)

    def member(self, index: int) -> tuple[str, int]:
        """Name in its shard, and size in bytes, of a picture."""
        return os.fsdecode(self._names[index].item()), int(self._places[index, 2])

    def __getitem__(self, index: int) -> Example:
        number, offset, size = self._places[index].tolist()
        file = self.files[number]
        name = f"{file}/{self.member(index)[0]}"
        try:
            with file.open("rb") as shard:
                stat = os.fstat(shard.fileno())
                if (stat.st_size, stat.st_mtime_ns) != self._states[number]:
                    raise UnreadableImage(name, "its tar file is not the one that was opened")
                shard.seek(offset)
                data = shard.read(size)
        except OSError as error:
            raise UnreadableImage(name, str(error)) from error
        return Example(decode_image(BytesIO(data), name), int(self.labels[index]), name)


def _samples(file: Path) -> Iterator[_Sample]:
    """What a shard holds, but for samples without a picture."""
    sample = _Sample("")
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                key, extension = _parts(member.name)
                if not member.isreg() or not key:
                    continue
                if key != sample.key:
                    if sample.picture:
                        yield sample
                    sample = _Sample(key)
                _add(sample, shard, member, extension)
            _check_end(shard)
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data: {file} is cut short or no plain tar ({error}); fetch it again, or leave it out"
        ) from error
    if sample.picture:
        yield sample


def _parts(path: str) -> tuple[str, str]:
    """A member's folder and name up to the first dot, and what follows it: those of hidden files are empty."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (f"{folder}/{stem}" if stem else ""), extension.lower()


def _add(sample: _Sample, shard: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    if extension == "cls":
        sample.label = _read_label(shard, member)
    elif extension == "json" and sample.label is None:
        sample.label = _read_json_label(shard, member)
    elif not sample.picture and f".{extension.rpartition('.')[2]}" in EXTENSIONS:
        sample.picture, sample.offset, sample.size = member.name, member.offset_data, member.size


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = shard.extractfile(member)
    assert file is not None  # it is a regular one
    return file.read().decode()


def _read_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> Label:
    text = _content(shard, member).strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def _read_json_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> Label:
    try:
        values = json.loads(_content(shard, member))
    except json.JSONDecodeError:
        return None
    label = values.get("label") if isinstance(values, dict) else None
    return label if isinstance(label, int | str) else None


def _check_end(shard: tarfile.TarFile) -> None:
    """Raises ReadError where a header is damaged, which tarfile takes for the end."""
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    if any(shard.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"no header at byte {shard.offset:,}")
