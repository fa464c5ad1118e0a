"""Pictures in tables: Parquet files, or a folder written by `datasets`' `save_to_disk`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from mar.data.examples import Example, UnreadableImage, decode_image
from mar.data.folder import natural_key

_SPLITS = {"train": ("train",), "test": ("test", "validation", "val", "valid")}


class TableSource:
    """A `datasets.Dataset` with a column of pictures and, where they have classes, one of labels.

    The column of pictures is the first of `datasets`' type Image, else the one called image or img; labels are the
    first column of type ClassLabel, else the one called label, of numbers or of names. Raises ValueError without
    pictures.
    """

    flips = True

    def __init__(self, table: datasets.Dataset, name: str) -> None:
        self.name = name
        image_column = _find(table, datasets.Image, ("image", "img"))
        if image_column is None:
            columns = ", ".join(table.column_names)
            raise ValueError(f"data: {name} has no column of pictures (an Image, or called image); it has {columns}")
        if len(table) == 0:
            raise ValueError(f"data: {name} holds no pictures: it has no rows")
        self.label_column = _find(table, datasets.ClassLabel, ("label", "labels"))
        self.image_column = image_column
        kept = [image_column] + ([] if self.label_column is None else [self.label_column])
        # Not decoded by `datasets`, so that a broken picture is an UnreadableImage here.
        self.table = table.select_columns(kept).cast_column(image_column, datasets.Image(decode=False))
        self.classes = self._class_names()
        self._numbers = {label: number for number, label in enumerate(self.classes)}

    def _class_names(self) -> tuple[str, ...]:
        if self.label_column is None:
            return ()
        feature = self.table.features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        values = {value for value in self.table.unique(self.label_column) if value is not None}
        if all(isinstance(value, int) for value in values):
            return tuple(str(number) for number in range(max(values, default=-1) + 1))
        return tuple(sorted(map(str, values), key=natural_key))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        row: dict[str, Any] = self.table[index]
        cell = row[self.image_column] or {}
        name = f"{self.name}#{index}"
        if cell.get("bytes") is not None:
            file: Path | BytesIO = BytesIO(cell["bytes"])
        elif cell.get("path"):
            file = Path(cell["path"])
        else:
            raise UnreadableImage(name, "the cell is empty")
        return Example(decode_image(file, name), self._label(row), name)

    def _label(self, row: dict[str, Any]) -> int:
        value = None if self.label_column is None else row[self.label_column]
        if value is None:
            return -1
        return int(value) if isinstance(value, int) else self._numbers[str(value)]


def _find(table: datasets.Dataset, kind: type, names: Sequence[str]) -> str | None:
    typed = [column for column, feature in table.features.items() if isinstance(feature, kind)]
    named = [name for name in names if name in table.column_names]
    return next(iter(typed + named), None)


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The Parquet files in `folder` for a split, told by the words of their paths; train has them all where none tells.

    Empty where `folder` holds no Parquet files; ValueError where it holds some, but not for this split.
    """
    files = sorted(folder.rglob("*.parquet"), key=lambda file: natural_key(str(file)))
    words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    wanted = [file for file in files if words[file].intersection(_SPLITS.get(split, (split,)))]
    if wanted or not files:
        return wanted
    told = any(words[file].intersection(names) for file in files for names in _SPLITS.values())
    if told or split != "train":
        shown = ", ".join(file.name for file in files[:3])
        raise ValueError(f"data: no Parquet file in {folder} has {split!r} in its name; there is {shown}")
    return files


def open_parquet(files: Sequence[Path], name: str) -> TableSource:
    """The rows of Parquet files, one after the other, from a copy in `datasets`' cache that is mapped to memory."""
    for file in files:
        try:
            parquet.read_schema(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data: {file} can't be read as Parquet: {error}") from error
    table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    return TableSource(table, name)


def is_saved(folder: Path) -> bool:
    """Whether `folder` was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path, split: str) -> TableSource:
    """A folder written by `save_to_disk`: the given split of it where it has splits."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        for name in _SPLITS.get(split, (split,)):
            if name in saved:
                return TableSource(saved[name], f"{folder}[{name}]")
        raise ValueError(f"data: {folder} has no split {split!r}; it has {', '.join(saved)}")
    return TableSource(saved, str(folder))
