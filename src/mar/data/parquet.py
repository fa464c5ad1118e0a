"""Pictures in tables: Parquet files, or a folder written by `datasets`' `save_to_disk`."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from mar.data.folder import SPLITS
from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import Label, class_names, class_number


@dataclass(frozen=True)
class Columns:
    """Where a table keeps pictures, and their labels where it has some.

    Pictures are in the first column of `datasets`' type Image, else in the one called image or img. Labels are the
    first column of type ClassLabel, else the one called label, labels or cls, else what a column json calls "label".
    """

    image: str
    label: str | None
    kind: Any
    """What `datasets` says of labels."""

    @staticmethod
    def of(features: datasets.Features, table: str) -> Columns:
        """Those of a table called `table`. ValueError where it has no pictures."""
        image = _find(features, datasets.Image, ("image", "img"))
        if image is None:
            there = ", ".join(features)
            raise ValueError(f"data: {table} has no column of pictures (an Image, or called image); it has {there}")
        label = _find(features, datasets.ClassLabel, ("label", "labels", "cls"))
        kind = features.get(label)
        if label is None and isinstance(features.get("json"), dict) and "label" in features["json"]:
            label, kind = "json", features["json"]["label"]
        return Columns(image, label, kind)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the classes, where the table tells them."""
        return tuple(self.kind.names) if isinstance(self.kind, datasets.ClassLabel) else None

    @property
    def kept(self) -> list[str]:
        """The columns that are read."""
        return [self.image] if self.label is None else [self.image, self.label]

    def label_of(self, row: Mapping[str, Any]) -> Label:
        """What a row says of its picture's class."""
        value = None if self.label is None else row[self.label]
        return value.get("label") if isinstance(value, dict) else value


def _find(features: datasets.Features, kind: type, names: Sequence[str]) -> str | None:
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    return next(iter(typed + [name for name in names if name in features]), None)


class TableSource:
    """A `datasets.Dataset` with pictures, and labels where they have classes (`Columns` tells where they are).

    Raises ValueError without pictures.
    """

    flips = True

    def __init__(self, table: datasets.Dataset, name: str) -> None:
        self.name = name
        self.columns = Columns.of(table.features, name)
        if len(table) == 0:
            raise ValueError(f"data: {name} holds no pictures: it has no rows")
        # Not decoded by `datasets`, so that a broken picture is an UnreadableImage here.
        undecoded = datasets.Image(decode=False)
        self.table = table.select_columns(self.columns.kept).cast_column(self.columns.image, undecoded)
        self.classes = self._class_names() if self.columns.names is None else self.columns.names
        self._numbers = {label: number for number, label in enumerate(self.classes)}

    def _class_names(self) -> tuple[str, ...]:
        if self.columns.label is None:
            return ()
        if isinstance(self.table.features[self.columns.label], dict):
            return class_names(map(self.columns.label_of, self.table.select_columns([self.columns.label])))
        return class_names(self.table.unique(self.columns.label))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        row: dict[str, Any] = self.table[index]
        cell = row[self.columns.image] or {}
        name = f"{self.name}#{index}"
        if cell.get("bytes") is not None:
            file: Path | BytesIO = BytesIO(cell["bytes"])
        elif cell.get("path"):
            file = Path(cell["path"])
        else:
            raise UnreadableImage(name, "the cell is empty")
        return Example(decode_image(file, name), self._number(self.columns.label_of(row)), name)

    def _number(self, label: Label) -> int:
        if self.columns.names is not None and isinstance(label, int):
            return label
        return class_number(label, self._numbers)


def open_parquet(files: Sequence[Path], name: str) -> TableSource:
    """The rows of Parquet files, one after the other, from a copy in `datasets`' cache that is mapped to memory."""
    for file in files:
        try:
            parquet.read_schema(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data: {file} can't be read as Parquet: {error}") from error
    # Escaped, since `datasets` takes names for patterns.
    table = datasets.load_dataset("parquet", data_files=[glob.escape(str(file)) for file in files], split="train")
    return TableSource(table, name)


def open_saved(folder: Path, split: str) -> TableSource:
    """A folder written by `save_to_disk`: the given split of it where it has splits."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        for name in SPLITS[split]:
            if name in saved:
                return TableSource(saved[name], f"{folder}[{name}]")
        raise ValueError(f"data: {folder} has no split {split!r}; it has {', '.join(saved)}")
    return TableSource(saved, str(folder))
