"""Images in Parquet files, or in a folder of `datasets`' `save_to_disk`."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import compute, parquet

from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import Label, class_names, class_number
from mar.data.paths import SPLITS


@dataclass(frozen=True)
class Columns:
    """The columns of a table with images and labels.

    Images: the first column of the type Image of `datasets`, else image or img. Labels: the first column of type
    ClassLabel, else label, labels or cls, else "label" in a column json.
    """

    image: str
    label: str | None
    label_type: Any
    """The type of labels in `datasets`."""

    @staticmethod
    def find(features: datasets.Features, table: str) -> Columns:
        """Find the columns of a table called `table`. Raises ValueError without images."""
        image = _find_column(features, datasets.Image, ("image", "img"))
        if image is None:
            columns = ", ".join(features)
            raise ValueError(f"data: {table} has no column of pictures (an Image, or called image); it has {columns}")
        label = _find_column(features, datasets.ClassLabel, ("label", "labels", "cls"))
        label_type = features.get(label)
        if label is None and isinstance(features.get("json"), dict) and "label" in features["json"]:
            label, label_type = "json", features["json"]["label"]
        return Columns(image, label, label_type)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, if the table tells them."""
        return tuple(self.label_type.names) if isinstance(self.label_type, datasets.ClassLabel) else None

    @property
    def names(self) -> list[str]:
        """Names of the columns to read."""
        return [self.image] if self.label is None else [self.image, self.label]

    def label_of(self, row: Mapping[str, Any]) -> Label:
        """Return the label in a row."""
        value = None if self.label is None else row[self.label]
        return value.get("label") if isinstance(value, dict) else value


def _find_column(features: datasets.Features, kind: type, names: Sequence[str]) -> str | None:
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    return next(iter(typed + [name for name in names if name in features]), None)


class TableSource:
    """A `datasets.Dataset` with images, and labels if they have classes.

    `Columns` finds both. Raises ValueError without images.
    """

    flips = True

    def __init__(self, table: datasets.Dataset, name: str) -> None:
        self.name = name
        self.columns = Columns.find(table.features, name)
        if len(table) == 0:
            raise ValueError(f"data: {name} holds no pictures: it has no rows")
        # `datasets` does not decode: a broken image is an UnreadableImage here.
        undecoded = datasets.Image(decode=False)
        self.table = table.select_columns(self.columns.names).cast_column(self.columns.image, undecoded)
        self.classes = self._class_names() if self.columns.class_names is None else self.columns.class_names
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
        if self.columns.class_names is not None and isinstance(label, int):
            return label
        return class_number(label, self._numbers)

    def listing(self) -> Iterator[bytes]:
        """Yield size, file name and label of every image, by thousands."""
        for rows in self.table.with_format("arrow").iter(batch_size=1000):
            images = rows[self.columns.image]
            # Lengths of binary values follow from their offsets: the images themselves are not read.
            sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
            paths = compute.struct_field(images, "path").to_pylist()
            labels = [None] * len(sizes) if self.columns.label is None else rows[self.columns.label].to_pylist()
            names = [os.path.basename(path or "") for path in paths]
            yield json.dumps([sizes, names, labels]).encode()


def open_parquet(files: Sequence[Path], name: str) -> TableSource:
    """Open Parquet files, one after the other.

    `datasets` copies them to its cache and maps that to memory.
    """
    for file in files:
        try:
            parquet.read_schema(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data: {file} can't be read as Parquet: {error}") from error
    # Escaped: `datasets` takes names for patterns.
    table = datasets.load_dataset("parquet", data_files=[glob.escape(str(file)) for file in files], split="train")
    return TableSource(table, name)


def open_saved(folder: Path, split: str) -> TableSource:
    """Open a folder of `save_to_disk`, the given split if it has splits."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        for name in SPLITS[split]:
            if name in saved:
                return TableSource(saved[name], f"{folder}[{name}]")
        raise ValueError(f"data: {folder} has no split {split!r}; it has {', '.join(saved)}")
    return TableSource(saved, str(folder))
