"""Atomic writing: a file is the old one or the new one."""

from __future__ import annotations

import io
import json
import os
import pickletools
import select
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mar.terminal import print_err


class CheckpointError(ValueError):
    """A file can't be read or written; says what to do."""


_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"
}  # fmt: skip


def special_kind(path: str | os.PathLike[str]) -> str | None:
    """Name what is no regular file: a pipe, a socket, a device. None for files, folders and where nothing is."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # opening it says why
        return None


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for a pipe, socket or device: opening or reading one may never end.

    Every path of a user's is checked before it is opened. A link to a regular file is one.
    """
    kind = special_kind(path)
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}, expected a regular file; copy its content to one")


PIPE_PATIENCE_S = 4.0
"""Seconds without a byte, after which a pipe is spoken of."""
MAX_PIPED_BYTES = 2**28


def read_file_or_pipe(path: str | os.PathLike[str]) -> bytes:
    """Read a small file, or a pipe to its end, such as a shell's `<(...)`.

    A line on stderr says that a pipe is waited for. Raises CheckpointError for a FIFO that nothing writes to, and for
    sockets and devices.
    """
    if special_kind(path) != "a pipe":
        check_regular(path)
        return Path(path).read_bytes()
    name = os.fspath(path)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise CheckpointError(f"{name} is a pipe, which only one process can read; give a regular file to several")
    has_writer = not os.path.exists(os.path.realpath(path))  # a pipe without a name of its own
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else opening waits for a writer
    try:
        return _read_pipe(handle, name, has_writer)
    finally:
        os.close(handle)


def _read_pipe(handle: int, name: str, has_writer: bool) -> bytes:
    data, spoken = bytearray(), False
    readable = select.poll()
    readable.register(handle, select.POLLIN)
    while True:
        if not readable.poll(1000 * PIPE_PATIENCE_S):
            if not has_writer and not data:
                raise CheckpointError(f"{name} is a pipe that nothing was written to in {PIPE_PATIENCE_S:g} seconds")
            if not spoken:
                print_err(f"mar: waiting for the end of the pipe {name}")
            spoken = True
            continue
        part = os.read(handle, 2**16)
        if not part:
            return bytes(data)
        data += part
        if len(data) > MAX_PIPED_BYTES:
            raise CheckpointError(f"{name} gave more than {size_text(MAX_PIPED_BYTES)}, expected a list of lines")


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
