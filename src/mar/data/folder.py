"""Pictures in a folder: of class folders, or flat and without classes.

Which files a name means: folders of shards by split, patterns with braces and stars, names of Hub data sets.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mar.data.images import Example, decode_image

logger = logging.getLogger("mar.data")

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"])


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people do: img2 before img10, whatever the case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_picture(file: Path) -> bool:
    """Whether it is a picture's file, by its name: not a hidden one."""
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()


def list_images(folder: Path) -> Iterator[Path]:
    """The picture files anywhere in `folder`, in natural order; hidden files and folders are left out."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        for name in sorted(files, key=natural_key):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(where, name)


class FolderSource:
    """Pictures in a folder.

    Each subfolder that holds pictures, at any depth, is a class of its name; numbers follow the natural order of the
    names (that of the WordNet numbers for ImageNet's folders). A folder with pictures of its own and no such subfolder
    has no classes. Raises ValueError where there is no picture.
    """

    flips = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"data: there is no folder {self.folder}")
        entries = sorted(self.folder.iterdir(), key=lambda entry: natural_key(entry.name))
        subfolders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        found = {entry.name: list(list_images(entry)) for entry in subfolders}
        empty = [name for name, files in found.items() if not files]
        found = {name: files for name, files in found.items() if files}
        flat = [entry for entry in entries if is_picture(entry)]
        if not found and not flat:
            kinds = " ".join(sorted(EXTENSIONS))
            raise ValueError(f"data: no pictures in {self.folder}: looked for {kinds} in it and in its subfolders")
        if found and empty:
            logger.warning("no pictures in %s of %s: not counted as classes", ", ".join(empty), self.folder)
        if found and flat:
            logger.warning("%d pictures beside the class folders of %s are not used", len(flat), self.folder)
        self.classes = tuple(found)
        files = [file for name in found for file in found[name]] or flat
        # Arrays, not lists: workers share their memory, since nothing counts references to what is in them.
        self._files = np.array([os.fsencode(file.relative_to(self.folder)) for file in files])
        counts = [len(found[name]) for name in found]
        self.labels = np.repeat(np.arange(len(found)), counts) if found else np.full(len(flat), -1)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path = self.folder / os.fsdecode(self._files[index].item())
        return Example(decode_image(path, str(path)), int(self.labels[index]), str(path))


SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "val", "valid")}
"""Words by which a part of a data set is known, the likeliest first."""
SPLIT_WORDS = frozenset(word for words in SPLITS.values() for word in words)
SHARDS = (".parquet", ".tar")
"""Kinds of files that hold many pictures."""

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `datasets`' `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def shards_kind(folder: Path) -> str | None:
    """Which of SHARDS lie in `folder`, in its `data`, or in a subfolder called as a split; None where none do."""
    places = ["", "data/", *(f"{word}/" for word in SPLIT_WORDS)]
    return next((kind for kind in SHARDS if any(any(folder.glob(f"{place}*{kind}")) for place in places)), None)


def split_files(folder: Path, kind: str, split: str) -> list[Path]:
    """The files in `folder` that end in `kind` and are of a split, told by the words of their paths; train has them
    all where none tells. ValueError where there are some, but not of this split."""
    found = (file for file in folder.rglob(f"*{kind}") if not file.name.startswith("."))
    files = sorted(found, key=lambda file: natural_key(str(file)))
    words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    wanted = [file for file in files if words[file].intersection(SPLITS[split])]
    if wanted or not files:
        return wanted
    told = any(words[file].intersection(SPLIT_WORDS) for file in files)
    if told or split != "train":
        shown = ", ".join(file.name for file in files[:3])
        raise ValueError(f"data: no {kind} file in {folder} has {split!r} in its name; there is {shown}")
    return files


def is_pattern(spec: str) -> bool:
    """Whether a name stands for several."""
    return any(letter in spec for letter in "*?[{")


def expand(pattern: str) -> list[str]:
    """`a-{00..02}.tar` and `{a,b}.tar` written out, as shells do; what has no braces is itself."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    ends = _RANGE.fullmatch(found[1])
    if ends is None:
        words = found[1].split(",")
    else:
        first, last = int(ends[1]), int(ends[2])
        words = [f"{number:0{len(ends[1])}}" for number in range(first, last + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for word in words for name in expand(f"{before}{word}{after}")]


def matching(pattern: str) -> list[Path]:
    """The files that a pattern with braces and stars names, in its order. ValueError where one is not there."""
    files: list[Path] = []
    for name in expand(str(Path(pattern).expanduser())):
        found = [Path(name)] if Path(name).is_file() else [Path(path) for path in glob.glob(name, recursive=True)]
        if not found:
            raise ValueError(f"data: there is no {name}, which {pattern} asks for")
        files += sorted(found, key=lambda file: natural_key(str(file)))
    return list(dict.fromkeys(files))


def kind_of(files: list[Path] | list[str], spec: str) -> str:
    """Which of SHARDS all of `files` are. ValueError where they are not."""
    kinds = {Path(file).suffix for file in files}
    if len(kinds) != 1 or not kinds.issubset(SHARDS):
        raise ValueError(
            f"data: {spec} stands for {', '.join(sorted(kinds)) or 'no'} files; expected .tar or .parquet ones"
        )
    return kinds.pop()


def hub_name(spec: str) -> tuple[str, str | None] | None:
    """Name and configuration of a data set on the Hub: of `hub:NAME@CONFIG`, or of OWNER/NAME where there is no such
    path. None for anything else."""
    path = Path(spec)
    if not spec.startswith("hub:") and (not _HUB.fullmatch(spec) or path.suffix in SHARDS or path.exists()):
        return None
    name, _, config = spec.removeprefix("hub:").partition("@")
    if not name:
        raise ValueError(f"data: {spec} names no data set; expected hub:OWNER/NAME or hub:OWNER/NAME@CONFIG")
    return name, config or None
