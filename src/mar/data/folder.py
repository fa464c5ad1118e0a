"""Images in a folder: in class folders, or flat and without classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mar.data.captions import read_folder_captions
from mar.data.images import Example, decode_image
from mar.data.paths import IMAGE_SUFFIXES, is_image_file, natural_key

logger = logging.getLogger("mar.data")


class FolderSource:
    """Images in a folder.

    Each subfolder with images, at any depth, is a class of its name; numbers follow the natural order of the names (for
    ImageNet's folders, the WordNet numbers). A folder with images of its own and no such subfolder has no classes.
    Captions are read by `mar.data.captions.read_folder_captions`. Raises ValueError if there is no image.
    """

    flips = True

    def __init__(self, folder: str | Path, caption_column: str | None = None, above: Path | None = None) -> None:
        """List the images and read their captions.

        Args:
            folder: of the images.
            caption_column: column of metadata files with captions; None: text, caption or prompt.
            above: the folder around one that is called like a split; its metadata file may name the images too.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"data: there is no folder {self.folder}")
        entries = sorted(self.folder.iterdir(), key=lambda entry: natural_key(entry.name))
        subfolders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        by_class = {entry.name: list(list_images(entry)) for entry in subfolders}
        empty = [name for name, files in by_class.items() if not files]
        by_class = {name: files for name, files in by_class.items() if files}
        flat = [entry for entry in entries if is_image_file(entry)]
        if not by_class and not flat:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"data: no pictures in {self.folder}: looked for {suffixes} in it and in its subfolders")
        if by_class and empty:
            logger.warning("no pictures in %s of %s: not counted as classes", ", ".join(empty), self.folder)
        if by_class and flat:
            logger.warning("%d pictures beside the class folders of %s are not used", len(flat), self.folder)
        self.classes = tuple(by_class)
        files = [file for files in by_class.values() for file in files] or flat
        # Arrays, not lists: nothing counts references to their elements, so workers share their memory.
        self._files = np.array([os.fsencode(file.relative_to(self.folder)) for file in files])
        self.captions = read_folder_captions(self.folder, self.image_names(), caption_column, above)
        counts = [len(files) for files in by_class.values()]
        self.labels = np.repeat(np.arange(len(counts)), counts) if by_class else np.full(len(flat), -1)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path = self.folder / os.fsdecode(self._files[index].item())
        captions = self.captions[index] if self.captions else ()
        return Example(decode_image(path, str(path)), int(self.labels[index]), str(path), captions)

    def image_names(self) -> list[str]:
        """Return the images' paths in the folder, with slashes."""
        return [os.fsdecode(file).replace(os.sep, "/") for file in self._files.tolist()]

    def listing(self) -> Iterator[bytes]:
        """Yield path in the folder, label and size of every image."""
        for file, label in zip(self._files.tolist(), self.labels, strict=True):
            try:
                size = os.stat(os.path.join(os.fsencode(self.folder), file)).st_size
            except OSError:  # gone since the folder was listed: reading it will fail
                size = -1
            yield b"%b\0%d %d\n" % (file.replace(os.fsencode(os.sep), b"/"), label, size)


def list_images(folder: Path) -> Iterator[Path]:
    """Yield the image files at any depth, in natural order. Hidden files and folders are left out."""
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = sorted((name for name in subfolders if not name.startswith(".")), key=natural_key)
        for name in sorted(files, key=natural_key):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(parent, name)
