"""Images in Parquet files, or in a folder of `datasets`' `save_to_disk`."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets.exceptions import DatasetsError
from pyarrow import compute, parquet

from mar.data.accounts import OTHER_PARTS, Account, shown
from mar.data.captions import CAPTION_COLUMNS, CaptionError, Captions, as_captions, counted_captions
from mar.data.images import Example, UnreadableImage, decode_image
from mar.data.labels import Label, as_label, check_label, check_twins, class_names, class_number
from mar.data.paths import SPLITS, NoSplit

# It logs an error before raising it, which is then said twice.
logging.getLogger("datasets.packaged_modules.parquet.parquet").setLevel(logging.CRITICAL)

TEXT_TYPES = ("string", "large_string", "string_view")
"""Types of text columns."""
_BINARIES = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True)
class Columns:
    """The columns of a table with images, labels and captions.

    Images: the first column of the type Image of `datasets`, else image or img. Labels: the first column of type
    ClassLabel, else label, labels or cls, else "label" in a column json. Captions: the first column of text or of lists
    of texts called text, caption or prompt, else txt, else the first so called in a column json.
    """

    image: str
    label: str | None
    label_type: Any
    """The type of labels in `datasets`."""
    caption: str | None = None
    caption_key: str | None = None
    """Key of captions in the column json; None: they are the column."""

    @staticmethod
    def find(features: datasets.Features, table: str, caption_column: str | None = None) -> Columns:
        """Find the columns of a table. ValueError without images, CaptionError without the named captions.

        Args:
            features: types of the columns in `datasets`.
            table: its name in messages.
            caption_column: column of captions, or key in a column json; None: chosen by name and type.
        """
        image = _find_column(features, datasets.Image, ("image", "img"))
        if image is None:
            columns = ", ".join(features)
            raise ValueError(f"data: {table} has no column of pictures (an Image, or called image); it has {columns}")
        if not _can_be_image(features[image]):
            raise ValueError(
                f"data: the column {image} of {table} is of the type {_type_name(features[image])}, expected a picture "
                "a row"
            )
        # Streamed shards have columns such as v1.png and v1.cls, for names with dots.
        before = image[: image.rfind(".") + 1]
        names = ("label", "labels", "cls", *([f"{before}cls"] if before else []))
        label = _find_column(features, datasets.ClassLabel, names)
        label_type = features.get(label)
        objects = [name for name in dict.fromkeys(("json", f"{before}json")) if isinstance(features.get(name), dict)]
        for name in objects:
            if label is None and "label" in features[name]:
                label, label_type = name, features[name]["label"]
        if label is not None and not _can_be_label(label_type):
            raise ValueError(
                f"data: the column {label} of {table} holds labels of the type {_type_name(label_type)}, expected "
                "whole numbers or text; change or rename that column"
            )
        return Columns(image, label, label_type, *_find_captions(features, table, caption_column))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, if the table tells them."""
        return tuple(self.label_type.names) if isinstance(self.label_type, datasets.ClassLabel) else None

    @property
    def names(self) -> list[str]:
        """Names of the columns to read."""
        return list(dict.fromkeys(name for name in (self.image, self.label, self.caption) if name is not None))

    def label_of(self, row: Mapping[str, Any], where: str) -> Label:
        """Return the label in a row. Raises LabelError."""
        value = None if self.label is None else row[self.label]
        return as_label(value.get("label") if isinstance(value, dict) else value, where)

    def captions_of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the captions in a row."""
        value = None if self.caption is None else row[self.caption]
        if self.caption_key is not None:
            value = (value or {}).get(self.caption_key)
        elif self.caption == "txt" and isinstance(value, str):  # a file of shards, with a caption a line
            value = value.split("\n")
        return as_captions(value, f"the column {self.caption}")


def _find_column(features: datasets.Features, kind: type, names: Sequence[str]) -> str | None:
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    return next(iter(typed + [name for name in names if name in features]), None)


def _can_be_image(feature: Any) -> bool:
    """Tell if `datasets` can take a column for pictures: files, or paths."""
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & feature.keys())
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in (*TEXT_TYPES, *_BINARIES)


def _can_be_label(feature: Any) -> bool:
    dtype = getattr(feature, "dtype", "") if isinstance(feature, datasets.Value | datasets.ClassLabel) else ""
    return dtype in (*TEXT_TYPES, *_BINARIES, "null", "bool") or dtype.startswith(("int", "uint", "float"))


def _type_name(feature: Any) -> str:
    """Return the type of a column for messages, in one short line."""
    dtype = getattr(feature, "dtype", None) if isinstance(feature, datasets.Value) else None
    return dtype or shown(" ".join(repr(feature).split()), 60)


def _find_captions(features: datasets.Features, table: str, name: str | None) -> tuple[str | None, str | None]:
    """Return the column of captions, and the key in it if it is a column json."""
    inside = features.get("json")
    keys: Mapping[str, Any] = inside if isinstance(inside, dict) else {}
    columns = (*CAPTION_COLUMNS, "txt") if name is None else (name,)
    places: list[tuple[str, str | None, Any]] = [(each, None, features[each]) for each in columns if each in features]
    places += [("json", key, keys[key]) for key in columns if key in keys]
    for column, key, feature in places:
        if _is_text(feature):
            return column, key
    if name is None:
        return None, None
    if places:
        raise CaptionError(f"captions: got the column {name!r} of {table}, expected one of text or of lists of texts")
    all_columns = ", ".join([*features, *(f"json: {key}" for key in keys)])
    raise CaptionError(f"captions: {table} has no column {name!r}; it has {all_columns}")


def _is_text(feature: Any) -> bool:
    """Tell if a column is of text, or of lists of texts."""
    # versions of `datasets` have different kinds of lists
    item = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return isinstance(item, datasets.Value) and item.dtype in TEXT_TYPES


class TableSource:
    """A `datasets.Dataset` with images, and labels and captions if it has them.

    `Columns` finds them. Raises ValueError without images.
    """

    flips = True

    def __init__(
        self, table: datasets.Dataset, name: str, caption_column: str | None = None, account: Account | None = None
    ) -> None:
        """Find the columns, count the labels, and log the account.

        Args:
            table: the rows.
            name: of the table, in messages.
            caption_column: column of captions, as for `Columns.find`.
            account: of what was left out of the table already.
        """
        self.name = name
        self.columns = Columns.find(table.features, name, caption_column)
        if len(table) == 0:
            raise ValueError(f"data: {name} holds no pictures: it has no rows")
        # `datasets` does not decode: a broken image is an UnreadableImage here.
        undecoded = datasets.Image(decode=False)
        self.table = table.select_columns(self.columns.names).cast_column(self.columns.image, undecoded)
        self.account = account or Account(name)
        others = [column for column in table.features if column not in self.columns.names]
        self.account.leave_out("other columns", others[0] if others else "", len(others))
        labels = self._count_labels()
        self.classes = class_names(labels, name) if self.columns.class_names is None else self.columns.class_names
        self._numbers = {label: number for number, label in enumerate(self.classes)}
        for label in labels if self.columns.class_names is not None else ():
            check_label(f"a row of {name}", self._number(label), len(self.classes))
        self._take_account(labels)

    def _count_labels(self) -> Counter[Label]:
        """Return how many rows have each label; empty cells of pictures are counted on the way."""
        counts: Counter[Label] = Counter()
        where = f"the column {self.columns.label} of {self.name}"
        seen = 0
        for rows in self.table.with_format("arrow").iter(batch_size=10_000):
            images = rows[self.columns.image]
            if images.null_count or compute.struct_field(images, "bytes").null_count:
                full = (compute.is_valid(compute.struct_field(images, name)) for name in ("bytes", "path"))
                empty = compute.invert(compute.fill_null(compute.or_(*full), False)).to_pylist()
                for offset in (offset for offset, is_empty in enumerate(empty) if is_empty):
                    self.account.leave_out("empty cells", f"row {seen + offset}")
            seen += len(images)
            if self.columns.label is None:
                counts[None] += len(images)
                continue
            values = rows[self.columns.label]
            if pyarrow.types.is_struct(values.type):
                values = compute.struct_field(values, "label")
            for pair in compute.value_counts(values.combine_chunks()).to_pylist():
                counts[as_label(pair["values"], where)] += pair["counts"]
        return counts

    def _take_account(self, labels: Counter[Label]) -> None:
        check_twins(self.classes, self.name)
        labeled = sum(count for label, count in labels.items() if self._number(label) >= 0)
        self.account.take(np.repeat([0, -1], [labeled, len(self.table) - labeled]), self.classes)
        self.account.log()

    @cached_property
    def captions(self) -> Captions:
        """Captions of the images; empty if there are none. They are read when they are asked for."""
        if self.columns.caption is None:
            return ()
        rows = self.table.select_columns([self.columns.caption]).with_format("arrow").iter(batch_size=10_000)
        captions = (self.columns.captions_of(row) for batch in rows for row in batch.to_pylist())
        return counted_captions(tuple(captions), self.name)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class numbers of the images, -1 for none. They are read when they are asked for."""
        if self.columns.label is None:
            return np.full(len(self.table), -1)
        rows = self.table.select_columns([self.columns.label]).with_format("arrow").iter(batch_size=10_000)
        labels = (self.columns.label_of(row, self.name) for batch in rows for row in batch.to_pylist())
        return np.fromiter(map(self._number, labels), dtype=np.int64, count=len(self.table))

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
        label = self._number(self.columns.label_of(row, name))
        return Example(decode_image(file, name), label, name, self.columns.captions_of(row))

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
            yield json.dumps([sizes, names, labels], default=repr).encode()


def open_parquet(
    files: Sequence[Path], name: str, caption_column: str | None = None, account: Account | None = None
) -> TableSource:
    """Open Parquet files, one after the other; those without rows are left out.

    `datasets` copies them to its cache and maps that to memory.

    Args:
        files: the tables.
        name: of all of them, in messages.
        caption_column: column of captions, as for `Columns.find`.
        account: of what was left out beside the files.
    """
    account, filled = account or Account(name), []
    for file in files:
        try:
            rows = parquet.read_metadata(file).num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data: {file} can't be read as Parquet: {error}") from error
        if rows:
            filled.append(file)
        else:
            account.leave_out("files without rows", file.name)
    if not filled:
        raise ValueError(f"data: {name} holds no pictures: it has no rows")
    try:
        # Escaped: `datasets` takes names for patterns.
        table = datasets.load_dataset("parquet", data_files=[glob.escape(str(file)) for file in filled], split="train")
    except (DatasetsError, pyarrow.ArrowException, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        schemas = {str(parquet.read_schema(file).remove_metadata()): file for file in filled}
        others = [file.name for file in schemas.values()]
        same = f"; the columns of {others[0]} and {others[1]} differ" if len(others) > 1 else ""
        raise ValueError(f"data: {name} can't be read as a table{same}: {shown(reason, 300)}") from error
    return TableSource(table, name, caption_column, account)


def open_saved(folder: Path, split: str, caption_column: str | None = None) -> TableSource:
    """Open a folder of `save_to_disk`, the given split if it has splits."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except (DatasetsError, pyarrow.ArrowException, OSError, TypeError, ValueError, LookupError) as error:
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 300)
        raise ValueError(f"data: {folder}, a folder of `datasets`, can't be read: {reason}") from error
    if isinstance(saved, datasets.DatasetDict):
        for name in SPLITS[split]:
            if name in saved:
                account = Account(f"{folder}[{name}]")
                for other in saved:
                    if other != name:
                        account.leave_out(OTHER_PARTS, str(other), len(saved[other]))
                return TableSource(saved[name], account.name, caption_column, account)
        raise NoSplit(f"data: {folder} has no split {split!r}; it has {', '.join(saved)}")
    return TableSource(saved, str(folder), caption_column)
