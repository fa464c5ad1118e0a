"""Captions of images: files that have them, and the words in them.

A folder's captions are in `metadata.jsonl` or `metadata.csv`, as in Hugging Face's imagefolder: a row for each image,
with `file_name` and `text`. Or they are in a .txt file beside each image, called like it, with a caption a line.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mar.random import hash_seed

logger = logging.getLogger("mar.data")

Captions = Sequence[tuple[str, ...]]
"""The captions of each image of a source, in its order; an image may have none, or several."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Columns looked for, in this order, where none is named."""

_CAPTION = 0xCA97
_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[#*&+@$%]")


# ---- words


def split_words(caption: str) -> list[str]:
    """Return the words of a caption, in lower case.

    Hyphens and apostrophes bind; other punctuation is left out.
    """
    return _WORD.findall(caption.casefold())


def count_words(captions: Iterable[str]) -> tuple[str, ...]:
    """Return every word of captions once, the most frequent first, then by the alphabet."""
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


# ---- files


def read_folder_captions(folder: Path, images: Sequence[str], column: str | None = None) -> Captions:
    """Read the captions of the images of a folder; empty if it has none.

    Args:
        folder: with a metadata file, or with .txt files beside the images.
        images: their paths in the folder, with slashes.
        column: of the metadata file; by default text, caption or prompt.
    """
    by_name = _read_metadata(folder, column)
    if by_name is None:
        by_name = dict(_read_texts(folder, images))
    elif missing := sorted(set(by_name) - set(images)):
        logger.warning(
            "%s of the %s captions of %s are of pictures that are not there, such as %s",
            f"{len(missing):,}", f"{len(by_name):,}", folder, missing[0],
        )  # fmt: skip
    captions = tuple(by_name.get(name, ()) for name in images)
    without = sum(not each for each in captions)
    if without == len(captions):
        return ()
    if without:
        logger.warning("%s of the %s pictures of %s have no caption", f"{without:,}", f"{len(images):,}", folder)
    return captions


def _read_metadata(folder: Path, column: str | None) -> dict[str, tuple[str, ...]] | None:
    """Return captions by file name; None without a metadata file, or where none of its columns has captions."""
    path = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    rows = list(_read_rows(path))
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    chosen = column or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is not None and column not in columns:
        raise ValueError(f"captions: {path} has no column {column!r}; it has {', '.join(columns)}")
    if chosen is None:
        return None
    captions: dict[str, tuple[str, ...]] = {}
    for line, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"captions: line {line} of {path} has no file_name")
        captions[name] = (*captions.get(name, ()), *as_captions(row.get(chosen), f"line {line} of {path}"))
    return captions


def as_captions(value: Any, where: str) -> tuple[str, ...]:
    """Return the captions in a field: text, a list of texts, or nothing. ValueError for anything else."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(each is None or isinstance(each, str) for each in values):
        raise ValueError(f"captions: got {value!r} in {where}, expected text or a list of texts")
    return tuple(text for each in values if each is not None and (text := " ".join(each.split())))


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and rows of a metadata file. ValueError for one that can't be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: {path} is not in UTF-8 ({error.reason} at byte {error.start})") from None
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(text)), start=2)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"captions: line {number} of {path} is no JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"captions: line {number} of {path} is {line.strip()[:40]}, expected an object")
            yield number, row


def _read_texts(folder: Path, images: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in images:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"captions: {path} is not in UTF-8 ({error.reason} at byte {error.start})") from None
            yield name, as_captions(lines, str(path))
