"""Pictures in a folder: of class folders, or flat and without classes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mar.data.examples import Example, decode_image

logger = logging.getLogger("mar.data")

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"])


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people do: img2 before img10, whatever the case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_picture(file: Path) -> bool:
    """Whether it is a picture's file, by its name: not a hidden one."""
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()


def pictures(folder: Path) -> Iterator[Path]:
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
        found = {entry.name: list(pictures(entry)) for entry in subfolders}
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
