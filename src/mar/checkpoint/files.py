"""Atomic writing: a file is the old one or the new one."""

from __future__ import annotations

import io
import json
import os
import pickletools
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A file can't be read or written; says what to do."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of a file. ValueError for anything else, however deep or long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_PLACED = ("PUT", "BINPUT", "LONG_BINPUT")


def check_pickle(data: bytes) -> None:
    """Raise ValueError for a truncated pickle, or too large a table."""
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        place = int(argument or 0) if opcode.name in _PLACED else 0
        if place > len(data):  # a table of so many places would be made
            raise ValueError(f"it numbers {place:,} objects in {len(data):,} bytes")


def is_zip(path: Path) -> bool:
    """Return whether a file ends like a zip."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of several disks, as its damaged end says
        return False


def size_text(size: int) -> str:
    """Format bytes for people: `12.3 MiB`."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def require_room(path: Path, needed: int) -> None:
    """Raise CheckpointError if `path`'s disk has fewer than `needed` bytes free."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{path}: {size_text(needed)} are needed, but only {size_text(free)} are free on its disk; "
            "make room or write somewhere else"
        )


def write_error(path: Path, needed: int, error: OSError) -> CheckpointError:
    """Return the CheckpointError for an `error` on writing `needed` bytes to `path`."""
    why = error.strerror or str(error)
    return CheckpointError(f"can't write {path} ({size_text(needed)} needed): {why}; nothing was left behind")


def write_atomically(path: Path, write: Callable[[Path], None], needed: int = 0, *, durable: bool = True) -> None:
    """Write a temporary file beside `path`, flush it, and rename it.

    Whatever goes wrong, `path` is unchanged and the temporary file is gone. Raises CheckpointError if the disk refuses.

    Args:
        path: the file.
        write: writes the temporary file.
        needed: bytes, checked before and named in the message.
        durable: wait until the file is on the disk; else a power cut may lose it.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_room(path.parent, needed)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        if durable:
            flush(temporary)
        # mkstemp gives its owner alone the right to read; a new file has the usual rights
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        if durable:
            flush(path.parent)
    except OSError as error:
        raise write_error(path, needed, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small text file by `write_atomically`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, durable=durable)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list, is on the disk."""
    if os.name == "nt" and path.is_dir():  # folders can't be opened there
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
