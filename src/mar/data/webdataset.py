"""Images in WebDataset shards on the disk: tar files, indexed, not unpacked."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from mar.data.captions import CAPTION_COLUMNS, CaptionError, Captions, as_captions, counted_captions, warn_once
from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import Label, class_names, class_number
from mar.data.paths import IMAGE_SUFFIXES

_TEXT = "txt"


@dataclass
class _TarSample:
    """Members of one name in a shard: `a.jpg`, `a.cls`, `a.json`, `a.txt`."""

    key: str
    image_name: str = ""
    offset: int = -1
    size: int = 0
    label: Label = None
    text: tuple[str, ...] = ()
    """Captions in `.txt`."""
    json_text: tuple[str, ...] = ()
    """Captions in `.json`."""

    @property
    def captions(self) -> tuple[str, ...]:
        return self.text or self.json_text


class TarSource:
    """The images of tar files, one after the other.

    Members in a row of the same name, up to its first dot, belong together. Labels are in `.cls`, or at "label" in
    `.json`: numbers, or names of classes. Captions are in `.txt`, one a line, or in `.json` at "text", "caption" or
    "prompt"; those that can't be read are left out with a warning.
    Opening reads the headers of all files, once. Raises ValueError without images, and for a damaged tar file.
    """

    flips = True

    def __init__(self, files: Sequence[Path], name: str, caption_column: str | None = None) -> None:
        """List the images and read their labels and captions.

        Args:
            files: the shards.
            name: of all of them, in messages.
            caption_column: key of captions in `.json`; "txt": only the `.txt` members; None: as above.
        """
        self.name, self.files = name, list(files)
        stats = [os.stat(file) for file in self.files]
        self._stats = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        reader = _SampleReader(caption_column)
        samples = [(number, sample) for number, file in enumerate(self.files) for sample in reader.samples(file)]
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
        self.captions = reader.check(tuple(sample.captions for _, sample in samples), name)

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
        captions = self.captions[index] if self.captions else ()
        return Example(decode_image(BytesIO(data), name), int(self.labels[index]), name, captions)

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


class _SampleReader:
    """Reads the samples of shards, and notes members that can't be read.

    Args:
        caption_column: key of captions in `.json`; "txt": only the `.txt` members; None: both, by the usual names.
    """

    def __init__(self, caption_column: str | None) -> None:
        self.caption_column = caption_column
        self.keys = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        self.bad: list[str] = []
        """What is wrong with the members that are left out."""

    def samples(self, file: Path) -> Iterator[_TarSample]:
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
                    self._add(sample, shard, member, extension)
                _check_end(shard)
        except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(
                f"data: {file} is cut short or no plain tar ({error}); fetch it again, or leave it out"
            ) from error
        if sample.image_name:
            yield sample

    def check(self, captions: Captions, name: str) -> Captions:
        """Return the captions of `name`, () if there are none; warn of those that are missing or left out.

        CaptionError if no image has any in the column that was asked for.
        """
        if self.bad:
            warn_once(f"{len(self.bad):,} labels or captions of {name} are left out: {self.bad[0]}")
        if any(captions):
            return counted_captions(captions, name)
        if self.caption_column is not None:
            member = ".txt" if self.caption_column == _TEXT else f"{self.caption_column!r} in its .json"
            raise CaptionError(f"captions: no picture of {name} has a caption at {member}")
        return ()

    def _add(self, sample: _TarSample, shard: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        if extension == "cls":
            sample.label = _read_label(shard, member)
        elif extension == "json":
            self._add_json(sample, shard, member)
        elif extension == _TEXT and self.caption_column in (None, _TEXT):
            with self._left_out(member):
                sample.text = as_captions(_read_text(shard, member).split("\n"), member.name)
        elif not sample.image_name and f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            sample.image_name, sample.offset, sample.size = member.name, member.offset_data, member.size

    def _add_json(self, sample: _TarSample, shard: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        with self._left_out(member):
            values = json.loads(_read_text(shard, member))
            if not isinstance(values, dict):
                return
            label = values.get("label")
            if sample.label is None and isinstance(label, int | str):
                sample.label = label
            value = next((values[key] for key in self.keys if values.get(key) is not None), None)
            sample.json_text = as_captions(value, member.name)

    @contextmanager
    def _left_out(self, member: tarfile.TarInfo) -> Iterator[None]:
        """Leave out a member that can't be read."""
        try:
            yield
        except CaptionError as error:
            self.bad.append(str(error).removeprefix("captions: "))
        except UnicodeDecodeError:
            self.bad.append(f"{member.name} is not in UTF-8")
        except json.JSONDecodeError as error:
            self.bad.append(f"{member.name} is no JSON ({error.msg})")


def _split_name(path: str) -> tuple[str, str]:
    """Split a member's path at the first dot of its name; the key of a hidden file is empty."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (f"{folder}/{stem}" if stem else ""), extension.lower()


def _read_text(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = shard.extractfile(member)
    assert file is not None  # it is a regular one
    return file.read().decode("utf-8-sig")


def _read_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> Label:
    text = _read_text(shard, member).strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def _check_end(shard: tarfile.TarFile) -> None:
    """Raise ReadError for a damaged header, which tarfile takes for the end."""
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    if any(shard.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"no header at byte {shard.offset:,}")
