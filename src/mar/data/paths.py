"""Names of data: splits, shards, file patterns, data sets of the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mar.checkpoint.files import check_regular

SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "val", "valid")}
"""Names of folders, files and splits that mean a split, the likeliest first."""
SPLIT_NAMES = frozenset(name for names in SPLITS.values() for name in names)
SHARD_SUFFIXES = (".parquet", ".tar")
"""Suffixes of files that hold many images."""
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".gz", ".7z", ".rar")
IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"])
UNREAD_IMAGE_SUFFIXES = frozenset(
    [".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".exr",
     ".hdr", ".tga", ".jfif", ".jpe", ".mpo", ".apng", ".pbm", ".pnm", ".pfm", ".ico", ".dds", ".eps", ".pdf"]
)  # fmt: skip
"""Suffixes of images that are not read, and said to be left out."""
UNREAD_IMAGES = "pictures of kinds that are not read"

SYSTEM_NAMES = frozenset(
    ["@eadir", "@recycle", "@recently-snapshot", "@tmp", "@sharebin", "#recycle", "#snapshot", "$recycle.bin",
     "recycler", "system volume information", "lost+found", "__macosx", "__pycache__", "network trash folder",
     "temporary items"]
)  # fmt: skip
"""Folders that systems and network drives put beside the data, in lower case."""

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key to sort names as people do, img2 before img10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_system_name(name: str) -> bool:
    """Tell if a folder is hidden, or put there by a system."""
    return (name.startswith(".") and name not in (".", "..")) or name.casefold() in SYSTEM_NAMES


def is_saved_dataset(folder: Path) -> bool:
    """Tell if `folder` was written by `save_to_disk` of `datasets`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def find_shard_suffix(folder: Path) -> str | None:
    """Return the suffix of shards in `folder`; None: no shards.

    Its `data` and subfolders called like splits are searched too.
    """
    suffixes: set[str] = set()
    for path in (folder, *folder.iterdir()):
        if path == folder or path.name.casefold() in SPLIT_NAMES or path.name == "data":
            names = os.listdir(path) if path.is_dir() else []
            suffixes.update(
                suffix for name in names if not name.startswith(".")
                if (suffix := os.path.splitext(name)[1].lower()) in SHARD_SUFFIXES and (path / name).is_file()
            )  # fmt: skip
    return next((suffix for suffix in SHARD_SUFFIXES if suffix in suffixes), None)


class NoSplit(ValueError):
    """Data has no images of a split."""


def find_split_files(folder: Path, names: Iterable[str], suffix: str, split: str) -> list[Path]:
    """Find the files of a suffix and a split in `folder`.

    The words of their paths tell the split, those of the outermost folder first. Of several words for the test split,
    the likeliest one is taken. If no path names any split, all are of train.

    Raises:
        NoSplit: there are files of other splits only.
        ValueError: a name has words of both splits.

    Args:
        folder: of all files.
        names: their paths in it.
        suffix: .parquet or .tar, in any case.
        split: train or test.
    """
    shards = [folder / name for name in names if name.lower().endswith(suffix)]
    files = sorted(shards, key=lambda file: natural_key(str(file)))
    words = {file: _split_words(file.relative_to(folder)) for file in files}
    for file, own in words.items():
        if all(own.intersection(names) for names in SPLITS.values()):
            raise ValueError(
                f"data: {file} names two splits ({', '.join(sorted(own))}), expected one of them; rename it"
            )
    if split == "train":
        of_split = [file for file in files if words[file].intersection(SPLITS[split])]
    else:
        by_word = ([file for file in files if word in words[file]] for word in SPLITS[split])
        of_split = next(filter(None, by_word), [])
    if of_split or not files:
        return of_split
    if any(words.values()) or split != "train":
        shown = ", ".join(file.name for file in files[:3])
        raise NoSplit(f"data: no {suffix} file in {folder} has {split!r} in its name; there is {shown}")
    return files


def _split_words(path: Path) -> set[str]:
    """Return the words for splits in the outermost part of a path that has some."""
    for part in path.parts:
        if words := SPLIT_NAMES.intersection(re.split(r"[^a-z]+", part.lower())):
            return set(words)
    return set()


def is_pattern(spec: str) -> bool:
    """Tell if a name has stars, brackets or braces."""
    return any(letter in spec for letter in "*?[{")


def expand_braces(pattern: str) -> list[str]:
    """Write out `a-{00..02}.tar` and `{a,b}.tar`, as shells do."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    ends = _RANGE.fullmatch(braces[1])
    if ends is None:
        words = braces[1].split(",")
    else:
        first, last = int(ends[1]), int(ends[2])
        words = [f"{number:0{len(ends[1])}}" for number in range(first, last + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for word in words for name in expand_braces(f"{before}{word}{after}")]


def expand_pattern(pattern: str) -> list[Path]:
    """Return the files of a pattern, in its order. Raises ValueError for a missing one."""
    files: list[Path] = []
    for name in expand_braces(str(Path(pattern).expanduser())):
        matches = [Path(name)] if Path(name).is_file() else [Path(path) for path in glob.glob(name, recursive=True)]
        if not matches:
            raise ValueError(f"data: there is no {name}, which {pattern} asks for")
        for match in matches:
            check_regular(match)
        files += sorted(matches, key=lambda file: natural_key(str(file)))
    return list(dict.fromkeys(files))


def common_suffix(files: list[Path] | list[str], spec: str) -> str:
    """Return the one shard suffix of all `files`. Raises ValueError if there is none."""
    suffixes = {Path(file).suffix.lower() for file in files}
    if len(suffixes) != 1 or not suffixes.issubset(SHARD_SUFFIXES):
        raise ValueError(
            f"data: {spec} stands for {', '.join(sorted(suffixes)) or 'no'} files; expected .tar or .parquet ones, of "
            "one kind"
        )
    return suffixes.pop()


def hub_name(spec: str) -> tuple[str, str | None] | None:
    """Split `hub:NAME@CONFIG` or OWNER/NAME into name and configuration.

    None for anything else, an existing path OWNER/NAME included. Raises ValueError for an empty name.
    """
    path = Path(spec)
    is_path = not _HUB_NAME.fullmatch(spec) or path.suffix.lower() in SHARD_SUFFIXES or path.exists()
    if is_path and not spec.startswith("hub:"):
        return None
    name, _, config = spec.removeprefix("hub:").partition("@")
    if not name:
        raise ValueError(f"data: {spec} names no data set; expected hub:OWNER/NAME or hub:OWNER/NAME@CONFIG")
    return name, config or None
