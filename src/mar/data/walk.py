"""Files below a folder, by one rule: hidden and system names are left out, links are followed, no pipes.

The order follows from the names alone, whatever the order of the file system. A folder that can't be read stops:
without its files, classes and their numbers might be others.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from mar.checkpoint.files import special_kind
from mar.data.accounts import Account, shown
from mar.data.paths import (
    IMAGE_SUFFIXES,
    PACKED_SUFFIXES,
    SHARD_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    UNREAD_IMAGES,
    is_system_name,
    natural_key,
)

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Errors of links that lead nowhere."""


@dataclass
class Entries:
    """Names in one folder, in natural order."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """Links to folders."""


class FolderWalk:
    """Lists files below `root`, and counts in `account` what it leaves out."""

    def __init__(self, root: Path, account: Account) -> None:
        self.root, self.account = root, account
        resolved = root.resolve()
        self._above = {key for folder in (resolved, *resolved.parents) if (key := _identity(folder)) is not None}

    def entries(self, relative: str = "") -> Entries:
        """Return the entries of a folder. Raises ValueError if it can't be read."""
        path, listed = self.root / relative, Entries()
        try:
            with os.scandir(path) as scanned:
                entries = sorted(scanned, key=lambda entry: natural_key(entry.name))
            for entry in entries:
                self._sort_in(entry, f"{relative}/{entry.name}" if relative else entry.name, listed)
        except OSError as error:
            raise ValueError(
                f"data: {shown(str(error.filename or path), 300)} can't be read ({error.strerror}): without it, "
                "classes and their numbers might be others; make it readable, or move it out of the data"
            ) from error
        return listed

    def _sort_in(self, entry: os.DirEntry[str], name: str, listed: Entries) -> None:
        is_link = entry.is_symlink()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:
            if not (is_link and error.errno in _GONE):
                raise
            is_folder = is_file = False
        if is_folder and is_system_name(entry.name):
            self.account.leave_out("hidden or system folders", name)
        elif is_folder:
            (listed.links if is_link else listed.folders).append(entry.name)
        elif entry.name.startswith("."):
            self.account.leave_out("hidden files", name)
        elif is_file:
            listed.files.append(entry.name)
        else:
            special = not is_link or special_kind(entry.path) is not None
            self.account.leave_out("pipes, sockets and devices" if special else "broken links", name)

    def walk(self, relative: str = "") -> list[str]:
        """Return the files below a folder, each real folder once.

        Files of a folder come before those of its subfolders.
        """
        files: list[str] = []
        seen, folders, links = set(self._above), [relative], list[str]()
        if not relative and (identity := _identity(self.root)) is not None:
            seen.discard(identity)
        followed = False
        while folders or links:
            is_link = not folders
            followed = followed or is_link
            folder = links.pop(0) if is_link else folders.pop()  # links last: real folders keep their names
            identity = _identity(self.root / folder)
            if identity is None or identity in seen:
                self.account.leave_out("links to folders that are read already", folder)
                continue
            seen.add(identity)
            listed = self.entries(folder)
            before = f"{folder}/" if folder else ""
            files += [before + name for name in listed.files]
            folders += [before + name for name in reversed(listed.folders)]
            links += [before + name for name in listed.links]
        return sorted(files, key=_walk_key) if followed else files  # without links they are in this order


def split_images(files: list[str], account: Account) -> list[str]:
    """Return the image files; count the others in `account`."""
    images = []
    for name in files:
        if is_image_name(name):
            images.append(name)
        else:
            account.leave_out(reason_of(name), name)
    return images


def is_image_name(name: str) -> bool:
    """Tell by its suffix if a file is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def reason_of(name: str) -> str:
    """Return the reason to leave out a file that is no picture."""
    lower = name.lower()
    if lower.endswith(PACKED_SUFFIXES):
        return "packed archives, to be unpacked first"
    if os.path.splitext(lower)[1] in UNREAD_IMAGE_SUFFIXES:
        return UNREAD_IMAGES
    return "shards beside the pictures" if lower.endswith(SHARD_SUFFIXES) else "other files"


def _walk_key(path: str) -> list[tuple[bool, tuple[list[str | int], str]]]:
    *folders, name = path.split("/")
    return [*((True, natural_key(folder)) for folder in folders), (False, natural_key(name))]


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
