"""Writing files so that a full disk, a signal or a crash leaves either the old ones or the new ones, never a half."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


class CheckpointError(ValueError):
    """A file of weights or a run's state that can't be read or written: one line that says why and what to do."""


def size_text(size: int) -> str:
    """Bytes for people: `12.3 MiB`."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def require_room(path: Path, needed: int) -> None:
    """Raises CheckpointError where the disk that `path` is to be written to has fewer than `needed` bytes free."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{path}: {size_text(needed)} are needed, but only {size_text(free)} are free on its disk; "
            "make room or write somewhere else"
        )


def cannot_write(path: Path, needed: int, error: OSError) -> CheckpointError:
    """What to raise when writing `needed` bytes to `path` ended in `error`."""
    why = error.strerror or str(error)
    return CheckpointError(f"can't write {path} ({size_text(needed)} needed): {why}; nothing was left behind")


def write_atomically(path: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Has `write` make a temporary file beside `path`, and renames it there once it is whole and on the disk.

    Whatever goes wrong, `path` is what it was before and the temporary file is gone. Raises CheckpointError where the
    disk refuses; `needed` (bytes) is checked before and named in the message.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_room(path.parent, needed)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        flush(temporary)
        # mkstemp makes files that only their owner reads; a new file is to have the usual rights
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise cannot_write(path, needed, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a small text file."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
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
