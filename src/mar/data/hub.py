"""Data sets of the Hugging Face Hub, and streams of shards there, on the web and on the disk: all by `datasets`."""

from __future__ import annotations

import glob
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow
from datasets.exceptions import DatasetsError
from datasets.utils.file_utils import xopen

from mar.data.folder import SPLITS, expand, hub_name, is_pattern, kind_of, matching, shards_kind, split_files
from mar.data.images import UnreadableImage
from mar.data.parquet import Columns, TableSource
from mar.data.stream import StreamSample, StreamSource

_FAULTS = (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, ImportError, DatasetsError,
           tarfile.TarError, pyarrow.ArrowException)  # fmt: skip
"""What reading what others wrote may raise."""
_NETWORK_FAULTS = {"httpx2": "HTTPError", "httpx": "HTTPError", "aiohttp": "ClientError"}
"""And what networks add, by the library that is at work, which depends on versions and the kind of URL."""
_BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}

Result = TypeVar("Result")


def open_hub(name: str, config: str | None, split: str) -> TableSource:
    """A split of a data set on the Hub, downloaded into `datasets`' cache. ValueError where there is none, or no
    network."""
    shown = name if config is None else f"{name}@{config}"

    def load() -> datasets.Dataset:
        found = _split(list(datasets.get_dataset_split_names(name, config)), split, shown)
        return datasets.load_dataset(name, config, split=found)

    return TableSource(_tried(load, shown, hub=True), shown)


def _split(there: Sequence[str], wanted: str, name: str) -> str:
    found = next((split for split in SPLITS[wanted] if split in there), None)
    if found is None:
        raise ValueError(f"data: {name} has no split {wanted!r}; it has {', '.join(there)}")
    return found


def _tried(load: Callable[[], Result], name: str, hub: bool) -> Result:
    """What `load` returns; what goes wrong there is a ValueError of one line."""
    try:
        return load()
    except _faults() as error:
        if str(error).startswith("data: "):
            raise
        where = " on the Hub, and is no path here" if hub else ""
        raise ValueError(f"data: {name} can't be opened{where}: {_reason(error)}") from error


def _faults() -> tuple[type[Exception], ...]:
    found = ((sys.modules.get(library), name) for library, name in _NETWORK_FAULTS.items())
    return (*_FAULTS, *(getattr(library, name) for library, name in found if library is not None))


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class DatasetShards:
    """The shards of a `datasets.IterableDataset`, of the files `files` if each of them is one.

    `classes`: how many there are, where the data does not tell; labels are not looked at where that is 0.
    """

    def __init__(self, table: datasets.IterableDataset, name: str, files: Sequence[str], classes: int) -> None:
        if table.features is None:
            raise ValueError(f"data: {name} does not tell its columns, so that it can't be streamed")
        self.columns = Columns.of(table.features, name)
        undecoded = datasets.Image(decode=False)
        self.table = table.select_columns(self.columns.kept).cast_column(self.columns.image, undecoded)
        told = len(files) == table.num_shards
        self.names = tuple(
            Path(files[number]).name if told else f"{name}/{number}" for number in range(table.num_shards)
        )
        if classes and getattr(self.columns.kind, "dtype", None) in ("string", "large_string"):
            raise ValueError(f"data: labels of {name} are names, which have no numbers in a stream; leave stream: out")
        count = 0 if self.columns.label is None else classes
        self.classes = self.columns.names or tuple(str(number) for number in range(count))

    def rows(self, shard: int) -> Iterator[StreamSample]:
        """The pictures of a shard, from its first. UnreadableImage, for the rest of them, where it breaks off."""
        number = 0
        try:
            # By batches: iterated in a worker, `datasets` would share the one shard out again. Of one row: of a larger
            # one nothing would be left where the shard breaks off in it.
            for batch in self.table.shard(len(self.names), shard).iter(1):
                row = {column: values[0] for column, values in batch.items()}
                yield self._row(f"{self.names[shard]}#{number}", row)
                number += 1
        except _faults() as error:
            rest = f"{self.names[shard]} from its picture {number} on ({_reason(error)})"
            raise UnreadableImage(rest, _reason(error)) from error

    def _row(self, name: str, row: Mapping[str, Any]) -> StreamSample:
        cell = row[self.columns.image] or {}
        label = self.columns.label_of(row)
        number = label if isinstance(label, int) and label >= 0 and self.classes else -1
        return StreamSample(name, cell.get("bytes"), cell.get("path"), number)

    def fetch(self, row: StreamSample) -> bytes:
        """The file of a row that only says where it is. UnreadableImage where it can't be read."""
        try:
            with xopen(row.path, "rb") as file:
                data: bytes = file.read()
        except _faults() as error:
            raise UnreadableImage(row.name, _reason(error)) from error
        return data


def open_stream(spec: str, classes: int = 0) -> StreamSource:
    """The train split of what `spec`, which begins with stream:, asks for, to be read in passing:

    - a data set of the Hub, OWNER/NAME or hub:OWNER/NAME, with @CONFIG where it has several;
    - .tar or .parquet files: one, a folder of them, or a pattern, on the disk or by URL (https://, hf://, s3://).

    `classes` is what labels are held against where the data does not tell its classes. Raises ValueError where nothing
    is there, or no pictures are.
    """
    what = spec.removeprefix("stream:")
    hub = None if "://" in what else hub_name(what)

    def build() -> tuple[datasets.IterableDataset, list[str]]:
        if hub is not None:
            builder = datasets.load_dataset_builder(*hub)
        else:
            files = _files(what)
            builder = datasets.load_dataset_builder(_BUILDERS[kind_of(files, what)], data_files={"train": files})
        parts = {str(split): files for split, files in (builder.config.data_files or {}).items()}
        split = _split([*parts] or [*(builder.info.splits or ())], "train", spec)
        return builder.as_streaming_dataset(split=split), [str(file) for file in parts.get(split, ())]

    table, files = _tried(build, spec, hub=hub is not None)
    return StreamSource(DatasetShards(table, spec, files, classes), spec)


def _files(what: str) -> list[str]:
    """Files of shards, by patterns in which `datasets` finds nothing more to expand but stars of URLs."""
    if "://" in what:
        return expand(what)
    path = Path(what).expanduser()
    if path.is_dir():
        kind = shards_kind(path)
        found = [] if kind is None else split_files(path, kind, "train")
    elif path.is_file():
        found = [path]
    else:
        found = matching(what) if is_pattern(what) else []
    if not found:
        state = "has no .tar or .parquet files" if path.exists() else "does not exist"
        raise ValueError(f"data: {path} {state}; a stream is of these, by path or URL, or of OWNER/NAME on the Hub")
    return [glob.escape(str(file.absolute())) for file in found]
