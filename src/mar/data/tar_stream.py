"""Tar shards, read in passing by the rule of `webdataset`."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from mar.data.accounts import Account, StreamAccount, shown
from mar.data.captions import CaptionError
from mar.data.images import UnreadableImage
from mar.data.labels import Label, LabelError
from mar.data.remote import open_in_passing, read_errors, reason_of
from mar.data.stream import StreamSample
from mar.data.webdataset import Member, SampleReader, StrictInfo, TarSample, reason_without_picture, split_by_stem

LOOKED_AT = 16
"""Pictures at the beginning that tell if a stream has labels and captions."""


class TarShards:
    """The shards of a stream of tar files. Labels are numbers, in `.cls` or at "label" in `.json`.

    Members in a row of one name, up to its first dot, are a sample, as in `TarSource`.
    """

    def __init__(
        self,
        files: Sequence[str],
        name: str,
        classes: int = 0,
        caption_column: str | None = None,
    ) -> None:
        """Look at the first pictures.

        Raises ValueError if there are none, for labels that are names, and for labels apart from their pictures;
        CaptionError without captions in the column.

        Args:
            files: paths or URLs of the shards.
            name: of all of them, in messages.
            classes: number of classes; 0 ignores labels.
            caption_column: key of captions, as for `SampleReader`.
        """
        self.files, self.name = list(files), name
        self.names = tuple(file.rstrip("/").rpartition("/")[2] for file in self.files)
        self.caption_column, self.account = caption_column, StreamAccount(name)
        self.label_column = self._find_label_column(classes)
        count = 0 if self.label_column is None else classes
        self.classes = tuple(str(number) for number in range(count))

    def samples(self, shard: int) -> Iterator[StreamSample]:
        """Yield the images of a shard. Raises UnreadableImage for the rest if it breaks off."""
        name, number = self.names[shard], 0
        reader = SampleReader(self.caption_column, self.account, labels=bool(self.classes))
        try:
            for group in self._groups(shard, reader):
                samples = split_by_stem(group)
                if not samples:
                    member = group.members[0]
                    self.account.leave_out(reason_without_picture(member), f"{name}/{member.name}")
                for sample in samples:
                    yield self._sample(sample, group, reader, name)
                    number += 1
        except read_errors() as error:
            rest = f"{name} from its picture {number} on ({reason_of(error)})"
            raise UnreadableImage(rest, reason_of(error)) from error

    def fetch(self, sample: StreamSample) -> bytes:
        """Raise UnreadableImage: all images are in the shards."""
        raise UnreadableImage(sample.name, "it is not in its shard")

    def _groups(self, shard: int, reader: SampleReader) -> Iterator[TarSample]:
        with (
            open_in_passing(self.files[shard]) as file,
            tarfile.open(fileobj=file, mode="r|", tarinfo=StrictInfo, ignore_zeros=True) as tar,
        ):

            def read(info: tarfile.TarInfo) -> bytes:
                content = tar.extractfile(info)
                assert content is not None
                data = content.read()
                tar.members = []  # type: ignore[attr-defined]  # else they pile up
                if len(data) < info.size:
                    raise tarfile.ReadError("unexpected end of data")
                return data

            yield from reader.groups(tar, read)
            reader.check_end(tar, self.names[shard])

    def _sample(self, sample: TarSample, group: TarSample, reader: SampleReader, shard: str) -> StreamSample:
        assert sample.image is not None
        problem = ""
        try:
            reader.read(sample, shard, group.contents.__getitem__)
            number = self._number(sample.label, f"{shard}/{_label_member(sample)}")
        except LabelError as error:  # raised as the image is used: here it would end the shard
            number, problem = -1, str(error)
        name = f"{shard}/{sample.image.name}"
        return StreamSample(name, group.contents[sample.image], None, number, captions=sample.captions, problem=problem)

    def _number(self, label: Label, where: str) -> int:
        if isinstance(label, str):
            raise LabelError(
                f"data: {where} has the label {shown(repr(label), 60)}, a name, which has no number in a stream; "
                "leave stream: out"
            )
        return -1 if label is None else max(label, -1)

    def _find_label_column(self, classes: int) -> str | None:
        """Return the kind of members with labels; None: the first pictures have none. Checks these pictures."""
        reader = SampleReader(self.caption_column, Account(self.name), labels=bool(classes))
        first_samples: list[TarSample] = []
        apart: dict[str, str] = {}
        kind: str | None = None
        for shard, group in islice(self._first_groups(reader), 2 * LOOKED_AT):
            samples = split_by_stem(group)
            if not samples:
                labels = [member.name for member in group.members if member.kind in ("cls", "json")]
                if labels:
                    apart[group.key] = f"{shard}/{labels[0]}"
            for sample in samples:
                reader.read(sample, shard, group.contents.__getitem__)
                if isinstance(sample.label, str):
                    raise ValueError(
                        f"data: labels of {self.name} are names, which have no numbers in a stream "
                        f"({shown(sample.label)} in {shard}/{_label_member(sample)}); leave stream: out"
                    )
                first_samples.append(sample)
                kind = kind or _label_kind(sample, group.contents)
        unlabeled = [sample.key for sample in first_samples if sample.label is None]
        lost = next((apart[key] for key in unlabeled if key in apart), None)
        if apart and len(unlabeled) == len(first_samples):
            lost = lost or next(iter(apart.values()))
        if lost is not None and (classes or not first_samples):
            raise ValueError(
                f"data: {lost} lies apart from its picture, and a stream is read in passing: put members of one "
                "name in a row, or leave stream: out"
            )
        if not first_samples:
            raise ValueError(f"data: no pictures at the beginning of {self.name} ({len(self.files)} tar files)")
        if self.caption_column is not None and not any(sample.captions for sample in first_samples):
            raise CaptionError(
                f"captions: none of the first {len(first_samples)} pictures of {self.name} has a caption at "
                f"{self.caption_column!r}"
            )
        return kind

    def _first_groups(self, reader: SampleReader) -> Iterator[tuple[str, TarSample]]:
        """Yield groups of the first shard with pictures, and of those before it. Raises ValueError."""
        has_pictures = False
        for shard, name in enumerate(self.names):
            try:
                for group in self._groups(shard, reader):
                    has_pictures = has_pictures or bool(split_by_stem(group))
                    yield name, group
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(
                    f"data: {self.files[shard]} is cut short or no plain tar ({error}); fetch it again, or leave it out"
                ) from error
            if has_pictures:
                return


def _label_kind(sample: TarSample, contents: Mapping[Member, bytes]) -> str | None:
    """Return the kind of the member with the label; None: no label."""
    members = {member.kind: member for member in sample.members}
    if "cls" in members:
        return "cls"
    return "json" if "json" in members and b'"label"' in contents.get(members["json"], b"") else None


def _label_member(sample: TarSample) -> str:
    """Return the name of the member with the label."""
    names: dict[str, Member] = {member.kind: member for member in sample.members}
    member = names.get("cls") or names.get("json") or sample.image
    assert member is not None
    return member.name
