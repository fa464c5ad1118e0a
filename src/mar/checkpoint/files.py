"""The way to write files: each is the old one or the new one, and a kill leaves nothing for good.

A file is written in a temporary folder beside it (`mar.checkpoint.owners`), flushed, and renamed.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickletools
import select
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mar.checkpoint.owners import temporary_folder
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
    """Read a small file, or a pipe to its end.

    A shell's `<(...)` is a pipe. A line on stderr says that a pipe is waited for.
    Raises CheckpointError for a FIFO that nothing writes to, and for
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


def newer_format(path: Path, written: str, reads: str) -> CheckpointError:
    """Return the error for a file of a later version of mar."""
    from mar import __version__

    return CheckpointError(
        f"{path} was made by a newer mar: it is of format {written}, this is mar {__version__} and reads {reads}; "
        "upgrade mar"
    )


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
    """Return the CheckpointError for an `error` on writing to `path`.

    `needed` bytes; 0: unknown.
    """
    why = error.strerror or str(error)
    size = f" ({size_text(needed)} needed)" if needed else ""
    return CheckpointError(f"can't write {path}{size}: {why}; nothing was left behind")


def write_atomically(
    path: Path,
    write: Callable[[Path], None],
    needed: int = 0,
    *,
    durable: bool = True,
    temporary_in: Path | None = None,
) -> None:
    """Write a temporary file, flush it, and rename it.

    Whatever goes wrong, `path` is unchanged and the temporary file is gone. Raises CheckpointError if the disk refuses.

    Args:
        path: the file.
        write: writes the temporary file.
        needed: bytes, checked before and named in the message.
        durable: wait until the file is on the disk; else a power cut may lose it.
        temporary_in: folder for the temporary, if it is on the same disk; by default the file's.
    """
    try:
        with new_folders(path.parent):
            require_room(path.parent, needed)
            elsewhere = temporary_in is not None and temporary_in.stat().st_dev == path.parent.stat().st_dev
            with temporary_folder(temporary_in if temporary_in and elsewhere else path.parent) as folder:
                temporary = folder / path.name
                write(temporary)
                _place({temporary: path}, folder, durable)
    except OSError as error:
        raise write_error(path, needed, error) from error


def write_together(folder: Path, write: Callable[[Path], None], last: str, needed: int = 0) -> None:
    """Write several files of a folder: all are on the disk before the first gets its name.

    Raises CheckpointError if the disk refuses; then those that are there stay.

    Args:
        folder: of the files.
        write: writes them to a temporary folder.
        last: name of the file that is taken for all of them: if it changes, it goes first and comes last.
        needed: bytes, checked before and named in the message.
    """
    try:
        with new_folders(folder):
            require_room(folder, needed)
            with temporary_folder(folder) as temporary:
                write(temporary)
                files = sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name))
                _place(
                    {file: folder / file.name for file in files},
                    temporary,
                    durable=True,
                    gone=None if _same_bytes(temporary / last, folder / last) else folder / last,
                )
    except OSError as error:
        raise write_error(folder, needed, error) from error


def write_bytes(contents: Mapping[Path, bytes], temporary_in: Path) -> None:
    """Write files, each whole or not at all; all are on the disk before the first gets its name.

    Raises CheckpointError if the disk refuses.

    Args:
        contents: by path.
        temporary_in: folder for the temporaries, on their disk: one that the next command will look into.
    """
    needed, path = sum(map(len, contents.values())), temporary_in
    try:
        with new_folders(temporary_in):
            require_room(temporary_in, needed)
            with temporary_folder(temporary_in) as folder:
                temporaries = {}
                for number, (path, data) in enumerate(contents.items()):
                    temporaries[folder / f"{number}-{path.name[:100]}"] = path
                    (folder / f"{number}-{path.name[:100]}").write_bytes(data)
                _place(temporaries, folder, durable=True)
    except OSError as error:
        raise write_error(path, needed, error) from error


def _same_bytes(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()


def _place(targets: Mapping[Path, Path], temporary: Path, durable: bool, gone: Path | None = None) -> None:
    """Flush files and rename them to their targets, with the usual rights of new ones. `gone` is removed between."""
    rights = stat.S_IMODE(temporary.stat().st_mode) & 0o666
    for file in targets:
        if durable:
            flush(file)
        file.chmod(rights)  # some writers give their owner alone the right to read
    if gone is not None:
        gone.unlink(missing_ok=True)
    for file, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    for folder in dict.fromkeys(target.parent for target in targets.values()) if durable else ():
        flush(folder)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small text file by `write_atomically`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, durable=durable)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write a file of safetensors, which is to be a temporary one. Raises OSError if the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:  # what its Rust code makes of a full disk
        raise OSError(str(error)) from error


def tensor_bytes(tensors: Mapping[str, Any]) -> int:
    """Return the size of tensors in bytes."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


@contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; at the end, remove those of them that are empty."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in made:
            with suppress(OSError):  # not empty, or not made
                place.rmdir()


def check_writable(path: Path, *, is_file: bool) -> None:
    """Raise CheckpointError if an output can't be written. Nothing is left behind.

    Args:
        path: the output, which may be missing, as may folders above it.
        is_file: it is a file, not a folder.
    """
    folder = path.parent if is_file else path
    expected = stat.S_ISREG if is_file else stat.S_ISDIR
    try:
        if path.exists() and not expected(path.stat().st_mode):
            raise CheckpointError(f"{path} is no {'regular file' if is_file else 'folder'}; take another name for it")
        with new_folders(folder), temporary_folder(folder) as temporary:
            (temporary / (path.name if is_file else "file")).write_bytes(bytes(4096))
    except OSError as error:
        raise write_error(path, 0, error) from error


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list, is on the disk."""
    if os.name == "nt" and path.is_dir():  # folders can't be opened there
        return
    is_folder = path.is_dir()
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems can't flush folders
            raise
    finally:
        os.close(handle)
