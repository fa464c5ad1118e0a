"""Data sets of the Hugging Face Hub, and streams of shards.

`datasets` downloads and reads both, streams also from the web and from the disk.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import xopen

from mar.checkpoint.files import check_regular
from mar.data.accounts import Account, StreamAccount
from mar.data.images import UnreadableImage
from mar.data.labels import LabelError
from mar.data.parquet import TEXT_TYPES, Columns, TableSource
from mar.data.paths import (
    SPLITS,
    NoSplit,
    common_suffix,
    expand_braces,
    expand_pattern,
    find_shard_suffix,
    find_split_files,
    hub_name,
    is_pattern,
)
from mar.data.remote import read_errors, reason_of
from mar.data.stream import StreamSample, StreamSource
from mar.data.tar_stream import TarShards
from mar.data.walk import FolderWalk

_BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}

Result = TypeVar("Result")


def open_hub(name: str, config: str | None, split: str, caption_column: str | None = None) -> TableSource:
    """Download a split of a Hub data set, and open it.

    Raises ValueError if there is none, or no network.

    Args:
        name: of the data set.
        config: its configuration, if it has several.
        split: train or test.
        caption_column: column of captions, as for `Columns.find`.
    """
    full_name = name if config is None else f"{name}@{config}"

    def load() -> datasets.Dataset:
        hub_split = _choose_split(list(datasets.get_dataset_split_names(name, config)), split, full_name)
        return datasets.load_dataset(name, config, split=hub_split)

    return TableSource(_load_or_explain(load, full_name, hub=True), full_name, caption_column)


def open_stream(spec: str, classes: int = 0, caption_column: str | None = None) -> StreamSource:
    """Open the train split that `spec`, which begins with stream:, names:

    - a data set of the Hub, OWNER/NAME or hub:OWNER/NAME, with @CONFIG if it has several;
    - .tar or .parquet files: one, a folder of them, or a pattern, on the disk or by URL (https://, hf://, s3://).

    Labels are checked against `classes`, the number of classes, if the data does not tell them. Captions are in a
    column as for `Columns.find`. Raises ValueError if nothing is there, or no images are.
    """
    name = spec.removeprefix("stream:")
    hub = None if "://" in name else hub_name(name)

    def load() -> DatasetShards | TarShards:
        if hub is not None:
            builder = datasets.load_dataset_builder(*hub)
        else:
            files = _find_files(name)
            builder = datasets.load_dataset_builder(_BUILDERS[common_suffix(files, name)], data_files={"train": files})
        files_by_split = {str(split): files for split, files in (builder.config.data_files or {}).items()}
        split = _choose_split([*files_by_split] or [*(builder.info.splits or ())], "train", spec)
        files = [str(file) for file in files_by_split.get(split, ())]
        if isinstance(builder, WebDataset) and all(file.lower().endswith(".tar") for file in files):
            return TarShards(files, spec, classes, caption_column)
        return DatasetShards(builder.as_streaming_dataset(split=split), spec, files, classes, caption_column)

    shards = _load_or_explain(load, spec, hub=hub is not None)
    count = len(shards.classes)
    labels = f"labels of {count:,} classes, in {shards.label_column}" if count else "labels are not used"
    shards.account.text = f"{len(shards.names):,} shards, read in passing: pictures are not counted; {labels}"
    shards.account.log()
    return StreamSource(shards, spec, shards.account)


class DatasetShards:
    """The shards of a `datasets.IterableDataset`."""

    def __init__(
        self,
        table: datasets.IterableDataset,
        name: str,
        files: Sequence[str],
        classes: int,
        caption_column: str | None = None,
    ) -> None:
        """Find the columns. Raises ValueError without images, and for labels that are names.

        Args:
            table: the data, read in passing.
            name: its name in messages.
            files: its files; shards are called like them if each is one.
            classes: number of classes if the data does not tell it; 0 ignores labels.
            caption_column: column of captions, as for `Columns.find`.
        """
        if table.features is None:
            raise ValueError(f"data: {name} does not tell its columns, so that it can't be streamed")
        self.columns = Columns.find(table.features, name, caption_column)
        self.label_column = self.columns.label
        self.account = StreamAccount(name)
        others = [column for column in table.features if column not in self.columns.names]
        self.account.leave_out("other columns", others[0] if others else "", len(others))
        undecoded = datasets.Image(decode=False)
        self.table = table.select_columns(self.columns.names).cast_column(self.columns.image, undecoded)
        one_each = len(files) == table.num_shards
        self.names = tuple(
            Path(files[number]).name if one_each else f"{name}/{number}" for number in range(table.num_shards)
        )
        if classes and getattr(self.columns.label_type, "dtype", None) in TEXT_TYPES:
            raise ValueError(f"data: labels of {name} are names, which have no numbers in a stream; leave stream: out")
        count = 0 if self.columns.label is None else classes
        self.classes = self.columns.class_names or tuple(str(number) for number in range(count))

    def samples(self, shard: int) -> Iterator[StreamSample]:
        """Yield the images of a shard. Raises UnreadableImage for the rest if it breaks off."""
        number = 0
        try:
            # By batches: iterated in a worker, `datasets` would share the one shard out again. Of one row: a larger
            # batch would be lost whole if the shard breaks off in it.
            for batch in self.table.shard(len(self.names), shard).iter(1):
                row = {column: values[0] for column, values in batch.items()}
                yield self._sample(f"{self.names[shard]}#{number}", row)
                number += 1
        except read_errors() as error:
            if not number and "BatchSize must be greater than 0" in str(error):  # a Parquet file without rows
                self.account.leave_out("files without rows", self.names[shard])
                return
            rest = f"{self.names[shard]} from its picture {number} on ({reason_of(error)})"
            raise UnreadableImage(rest, reason_of(error)) from error

    def _sample(self, name: str, row: Mapping[str, Any]) -> StreamSample:
        cell = row[self.columns.image] or {}
        number, problem = -1, ""
        try:
            label = self.columns.label_of(row, name) if self.classes else None
            if isinstance(label, str) and label:
                raise LabelError(
                    f"data: {name} has the label {label!r}, a name, which has no number in a stream; leave stream: out"
                )
            number = -1 if not isinstance(label, int) else max(label, -1)
        except LabelError as error:  # raised as the image is used: here it would end the shard
            problem = str(error)
        captions = self.columns.captions_of(row)
        return StreamSample(name, cell.get("bytes"), cell.get("path"), number, captions=captions, problem=problem)

    def fetch(self, sample: StreamSample) -> bytes:
        """Read the file at the path of a sample. Raises UnreadableImage."""
        try:
            with xopen(sample.path, "rb") as file:
                data: bytes = file.read()
        except read_errors() as error:
            raise UnreadableImage(sample.name, reason_of(error)) from error
        return data


def _choose_split(existing: Sequence[str], split: str, name: str) -> str:
    hub_split = next((name for name in SPLITS[split] if name in existing), None)
    if hub_split is None:
        raise NoSplit(f"data: {name} has no split {split!r}; it has {', '.join(existing)}")
    return hub_split


def _find_files(name: str) -> list[str]:
    """Return the files of shards as patterns for `datasets`; only stars of URLs are left to expand."""
    if "://" in name:
        return expand_braces(name)
    path = Path(name).expanduser()
    check_regular(path)
    if path.is_dir():
        suffix = find_shard_suffix(path)
        names = [] if suffix is None else FolderWalk(path, Account(name)).walk()
        files = [] if suffix is None else find_split_files(path, names, suffix, "train")
    elif path.is_file():
        files = [path]
    else:
        files = expand_pattern(name) if is_pattern(name) else []
    if not files:
        state = "has no .tar or .parquet files" if path.exists() else "does not exist"
        raise ValueError(f"data: {path} {state}; a stream is of these, by path or URL, or of OWNER/NAME on the Hub")
    return [glob.escape(str(file.absolute())) for file in files]


def _load_or_explain(load: Callable[[], Result], name: str, hub: bool) -> Result:
    """Return the result of `load`. Raises its errors as a ValueError of one line."""
    try:
        return load()
    except read_errors() as error:
        if str(error).startswith(("data: ", "captions: ")):
            raise
        if "aiohttp" in str(error):
            raise ValueError(
                f'data: {name} is streamed over HTTP, which needs aiohttp: pip install ".[http]" in the clone of mar'
            ) from error
        where = " on the Hub, and is no path here" if hub else ""
        raise ValueError(f"data: {name} can't be opened{where}: {reason_of(error)}") from error
