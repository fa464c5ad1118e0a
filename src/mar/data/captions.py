"""Captions of images: files that have them, and the words in them.

A folder's captions are in `metadata.jsonl` or `metadata.csv`, as in Hugging Face's imagefolder: a row for each image,
with `file_name` and `text`. Or they are in a .txt file beside each image, called like it, with a caption a line.
Tables and shards have them in columns and members (`mar.data.parquet`, `mar.data.webdataset`).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mar.checkpoint.files import check_regular
from mar.random import hash_seed

logger = logging.getLogger("mar.data")

Captions = Sequence[tuple[str, ...]]
"""The captions of each image of a source, in its order; an image may have none, or several."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Columns looked for, in this order, where none is named."""

TEXT_SUFFIX = ".txt"
"""Suffix of files with the captions of one image."""

_CAPTION = 0xCA97
_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[#*&+@$%]")


_warned: set[str] = set()
"""Warnings of this process: data is opened several times."""


class CaptionError(ValueError):
    """Captions can't be read; says where, and what is expected."""


# ---- words


def split_words(caption: str) -> list[str]:
    """Return the words of a caption, in lower case.

    Hyphens and apostrophes bind; other punctuation is left out.
    """
    return _WORD.findall(caption.casefold())


def count_words(captions: Iterable[str]) -> tuple[str, ...]:
    """Return the words of captions, by falling count, then by the alphabet."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def nearest_words(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known words that are spelled most alike."""
    return difflib.get_close_matches(word, list(known), n=count)


def pick_caption(captions: tuple[str, ...], seed: int, position: int) -> str:
    """Draw one of an image's captions, keyed by (seed, position); "" for an image without."""
    if len(captions) < 2:
        return captions[0] if captions else ""
    return captions[hash_seed(seed, _CAPTION, position) % len(captions)]


def captions_of(source: object) -> Captions:
    """Return the captions of a source's images; empty if it has none, or tells them only in passing."""
    captions: Captions = getattr(source, "captions", ())
    return captions


def chosen_captions(captions: Captions, indices: Sequence[int] | np.ndarray) -> Captions:
    """Return the captions of some images."""
    return tuple(captions[int(index)] for index in indices) if captions else ()


def counted_captions(captions: Captions, name: str) -> Captions:
    """Return captions, or () if all are empty; warn once of images without.

    `name` is that of their source.
    """
    without = sum(not each for each in captions)
    if captions and without == len(captions):
        warn_once(f"all captions of {name} are empty: its pictures have none")
        return ()
    if without:
        warn_once(f"{without:,} of the {len(captions):,} pictures of {name} have no caption")
    return captions


def warn_once(message: str) -> None:
    """Log a warning, unless this process did already."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)


def as_captions(value: Any, where: str) -> tuple[str, ...]:
    """Return the captions in a field: text, a list of texts, or nothing. CaptionError for anything else."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(each is None or isinstance(each, str) for each in values):
        raise CaptionError(f"captions: got {value!r} in {where}, expected text or a list of texts")
    texts = (" ".join(each.split()) for each in values if each is not None)
    # JSON may hold halves of characters, which no file can
    return tuple(text if text.isascii() else text.encode(errors="replace").decode() for text in texts if text)


# ---- folders


def read_folder_captions(
    folder: Path, images: Sequence[str], column: str | None = None, above: Path | None = None
) -> Captions:
    """Read the captions of the images of a folder; empty if it has none.

    Each image takes those of the nearest metadata file, in its own folder or above it. Files of texts are read where
    no metadata file has captions.

    Args:
        folder: with metadata files, or with .txt files beside the images.
        images: their paths in the folder, with slashes.
        column: of the metadata files; by default text, caption or prompt.
        above: the folder around one that is called like a split; its metadata file may name the images too.
    """
    captions = _read_metadata_files(folder, images, column, above)
    if captions is None:
        if column is not None:
            raise CaptionError(
                f"captions: got the column {column!r}, but no {' or '.join(METADATA_FILES)} names the pictures of "
                f"{folder}; add one, or leave --caption-column out"
            )
        captions = _read_text_files(folder, images)
    return counted_captions(captions, str(folder))


def _read_metadata_files(
    folder: Path, images: Sequence[str], column: str | None, above: Path | None
) -> Captions | None:
    """Return the captions of images in metadata files; None if no such file has captions."""
    known, named, files = set(images), dict[str, tuple[str, ...]](), list[Path]()
    for parent in _folders_of(images):
        path, split = _find_metadata(folder / parent), ""
        if path is None and not parent and above is not None:
            path, split = _find_metadata(above), f"{folder.name}/"
        rows = None if path is None else _read_metadata(path, column)
        if path is None or rows is None:
            continue
        files.append(path)
        for name, captions in rows.items():
            is_plain = posixpath.join(parent, name) in known
            plain = name if is_plain else name.replace("\\", "/").removeprefix("./")
            if plain.startswith(split):  # the others are of other splits
                named[posixpath.join(parent, plain.removeprefix(split))] = captions
    if not named:
        return None
    missing = [name for name in named if name not in known]
    of_files = ", ".join(map(str, files[:2])) + (", ..." if len(files) > 2 else "")
    if len(missing) == len(named):
        raise CaptionError(
            f"captions: no picture of {of_files} is there, such as {missing[0]}; expected paths such as {images[0]}"
        )
    if missing:
        warn_once(
            f"{len(missing):,} of the {len(named):,} captions of {of_files} are of pictures that are not there, such "
            f"as {missing[0]}"
        )
    return tuple(named.get(name, ()) for name in images)


def _find_metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)


def _folders_of(images: Sequence[str]) -> list[str]:
    """Return the folders of images and those above, down from the outermost, "" ."""
    folders = {""}
    for parent in {name.rpartition("/")[0] for name in images}:
        while parent:
            folders.add(parent)
            parent = parent.rpartition("/")[0]
    return sorted(folders, key=lambda name: (name.count("/") + bool(name), name))


def _read_metadata(path: Path, column: str | None) -> dict[str, tuple[str, ...]] | None:
    """Return captions by file name; None where none of the columns has captions."""
    rows = list(_read_rows(path))
    columns = list(dict.fromkeys(name for _, row in rows for name in row if isinstance(name, str)))
    chosen = column or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is not None and column not in columns:
        raise CaptionError(f"captions: {path} has no column {column!r}; it has {', '.join(columns) or 'none'}")
    if chosen is None:
        return None
    captions: dict[str, tuple[str, ...]] = {}
    for line, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise CaptionError(f"captions: line {line} of {path} has no file_name; expected the path of a picture")
        captions[name] = (*captions.get(name, ()), *as_captions(row.get(chosen), f"line {line} of {path}"))
    return captions


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and rows of a metadata file. CaptionError for one that can't be read."""
    text = _read_text(path)
    if path.suffix == ".csv":
        first = text.partition("\n")[0]
        delimiter = max(",;\t", key=first.count)
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise CaptionError(f"captions: line {reader.line_num} of {path} is no CSV ({error})") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold other ends of lines
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CaptionError(f"captions: line {number} of {path} is no JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise CaptionError(f"captions: line {number} of {path} is {line.strip()[:40]}, expected an object")
            yield number, row


def _read_text(path: Path) -> str:
    check_regular(path)
    try:
        with open(path, "rb") as file:  # as text it would take twice the time, of 100,000 files
            return file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CaptionError(
            f"captions: {path} is not in UTF-8 ({error.reason} at byte {error.start}); save it in that encoding"
        ) from None
    except OSError as error:
        raise CaptionError(f"captions: {path} can't be read ({error.strerror})") from None


def _read_text_files(folder: Path, images: Sequence[str]) -> Captions:
    """Return the captions in the .txt files beside images; empty if there are none.

    Files with no letter in any of them are not captions: detectors keep boxes so.
    """
    files: dict[str, Path] = {}
    for parent in {name.rpartition("/")[0] for name in images}:
        for entry in os.scandir(folder / parent):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() == TEXT_SUFFIX and entry.is_file():  # no pipe: the walk counts those
                files[f"{parent}/{stem}" if parent else stem] = folder / parent / entry.name
    beside = [files.get(os.path.splitext(name)[0]) for name in images] if files else []
    if not any(beside):
        return ()
    captions = tuple(() if path is None else as_captions(_read_text(path).split("\n"), str(path)) for path in beside)
    if any(captions) and not any(letter.isalpha() for each in captions for text in each for letter in text):
        warn_once(f"the .txt files beside the pictures of {folder} hold no words: not taken as captions")
        return ()
    return captions
