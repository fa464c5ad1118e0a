"""Locks of outputs: one command at a time writes a run, a cache, or a folder of pictures.

A lock is a small file in the folder: which process, on which host, since when. That of a process that was killed is
taken over. A process of this machine is asked for by its id and start. One in another container is known by the
file's flock. On another machine of a shared file system it shows by the file's time, which its process renews.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from mar import distributed
from mar.checkpoint import owners
from mar.checkpoint.files import new_folders, write_error
from mar.checkpoint.owners import Owner, name_of_lock, temporary_folder, this_process
from mar.terminal import printable

logger = logging.getLogger(__name__)
BEAT_S = 20.0
"""Seconds between renewals of a lock's time."""
WATCH_S = 75.0
"""Seconds for which a lock of another machine is watched: file systems show new times late."""
_TRIES = 20
_BEGINNING = '{\n "kernel": "'
_NO_LOCK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""Errors where nobody can write the output: the command itself says so, if it has to write."""
_mine: dict[str, int] = {}
"""Locks that this process holds, by path, and the thread of each."""


class InUse(ValueError):
    """Another process writes this output."""


@contextmanager
def exclusive(out: Path, *, is_file: bool = False) -> Iterator[None]:
    """Hold the lock of an output: rank 0 does, for all ranks of a run.

    Raises InUse on rank 0 if another process has it. A folder that can't be written needs no lock.

    Args:
        out: the folder, which may be missing, or the file.
        is_file: it is a file.
    """
    with ExitStack() as stack:
        with distributed.collective_errors():
            if distributed.rank() == 0:
                stack.enter_context(_exclusive(out, is_file))
        yield


@contextmanager
def _exclusive(out: Path, is_file: bool) -> Iterator[None]:
    path = name_of_lock(Path(os.path.realpath(out)), is_file=is_file)
    if _mine.get(str(path)) == threading.get_ident():  # a command within a command
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(new_folders(path.parent))
            handle, text = _acquire(path, out)
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise write_error(out, 0, error) from error
            handle = None
        if handle is None:
            yield
            return
        _mine[str(path)], pid = threading.get_ident(), os.getpid()
        ended = threading.Event()
        threading.Thread(target=_renew, args=(path, ended), name="mar-lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            del _mine[str(path)]
            if os.getpid() == pid:  # not in a child, which has a copy of this block
                _release(path, handle, text)


def _release(path: Path, handle: int, text: str) -> None:
    """Remove a lock's file, unless it was taken over."""
    if os.name == "nt":  # where nobody can remove an open file
        owners.close(handle)
    with suppress(OSError):
        if path.read_text(encoding="utf-8") == text:
            path.unlink()
    if os.name != "nt":
        owners.close(handle)


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):
            os.utime(path)


def _acquire(path: Path, out: Path) -> tuple[int, str]:
    """Make the lock's file; returns it open, and its content."""
    note = {
        **asdict(this_process()),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": " ".join(["mar", *sys.argv[1:]])[:200],
        "token": secrets.token_hex(8),
    }
    text = json.dumps(note, indent=1) + "\n"
    while True:
        handle = _create(path, text)
        if handle is not None:
            return handle, text
        if not remove_stale(path) and (reason := _reason_to_wait(path)) is not None:
            raise InUse(f"{out} is in use by {reason}; wait for its end, or take another --out")


def _create(path: Path, text: str) -> int | None:
    """Make a lock's file, whole and locked; None: there is one."""
    with temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.write_text(text, encoding="utf-8")
        handle = os.open(temporary, os.O_RDWR)
        owners.flock(handle)
        try:
            os.link(temporary, path)
            return handle
        except FileExistsError:
            owners.close(handle)
            return None
        except OSError:  # a file system without links
            owners.close(handle)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    owners.flock(handle)
    os.write(handle, text.encode())
    return handle


# ---- the lock of another process


def remove_stale(path: Path) -> bool:
    """Remove a lock whose process has ended. Returns False if it runs, or may run."""
    owner, text = _read(path)
    if os.name == "nt":  # where nobody can remove an open file
        if _runs(owner, path, None) is False:
            path.unlink(missing_ok=True)
        return not path.exists()
    try:
        handle = _open(path)
    except FileNotFoundError:
        return True
    try:
        if _runs(owner, path, owners.flock(handle)) is not False:
            return False
        # of two processes that are here, one has the lock of the old file: neither removes a new one
        for _ in range(_TRIES):
            if owners.flock(handle) is not False:
                break
            time.sleep(0.05)
        if os.path.samestat(os.fstat(handle), path.stat()) and _read(path)[1] == text:
            path.unlink()
        return True
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    finally:
        owners.close(handle)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except PermissionError:  # another user's
        return os.open(path, os.O_RDONLY)


def _runs(owner: Owner | None, path: Path, locked: bool | None) -> bool | None:
    """Tell if a lock's process runs, as `Owner.runs`. `locked`: this process could lock the file."""
    if owner is None:  # it is being written, or was cut short; else it is somebody's own file
        return False if _age(path) > 2 and _is_beginning(_read(path)[1]) else None
    if owner == this_process():
        return os.path.realpath(path) in _mine  # else it is of what this process was before it became another program
    if owner.is_same_machine():
        return owner.runs(path)
    if owner.kernel == this_process().kernel and locked is not None:
        return not locked
    return None


def _reason_to_wait(path: Path) -> str | None:
    """Say which process holds a lock; None: it has ended, and its lock is removed."""
    owner, text = _read(path)
    if owner is None:
        if text and not _is_beginning(text):
            raise InUse(f"{path} is there, but is no lock of mar's; move it away, or take another --out")
        time.sleep(0.05)
        return None
    note: dict[str, Any] = json.loads(text)
    who = f"process {owner.pid} on {note.get('host')} since {note.get('since')} ({note.get('command')})"
    who = printable(who)[:300]
    held = owners.is_flocked(path)
    runs = _runs(owner, path, None if held is None else not held)
    if runs:
        return who
    if runs is False:
        return None if remove_stale(path) else f"{who}, which has ended, but {path} can't be removed: remove it"
    if _is_renewed(path, text, who):
        return f"{who}; if that has ended for certain, remove {path}"
    with suppress(FileNotFoundError):
        if _read(path)[1] == text:
            path.unlink()
            logger.warning("%s: %s has ended; going on in its place", path.parent, who)
    return None


def _is_beginning(text: str) -> bool:
    """Tell if a file of ours may begin so, or be cut short so."""
    return text.startswith(_BEGINNING) or _BEGINNING.startswith(text)


def _is_renewed(path: Path, text: str, who: str) -> bool:
    """Watch a lock of another machine: its process renews the file's time."""
    logger.warning("%s: waiting for up to %.0f seconds to see if %s still runs", path.parent, WATCH_S, who)
    first, end = _modified(path), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_S / 10))
        if _modified(path) != first or _read(path)[1] != text:
            return _read(path)[1] == text
    return False


def _modified(path: Path) -> float | None:
    """Return a file's time, as its server has it: opening asks for it anew."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _age(path: Path) -> float:
    modified = _modified(path)
    return 0.0 if modified is None else time.time() - modified


def _read(path: Path) -> tuple[Owner | None, str]:
    """Read who has a lock; None: the file is gone, or says nothing."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        note = json.loads(text)
        return Owner(str(note["kernel"]), str(note["space"]), int(note["pid"]), int(note["start"])), text
    except (OSError, ValueError, LookupError, TypeError):
        return None, text
