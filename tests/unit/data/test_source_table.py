"""Every source by every form of labels by every broken part: no cell is silent, none is a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from shard_files import png_bytes

from mar.cli import main
from mar.data import accounts
from mar.data.images import UnreadableImage
from mar.data.latent_cache import LatentSource
from mar.data.sources import open_data
from mar.data.stream import StreamSource

COUNT = 4
SOURCES = (
    "flat", "classes", "parts", "parquet", "saved", "tar cls", "tar json", "stream parquet", "stream cls",
    "stream json", "cache",
)  # fmt: skip
FORMS: dict[str, list[Any]] = {
    "none": [],
    "int": [1, 0, 1, 0],
    "float": [1.0, 0.0, 1.0, 0.0],
    "fraction": [0.5, 0.0, 1.0, 0.0],
    "text": ["cat", "ant", "cat", "ant"],
    "bytes": [b"cat", b"ant", b"cat", b"ant"],
    "latin": [b"caf\xe9", b"ant", b"cat", b"ant"],
    "null": [None, None, None, None],
    "missing": [1, None, 0, None],
    "large": [10**9, 0, 1, 0],
    "list": [[1], [0], [1], [0]],
}
PARTS = ("whole", "broken picture", "empty picture", "unreadable member", "truncated shard")
"""Broken parts. They are of picture 1."""


@dataclass
class Cell:
    """The outcome of a source: `message`, or all the rest."""

    classes: tuple[str, ...] = ()
    labels: dict[int, int] = field(default_factory=dict)
    """Of each readable picture."""
    pictures: int = COUNT
    skipped: str = ""
    """Why picture 1 can't be read, if it is skipped."""
    left_out: dict[str, int] = field(default_factory=dict)
    message: str = ""
    """A pattern of the error, on opening or on reading."""
    impossible: str = ""
    """Why the source can't express the cell."""


# ---- what each cell is to be


def numbers(classes: tuple[str, ...], *labels: int) -> Cell:
    return Cell(classes, dict(enumerate(labels)))


NO_LABELS = numbers((), -1, -1, -1, -1)
TWO = numbers(("0", "1"), 1, 0, 1, 0)
NAMED = numbers(("ant", "cat"), 1, 0, 1, 0)
FRACTION = Cell(message=r"has the label 0\.5 \(float\), expected a whole number or a name; correct it")
NO_UTF8 = Cell(message="is not in UTF-8 .*; save its label in that encoding")
TOO_LARGE = Cell(message="has the label 1000000000, but only 3 different ones: .*; number them so, or give names")
A_LIST = Cell(message=r"holds labels of the type [^\n]*, expected whole numbers or text; change or rename")
NAMES = Cell(message="(labels of .* are names, which have no numbers|a name, which has no number) in a stream.*leave")

OF_VALUES = {
    "none": NO_LABELS, "int": TWO, "float": TWO, "fraction": FRACTION, "text": NAMED, "bytes": NAMED, "latin": NO_UTF8,
    "null": NO_LABELS, "missing": numbers(("0", "1"), 1, -1, 0, -1), "large": TOO_LARGE, "list": A_LIST,
}  # fmt: skip
"""Labels in tables, told by their type."""
A_LIST_IN_JSON = Cell(message=r"has the label \[1\] \(list\), expected a whole number or a name; correct it")
IN_STREAMS = {"text": NAMES, "bytes": NAMES, "large": Cell(message="has the label 1000000000, but there are 2 classes")}
BY_NAME = {
    "none": NO_LABELS, "null": NO_LABELS, "int": TWO, "text": NAMED, "bytes": NAMED,
    "float": numbers(("0.0", "1.0"), 1, 0, 1, 0),
    "fraction": numbers(("0.0", "0.5", "1.0"), 1, 0, 2, 0),
    "latin": numbers(("ant", "caf\udce9", "cat"), 1, 0, 2, 0),
    "missing": Cell(("0", "1"), {0: 1, 2: 0}, 2, left_out={"pictures beside the class folders": 2}),
    "large": numbers(("0", "1", "1000000000"), 2, 0, 1, 0),
    "list": numbers(("[0]", "[1]"), 1, 0, 1, 0),
}  # fmt: skip
"""Labels that are names of folders, whatever they look like."""
JSON_LATIN = Cell(
    ("ant", "cat"), {0: -1, 1: 0, 2: 1, 3: 0}, left_out={"labels or captions that can't be read": 1}
)  # JSON in another encoding is no JSON
CELLS: dict[str, dict[str, Cell]] = {
    "flat": {form: NO_LABELS if form in ("none", "null") else Cell(impossible="a flat folder has no place for labels")
             for form in FORMS},
    "classes": BY_NAME,
    "parts": BY_NAME,
    "parquet": OF_VALUES,
    "saved": OF_VALUES,
    "tar cls": OF_VALUES | {"list": BY_NAME["list"]},  # it is text
    "tar json": OF_VALUES | {"latin": JSON_LATIN, "list": A_LIST_IN_JSON},
    "stream parquet": OF_VALUES | IN_STREAMS | {"null": numbers(("0", "1"), -1, -1, -1, -1)},
    "stream cls": OF_VALUES | IN_STREAMS | {"list": NAMES},
    "stream json": OF_VALUES | IN_STREAMS | {"null": numbers(("0", "1"), -1, -1, -1, -1), "latin": NAMES,
                                             "list": A_LIST_IN_JSON},
    "cache": OF_VALUES,
}  # fmt: skip
TRUNCATED = {
    "parquet": r"x\.parquet can't be read as Parquet", "saved": "a folder of `datasets`, can't be read",
    "tar": r"x\.tar is cut short or no plain tar \(.*\); fetch it again, or leave it out",
    "stream parquet": "can't be opened: ", "cache": "has [0-9,]+ bytes instead of [0-9,]+; .*run the `mar cache` that",
}  # fmt: skip
WHY = {"broken picture": "it is no picture of a known kind", "empty picture": "it is empty"}


def expected(source: str, form: str, part: str) -> Cell:
    """The cell of the table."""
    cell = CELLS[source][form]
    is_folder, is_tar = (
        source in ("flat", "classes", "parts"),
        "tar" in source or source in ("stream cls", "stream json"),
    )
    if cell.impossible:
        return cell
    if part == "truncated shard":
        if is_folder:
            return Cell(impossible="a folder has no shards")
        message = TRUNCATED["tar" if is_tar else source]
        return Cell(message=f"({cell.message})|({message})" if cell.message else message)
    if cell.message or part == "whole":
        return cell
    labels = {picture: label for picture, label in cell.labels.items() if picture != 1}
    if part == "unreadable member" and is_tar:  # a link: there is no picture 1
        has_label = bool(FORMS[form]) and ("json" in source or FORMS[form][1] is not None)
        counts = {"links and special files": 1} | ({"members without a picture": 1} if has_label else {})
        if (source, form) == ("stream json", "null"):
            return Cell(message=r"x\.tar/1\.json lies apart from its picture, and a stream is read in passing")
        return Cell(cell.classes, labels, COUNT - 1, left_out=cell.left_out | counts)
    if source == "cache":
        return Cell(cell.classes, labels, COUNT - 1, left_out={"pictures that could not be read": 1})
    if is_folder and form == "missing":  # picture 1 is left out unread
        return cell
    counts = {"empty cells": 1} if part == "unreadable member" and source in ("parquet", "saved") else {}
    why = WHY.get(part, "Input/output error" if is_folder else "the cell is empty")
    return Cell(cell.classes, labels, cell.pictures, why, cell.left_out | counts)


# ---- making sources


def pictures(part: str) -> list[bytes]:
    broken = {"broken picture": b"no picture", "empty picture": b""}
    return [broken.get(part, png_bytes(i)) if i == 1 else png_bytes(i) for i in range(COUNT)]


def make_folder(folder: Path, source: str, labels: list[Any], part: str) -> str:
    for i, data in enumerate(pictures(part)):
        label = labels[i] if labels else None
        name = b"" if label is None else label if isinstance(label, bytes) else str(label).encode()
        place = os.path.join(os.fsencode(folder), b"train" if source == "parts" else b"", name)
        os.makedirs(place, exist_ok=True)
        with open(os.path.join(place, b"%d.png" % i), "wb") as file:
            file.write(data)
    if source == "parts":
        (folder / "val").mkdir()
        (folder / "val" / "v.png").write_bytes(png_bytes(9))
    return str(folder)


def make_tar(folder: Path, source: str, labels: list[Any], part: str) -> Path:
    with tarfile.open(folder / "x.tar", "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if part == "unreadable member" and name == "1.png":
                info.size, info.type, info.linkname = 0, tarfile.SYMTYPE, "0.png"
            tar.addfile(info, BytesIO(data))

        for i, data in enumerate(pictures(part)):
            add(f"{i}.png", data)
            label = labels[i] if labels else None
            if source.endswith("json") and labels:
                text = b'"%b"' % label if isinstance(label, bytes) else json.dumps(label).encode()
                add(f"{i}.json", b'{"label": %b}' % text)
            elif label is not None:
                add(f"{i}.cls", label if isinstance(label, bytes) else str(label).encode())
    if part == "truncated shard":
        cut(folder / "x.tar", 512 * 3 + 100)
    return folder / "x.tar"


def make_table(folder: Path, source: str, labels: list[Any], part: str) -> Path:
    cells: list[Any] = [{"bytes": data, "path": None} for data in pictures(part)]
    if part == "unreadable member":
        cells[1] = None
    path = folder / "x.parquet"
    parquet.write_table(pa.table({"image": cells} | ({"label": labels} if labels else {})), path)
    if source == "saved":
        datasets.load_dataset("parquet", data_files=str(path), split="train").save_to_disk(folder / "saved")
    if part == "truncated shard" and source != "cache":
        for file in [*(folder / "saved").glob("*.arrow"), path]:
            cut(file, file.stat().st_size - 100)
    return folder / "saved" if source == "saved" else path


def make_cache(folder: Path, table: Path, part: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Cache a table. ValueError with the line of `mar cache`, if it refuses."""
    out = folder / "cache"
    command = ["cache", str(table), "--out", str(out), "--tokenizer", "pixels", "--image-size", "8", "--device", "cpu"]
    capsys.readouterr()
    if main(command) != 0:
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        raise ValueError(said.removeprefix("mar: ").rstrip())
    if part == "truncated shard":
        cut(next(out.glob("*.safetensors")), 200)
    return str(out)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# ---- reading them


def read(name: str) -> tuple[Any, dict[int, int], dict[int, str]]:
    """Open a source; return it, the labels of readable pictures, and why others can't be read, by number."""
    opened: Any = open_data(name, 2)
    labels: dict[int, int] = {}
    skipped: dict[int, str] = {}
    for read_one in readers(opened):
        try:
            picture, label = read_one()
            labels[picture] = label
        except UnreadableImage as error:
            skipped[number_of(error.name)] = error.why
    return opened, labels, skipped


def readers(source: Any) -> Iterator[Callable[[], tuple[int, int]]]:
    if isinstance(source, StreamSource):
        for sample in source.preview():
            yield lambda sample=sample: (number_of(sample.name), source.example(sample).label)  # type: ignore[misc]
    elif isinstance(source, LatentSource):
        for i in range(len(source)):
            yield lambda i=i: (i, source.read(i, flip=False)[1])  # type: ignore[misc]
    else:
        for i in range(len(source)):
            yield lambda i=i: (number_of(source[i].name), source[i].label)  # type: ignore[misc]


def number_of(name: str) -> int:
    """The number of a picture in its name: 3.png, or table#3."""
    return int(re.findall(r"(?:#|/)(\d+)(?:\.png)?$", name)[0])


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of tables, and says all lines again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    monkeypatch.setattr(accounts, "_logged", set())
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    ("source", "form", "part"),
    [(s, f, p) for s in SOURCES for f in FORMS for p in PARTS if not expected(s, f, p).impossible],
)
def test_source_cell_is_accounted_for_or_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, source: str, form: str, part: str,
) -> None:  # fmt: skip
    cell, labels = expected(source, form, part), FORMS[form]
    caplog.set_level("INFO", "mar.data")
    if source in ("flat", "classes", "parts"):
        name = make_folder(tmp_path / "data", source, labels, part)
        if part == "unreadable member":
            fail_on(monkeypatch, "1.png")
    elif source.endswith(("cls", "json")):
        name = str(make_tar(tmp_path, source, labels, part))
    else:
        name = str(make_table(tmp_path, source, labels, part))
    name = f"stream:{name}" if source.startswith("stream") else name
    if cell.message:
        with pytest.raises(ValueError, match=rf"^[^\n]*({cell.message})[^\n]*$"):
            read(make_cache(tmp_path, Path(name), part, capsys) if source == "cache" else name)
        return
    if source == "cache":
        name = make_cache(tmp_path, Path(name), part, capsys)
        caplog.clear()
    opened, found, skipped = read(name)
    assert (opened.classes, found) == (cell.classes, cell.labels)
    if source == "cache":  # it was skipped when the cache was made
        assert skipped == {} if part == "whole" else [*skipped] == [1]
    elif cell.skipped:
        assert [*skipped] == [1]
        assert cell.skipped in skipped[1]
    else:
        assert skipped == {}
    left_out = cell.left_out | ({"pictures of other parts": 1} if source == "parts" else {})
    assert opened.account.counts == left_out
    lines = [message for message in caplog.messages if message == opened.account.line]
    assert len(lines) == 1, "the account is said, once"
    assert all("\n" not in message for message in caplog.messages)
    if source.startswith("stream"):
        assert all(f"left out: {reason}, the first of them" in caplog.text for reason in left_out)
        return
    noun = "picture" if cell.pictures == 1 else "pictures"
    assert f": {cell.pictures} {noun}, " in lines[0]
    assert ("no labels" in lines[0]) == (cell.classes == ())
    assert all(f"{reason}: {count} (" in lines[0] for reason, count in left_out.items())
    if source != "cache":  # whose labels are not read when it is opened
        assert opened.account.without_label == sum(label < 0 for label in CELLS[source][form].labels.values()) - (
            cell.pictures < COUNT and source.startswith("tar") and CELLS[source][form].labels[1] < 0
        )


def fail_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Opening a picture of this name fails, as on a disk with an error."""
    open_image = Image.open

    def fail(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith(f"/{name}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return open_image(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", fail)


def test_table_of_sources_has_every_cell() -> None:
    cells = {(s, f, p): expected(s, f, p) for s in SOURCES for f in FORMS for p in PARTS}
    assert len(cells) == 11 * 11 * 5
    for cell in cells.values():
        assert bool(cell.labels) + bool(cell.message) + bool(cell.impossible) == 1
    reasons = Counter(cell.impossible for cell in cells.values())
    assert reasons == {"": 536, "a flat folder has no place for labels": 45, "a folder has no shards": 24}
