"""Images in WebDataset shards on the disk: tar files, indexed, not unpacked."""

from __future__ import annotations

import codecs
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mar.data.accounts import Account, log_once, shown
from mar.data.captions import CAPTION_COLUMNS, CaptionError, Captions, as_captions, counted_captions
from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import Label, LabelError, as_label, class_names, class_number, parse_label
from mar.data.paths import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, UNREAD_IMAGES, is_system_name, natural_key

MAX_TEXT_BYTES = 2**24
"""Labels and captions of one picture take less."""

_TEXT = "txt"
_READ = frozenset([_TEXT, "cls", "json"])


_HEADER_ERRORS: tuple[type[Exception], ...] = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
)
_END_MARK: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]


class Member(NamedTuple):
    """A regular file of a shard, or of no use."""

    name: str
    stem: str
    """Its path without the last extension."""
    kind: str
    """Its last extension, in lower case."""
    offset: int
    size: int


@dataclass
class TarSample:
    """Members of one key in a row: `a.jpg`, `a.cls`, `a.json`, `a.txt`."""

    key: str
    members: list[Member] = field(default_factory=list)
    contents: dict[Member, bytes] = field(default_factory=dict)
    """Bytes of pictures, labels and captions, if the shard is read in passing."""
    image: Member | None = None
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

    Members in a row of the same name, up to its first dot, belong together. Labels and captions elsewhere in the shard
    belong to the one picture of their name. The last extension tells the kind. Labels are in `.cls`, or at "label" in
    `.json`: numbers, or names of classes. Captions are in `.txt`, one a line, or in `.json` at "text", "caption" or
    "prompt". `account` counts what is left out.
    Opening reads the headers of all files, once. Raises ValueError without images, for a damaged tar file, and for a
    label that can't be read.
    """

    flips = True

    def __init__(
        self, files: Sequence[Path], name: str, caption_column: str | None = None, account: Account | None = None
    ) -> None:
        """List the images, read their labels and captions, and log the account.

        Args:
            files: the shards.
            name: of all of them, in messages.
            caption_column: key of captions in `.json`; "txt": only the `.txt` members; None: as above.
            account: of what was left out beside the shards.
        """
        self.name, self.files = name, list(files)
        stats = [os.stat(file) for file in self.files]
        self._stats = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        self.account = account or Account(name)
        reader = SampleReader(caption_column, self.account)
        samples = [(number, sample) for number, file in enumerate(self.files) for sample in reader.samples(file)]
        if not samples:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"data: no pictures in {name} ({len(self.files)} tar files): looked for {suffixes}")
        self.classes = class_names((sample.label for _, sample in samples), name)
        numbers = {label: number for number, label in enumerate(self.classes)}
        # Arrays, not lists: nothing counts references to their elements, so workers share their memory.
        self.labels = np.array([class_number(sample.label, numbers) for _, sample in samples])
        images = [(number, sample.image) for number, sample in samples if sample.image is not None]
        # Of each image: number of its file, offset, size.
        self._index = np.array([(number, image.offset, image.size) for number, image in images], dtype=np.int64)
        self._names = np.array([os.fsencode(image.name) for _, image in images])
        if not self.classes:
            _warn_of_folders([image.name for _, image in images], name)
        self.captions = reader.check(tuple(sample.captions for _, sample in samples), name)
        self.account.take(self.labels, self.classes)
        self.account.log()

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


class StrictInfo(tarfile.TarInfo):
    """A header. A damaged one is an error, where `tarfile` ends as if nothing more were there.

    With `ignore_zeros`, what follows an end mark is read too: files may have been put together.
    """

    @classmethod
    def fromtarfile(cls, shard: tarfile.TarFile) -> Any:
        try:
            info = super().fromtarfile(shard)
        except _HEADER_ERRORS as error:
            raise tarfile.ReadError(f"no header at byte {shard.offset:,}") from error
        except _END_MARK:
            shard.ended = True  # type: ignore[attr-defined]
            raise
        shard.ended = False  # type: ignore[attr-defined]
        return info


class SampleReader:
    """Reads the samples of shards.

    Args:
        caption_column: key of captions in `.json`; "txt": only the `.txt` members; None: both, by the usual names.
        account: counts the members that are left out.
        labels: read labels too.
    """

    def __init__(self, caption_column: str | None, account: Account, labels: bool = True) -> None:
        self.caption_column, self.account, self.labels = caption_column, account, labels
        self.keys = CAPTION_COLUMNS if caption_column is None else (caption_column,)

    def samples(self, file: Path) -> list[TarSample]:
        """Return the samples of a shard that have an image."""
        try:
            with tarfile.open(file, "r:", tarinfo=StrictInfo, ignore_zeros=True) as shard:
                groups = list(self.groups(shard))
                self.check_end(shard, file.name)
        except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(
                f"data: {file} is cut short or no plain tar ({error}); fetch it again, or leave it out"
            ) from error
        samples = self._choose_images(groups)
        if not samples:
            self.account.leave_out("shards without pictures", file.name)
        with file.open("rb") as opened:

            def read(member: Member) -> bytes:
                opened.seek(member.offset)
                return opened.read(member.size)

            for sample in samples:
                self.read(sample, str(file), read)
        return samples

    def check(self, captions: Captions, name: str) -> Captions:
        """Return the captions of `name`, () if there are none; warn of those that are missing.

        CaptionError if no image has any in the column that was asked for.
        """
        if any(captions):
            return counted_captions(captions, name)
        if self.caption_column is not None:
            member = ".txt" if self.caption_column == _TEXT else f"{self.caption_column!r} in its .json"
            raise CaptionError(f"captions: no picture of {name} has a caption at {member}")
        return ()

    def groups(
        self, shard: tarfile.TarFile, read: Callable[[tarfile.TarInfo], bytes] | None = None
    ) -> Iterator[TarSample]:
        """Yield the members of a shard by keys in a row.

        Args:
            shard: the open tar file.
            read: reads a member, for shards that are read in passing; None: members are read later.
        """
        group: TarSample | None = None
        for info in shard:
            key = _sample_key(info.name)
            if info.isdir():
                continue
            if key is None:
                self.account.leave_out("hidden or system files", info.name)
            elif not info.isreg() or info.issparse():
                self.account.leave_out("links and special files", info.name)
            else:
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = TarSample(key)
                stem, kind = os.path.splitext(_plain_path(info.name))
                member = Member(info.name, stem, kind[1:].lower(), info.offset_data, info.size)
                group.members.append(member)
                if read is not None and (_is_image(member) or (member.kind in _READ and info.size <= MAX_TEXT_BYTES)):
                    group.contents[member] = read(info)
        if group is not None:
            yield group

    def check_end(self, shard: tarfile.TarFile, name: str) -> None:
        """Count a shard without an end mark."""
        if not getattr(shard, "ended", False):
            self.account.leave_out("shards without an end mark, maybe cut short", name)

    def _choose_images(self, groups: list[TarSample]) -> list[TarSample]:
        """Return the groups with an image, and give them the labels and captions that lie elsewhere."""
        samples: list[TarSample] = []
        for group in groups:
            samples += split_by_stem(group)
        by_key: dict[str, list[TarSample]] = {}
        for sample in samples:
            by_key.setdefault(sample.key, []).append(sample)
        for group in groups:
            if not any(_is_image(member) for member in group.members):
                owners = by_key.get(group.key, [])
                for member in group.members:
                    own = [each for each in owners if each.image and each.image.stem == member.stem]
                    owner = own or owners
                    if len(owner) == 1:
                        owner[0].members.append(member)
                    elif owner:
                        self.account.leave_out("members that may belong to several pictures", member.name)
                    else:
                        self.account.leave_out(reason_without_picture(member), member.name)
        return samples

    def read(self, sample: TarSample, file: str, read: Callable[[Member], bytes]) -> None:
        """Read label and captions of a sample; count members left out.

        Args:
            sample: a group with a picture.
            file: the shard, for messages.
            read: returns the bytes of a member.
        """
        assert sample.image is not None
        captions = self.caption_column in (None, _TEXT)
        used = {
            "cls": _best(sample, "cls"),
            "json": _best(sample, "json"),
            _TEXT: _best(sample, _TEXT) if captions else None,
        }
        for member in sample.members:
            if member is sample.image or member is used.get(member.kind):
                continue
            reason = "further pictures of a sample" if _is_image(member) else "members of other kinds"
            reason = "further labels or captions of a sample" if used.get(member.kind) else reason
            self.account.leave_out(reason, member.name)
        if (label := used["cls"]) is not None and self.labels:
            sample.label = parse_label(_read_small(label, file, read), f"{file}/{label.name}")
        if (values := used["json"]) is not None:
            with self._left_out(values):
                if not self._read_json(sample, _read_small(values, file, read), f"{file}/{values.name}"):
                    self.account.leave_out(".json without a label or captions", values.name)
        if (text := used[_TEXT]) is not None:
            with self._left_out(text):
                lines = _read_small(text, file, read).decode("utf-8-sig").split("\n")
                sample.text = as_captions(lines, text.name)

    def _read_json(self, sample: TarSample, data: bytes, where: str) -> bool:
        """Read label and captions; False if there are no keys for them."""
        values = json.loads(data.decode("utf-8-sig") if data.startswith(codecs.BOM_UTF8) else data)
        if not isinstance(values, dict):
            return False
        label = values.get("label") if self.labels else None
        if sample.label is None:
            sample.label = as_label(label, where)
        elif isinstance(label, int | float) and isinstance(sample.label, int) and label != sample.label:
            self.account.leave_out("labels in .json that differ from .cls", os.path.basename(where))
        value = next((values[key] for key in self.keys if values.get(key) is not None), None)
        sample.json_text = as_captions(value, os.path.basename(where))
        return "label" in values or any(key in values for key in self.keys)

    @contextmanager
    def _left_out(self, member: Member) -> Iterator[None]:
        """Leave out a member that can't be read."""
        try:
            yield
        except LabelError:
            raise
        except CaptionError as error:
            why = str(error).removeprefix("captions: ")
        except UnicodeDecodeError:
            why = f"{member.name} is not in UTF-8"
        except (ValueError, RecursionError) as error:
            why = f"{member.name} is no JSON ({getattr(error, 'msg', error)})"
        else:
            return
        self.account.leave_out("labels or captions that can't be read", why)


def _warn_of_folders(names: list[str], shards: str) -> None:
    """Warn of folders in shards without labels: they are no classes."""
    folders = sorted({_plain_path(name).rpartition("/")[0] for name in names} - {""}, key=natural_key)
    if len(folders) > 1:
        log_once(
            logging.WARNING,
            f"data: pictures of {shown(shards, 200)} lie in {len(folders):,} folders, such as {shown(folders[0])}, but "
            "have no labels: in shards, folders are no classes; unpack them into a folder, or add .cls members",
        )


def reason_without_picture(member: Member) -> str:
    """Return the reason to leave out a member without a picture."""
    return UNREAD_IMAGES if f".{member.kind}" in UNREAD_IMAGE_SUFFIXES else "members without a picture"


def _is_image(member: Member) -> bool:
    return f".{member.kind}" in IMAGE_SUFFIXES


def split_by_stem(group: TarSample) -> list[TarSample]:
    """Return the samples of a group: one, or one for each image where every image has a member of its own stem."""
    images = [member for member in group.members if _is_image(member)]
    stems = Counter(member.stem for member in group.members if member.kind in _READ)
    if len({image.stem for image in images}) == len(images) > 1 and all(stems[image.stem] for image in images):
        members = {image.stem: [image] for image in images}
        for member in group.members:
            if member.stem == group.key and member.kind in _READ:  # of all of them
                for of_image in members.values():
                    of_image.append(member)
            elif not _is_image(member):
                members.get(member.stem, members[images[0].stem]).append(member)
        return [TarSample(group.key, members[image.stem], image=image) for image in images]
    if images:
        group.image = images[0]
        return [group]
    return []


def _best(sample: TarSample, kind: str) -> Member | None:
    """Return the member of a kind: of the picture's stem, else of the key itself, else the last one."""
    assert sample.image is not None
    members = [member for member in sample.members if member.kind == kind]
    stems = (sample.image.stem, sample.key)
    return next((member for stem in stems for member in reversed(members) if member.stem == stem), None) or next(
        iter(members[::-1]), None
    )


def _read_small(member: Member, file: str, read: Callable[[Member], bytes]) -> bytes:
    """Return the bytes of a member. LabelError for a large one: labels and captions are small."""
    if member.size > MAX_TEXT_BYTES:
        raise LabelError(
            f"data: {file}/{member.name} has {member.size:,} bytes, expected a label or captions of at most "
            f"{MAX_TEXT_BYTES:,}; leave it out of the shard"
        )
    return read(member)


def _sample_key(path: str) -> str | None:
    """Return a member's path up to the first dot of its name; None for hidden and system files."""
    *folders, name = _plain_path(path).split("/")
    stem = name.partition(".")[0]
    if not stem or any(is_system_name(folder) for folder in folders):
        return None
    return "/".join([*folders, stem])


def _plain_path(path: str) -> str:
    """Return a member's path without "./" and doubled slashes."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))
