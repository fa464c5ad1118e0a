"""Images in a folder: in class folders, or flat and without classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mar.data.accounts import Account, log_once, shown
from mar.data.captions import METADATA_FILES, TEXT_SUFFIX, read_folder_captions
from mar.data.images import Example, decode_image
from mar.data.labels import check_twins
from mar.data.paths import IMAGE_SUFFIXES, UNREAD_IMAGES, natural_key
from mar.data.walk import FolderWalk, reason_of, split_images

SIZED_IMAGES = 1000
"""Images, at most, whose sizes tell a folder from another one with the same names."""
_CAPTION_FILES = (*METADATA_FILES, TEXT_SUFFIX)


class FolderSource:
    """Images in a folder.

    Each subfolder with images, at any depth, is a class of its name; numbers follow the natural order of the names (for
    ImageNet's folders, the WordNet numbers). A folder with images of its own and no such subfolder has no classes.
    Captions are read by `mar.data.captions.read_folder_captions`. Raises ValueError if there is no image.
    """

    flips = True

    def __init__(
        self,
        folder: str | Path,
        caption_column: str | None = None,
        above: Path | None = None,
        account: Account | None = None,
    ) -> None:
        """List the images, read their captions, and log the account.

        Args:
            folder: of the images.
            caption_column: column of metadata files with captions; None: text, caption or prompt.
            above: the folder around one that is called like a split; its metadata file may name the images too.
            account: of what was left out around the folder.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"data: there is no folder {self.folder}")
        self.account = account or Account(str(self.folder))
        others = Account(str(self.folder))  # files that are no pictures, some of which may hold captions
        walk = FolderWalk(self.folder, self.account)
        top = walk.entries()
        metadata = [name for name in top.files if name in METADATA_FILES]
        flat = split_images([name for name in top.files if name not in metadata], others)
        by_class, unread = {}, dict[str, str]()
        for name in sorted(top.folders + top.links, key=natural_key):
            listed = walk.walk(name)
            by_class[name] = split_images(listed, others)
            if not by_class[name] and (images := [file for file in listed if reason_of(file) == UNREAD_IMAGES]):
                unread[name] = images[0]
        empty = [name for name, files in by_class.items() if not files]
        if unread:
            _require_readable_kinds(self.folder, unread if len(empty) < len(by_class) else {})
        by_class = {name: files for name, files in by_class.items() if files}
        if not by_class and not flat:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            more = f"; {others.left_out}" if others.counts else ""
            if "shards beside the pictures" in others.counts:
                more += f"; shards that lie deeper have to be named, as '{self.folder}/*/*.tar'"
            raise ValueError(
                f"data: no pictures in {self.folder}: looked for {suffixes} in it and in its subfolders{more}"
            )
        if by_class:
            self.account.leave_out("folders without pictures", empty[0] if empty else "", len(empty))
            self.account.leave_out("pictures beside the class folders", flat[0] if flat else "", len(flat))
        self.classes = tuple(by_class)
        files = [file for files in by_class.values() for file in files] or flat
        # Arrays, not lists: nothing counts references to their elements, so workers share their memory.
        self._files = np.array([os.fsencode(file) for file in files])
        self.captions = read_folder_captions(self.folder, self.image_names(), caption_column, above)
        counts = [len(files) for files in by_class.values()]
        self.labels = np.repeat(np.arange(len(counts)), counts) if by_class else np.full(len(flat), -1)
        for reason, count in others.counts.items():
            if not (self.captions and reason == "other files" and others.examples[reason].endswith(_CAPTION_FILES)):
                self.account.leave_out(reason, others.examples[reason], count)
        if metadata and not self.captions:
            self.account.leave_out("metadata files without captions, whose labels are not read", metadata[0])
        check_twins(self.classes, str(self.folder))
        _warn_of_nesting(self.folder, by_class)
        _warn_of_links(self.folder, top.links, self.classes)
        self.account.take(self.labels, self.classes)
        self.account.log()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path = self.folder / os.fsdecode(self._files[index].item())
        captions = self.captions[index] if self.captions else ()
        return Example(decode_image(path, str(path)), int(self.labels[index]), str(path), captions)

    def image_names(self) -> list[str]:
        """Return the images' paths in the folder, with slashes."""
        return [os.fsdecode(file) for file in self._files.tolist()]

    def listing(self) -> Iterator[bytes]:
        """Yield path in the folder, label and size of every image."""
        for file, label in zip(self._files.tolist(), self.labels, strict=True):
            yield b"%b\0%d %d\n" % (file, label, self._size(file))

    def quick_listing(self) -> Iterator[bytes]:
        """Yield paths and labels of all images, and sizes of some."""
        names = self._files.tolist()
        yield b"\0".join(names)
        yield self.labels.astype(np.int64).tobytes()
        for index in np.linspace(0, len(names) - 1, min(SIZED_IMAGES, len(names))).astype(np.int64).tolist():
            yield b"%d " % self._size(names[index])

    def _size(self, file: bytes) -> int:
        try:
            return os.stat(os.path.join(os.fsencode(self.folder), file)).st_size
        except OSError:  # gone since the folder was listed: reading it will fail
            return -1


def _require_readable_kinds(folder: Path, unread: dict[str, str]) -> None:
    """Raise ValueError for a folder that would be no class, since its images are of kinds that are not read."""
    for name, example in unread.items():
        raise ValueError(
            f"data: {shown(name)} of {folder} would be no class: its pictures are of kinds that are not read, such as "
            f"{shown(example)}; convert them, or move the folder out of the data"
        )


def _warn_of_nesting(folder: Path, by_class: dict[str, list[str]]) -> None:
    """Warn of a single class with folders of images in it: these may be meant to be the classes, or the parts."""
    if len(by_class) != 1:
        return
    ((name, files),) = by_class.items()
    inner = sorted({file.split("/")[1] for file in files if file.count("/") > 1}, key=natural_key)
    if len(inner) > 1:
        names = ", ".join(map(shown, inner[:3])) + (", ..." if len(inner) > 3 else "")
        log_once(
            logging.WARNING,
            f"data: the one class {shown(name)} of {folder} has {len(inner):,} folders of pictures ({names}); if these "
            f"are classes or parts, give --data {folder / name}",
        )


def _warn_of_links(folder: Path, links: list[str], classes: tuple[str, ...]) -> None:
    """Warn of classes that are links to other classes: their images have two labels."""
    names = {(folder / name).resolve(): name for name in classes if name not in links}
    for link in links:
        linked = names.setdefault((folder / link).resolve(), link) if link in classes else link
        if linked != link:
            log_once(
                logging.WARNING,
                f"data: the class {shown(link)} of {folder} is a link to the class {shown(linked)}: the same pictures "
                "have two labels; remove the link, if they should have one",
            )
