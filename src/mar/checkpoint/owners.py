"""Temporary folders that name their process: a living one keeps them, the next command clears those of a dead one.

Each file is written in a folder `.mar-tmp-...` first. Its name tells the process; a library's own temporaries are in
there too. What a kill leaves, `clear_leftovers` removes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK = ".mar-lock"
"""Name of the lock of a folder (`mar.checkpoint.locks`); that of a file goes on with a hash of its name."""
SUBFOLDERS = ("tokenizer", "latents", "samples")
"""Folders in that of a run, which are cleared with it."""
STRANGE_AGE_S = 24 * 3600.0
"""A temporary of another machine, or of an earlier version, is cleared if nothing in it has changed for so long."""
_RESTARTED_AGE_S = 600.0
"""The same for one of a machine of this name, likely this one before its last start."""
_SETTLED_S = 60.0
"""One of another container is left alone for so long: its process may not have locked it yet."""

_NAME = re.compile(r"\.mar-tmp-([0-9a-f]{8})-([0-9a-f]{8})-(\d{1,10})-(\d{1,20})-[0-9a-f]{8}")
_LOCK_NAME = re.compile(re.escape(LOCK) + "(-[0-9a-f]{8})?")
_OLD_NAME = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_OLD_HEADER = b'{"__metadata__":{"mar":'
"""Beginning of the temporaries that earlier versions left of weights."""

_cleared: set[tuple[int, str]] = set()
"""Process ids, and folders that each has cleared before its first temporary there."""
_handles: set[int] = set()
"""Open files whose lock (flock) is this process's, and not its children's."""


# ---- processes


@dataclass(frozen=True)
class Owner:
    """A process that others can ask for."""

    kernel: str
    """Hash of the machine's last start."""
    space: str
    """Hash of host and pid namespace; a container has its own."""
    pid: int
    start: int
    """Clock ticks from the machine's start to the process's; 0: unknown."""

    def is_same_machine(self) -> bool:
        """Tell if the process's id can be asked for here."""
        here = _machine()
        return (self.kernel, self.space) == here

    def runs(self, path: Path) -> bool | None:
        """Tell if the process runs; None: nobody can tell here.

        Args:
            path: a file or folder that it has locked (flock), where there are such locks.
        """
        if self.is_same_machine():
            return _runs(self.pid, self.start)
        return is_flocked(path) if self.kernel == _machine()[0] else None


def this_process() -> Owner:
    """Describe this process."""
    return Owner(*_machine(), os.getpid(), max(_start_ticks(os.getpid()) or 0, 0))


@functools.cache
def _machine() -> tuple[str, str]:
    """Return hashes of the machine's last start, and of host and pid namespace."""
    host = socket.gethostname()
    boot = host
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    with suppress(OSError):
        host += os.readlink("/proc/self/ns/pid")
    return _hash(boot), _hash(host)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _start_ticks(pid: int) -> int | None:
    """Return when a process started; -1: only its exit code is left of it, None: unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if state in b"ZX" else int(fields[18])
    except (OSError, ValueError, LookupError):
        return None


def _runs(pid: int, start: int) -> bool:
    """Tell if a process of this machine runs; another one with its id does not count."""
    if sys.platform == "win32":
        return _runs_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    ticks = _start_ticks(pid)
    return ticks is None or (ticks >= 0 and start in (0, ticks))


def _runs_on_windows(pid: int) -> bool:
    import ctypes

    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 (unknown to type checkers elsewhere)
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return False
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == 259  # STILL_ACTIVE


# ---- locks of the operating system: a kill ends them


def flock(handle: int) -> bool | None:
    """Try to lock an open file or folder.

    Returns False if another process has it, None where there are no such locks.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    _handles.add(handle)
    return True


def close(handle: int) -> None:
    """Close an open file, which ends its lock."""
    _handles.discard(handle)
    os.close(handle)


def is_flocked(path: Path) -> bool | None:
    """Tell if a process has locked a file or folder; None: unknown."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return None
    try:
        locked = flock(handle)
        return None if locked is None else not locked
    finally:
        close(handle)


def _close_in_child() -> None:
    """Leave locks to the parent, which a worker may outlive."""
    for handle in _handles:
        with suppress(OSError):
            os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


# ---- temporaries


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, and remove it. It is no other process's to remove."""
    key = (os.getpid(), os.path.abspath(parent))
    if key not in _cleared:
        _cleared.add(key)
        clear_leftovers(parent)
    owner = this_process()
    numbers = f"{owner.kernel}-{owner.space}-{owner.pid}-{owner.start}"
    folder = parent / f".mar-tmp-{numbers}-{secrets.token_hex(4)}"
    folder.mkdir()
    handle = _lock_folder(folder)
    try:
        yield folder
    finally:
        if os.getpid() == owner.pid:  # not in a child, which has a copy of this block
            shutil.rmtree(folder, ignore_errors=True)
            if handle is not None:
                close(handle)


def _lock_folder(folder: Path) -> int | None:
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    if flock(handle):
        return handle
    os.close(handle)
    return None


def is_ours(name: str) -> bool:
    """Tell the name of a temporary or lock."""
    return bool(_NAME.fullmatch(name) or _LOCK_NAME.fullmatch(name))


def clear_leftovers(folder: Path) -> None:
    """Remove what ended processes left in a folder, and a run's subfolders."""
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        try:
            with os.scandir(place) as scanned:
                entries = [entry for entry in scanned if entry.name.startswith((".mar-", ".tmp"))]
        except OSError:  # it is not there, or not ours to read
            continue
        for entry in entries:
            with suppress(OSError, ValueError):
                _clear(entry)


def _clear(entry: os.DirEntry[str]) -> None:
    path = Path(entry.path)
    if (name := _NAME.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False):
        owner = Owner(name[1], name[2], int(name[3]), int(name[4]))
        age = time.time() - _last_change(path)
        runs = owner.runs(path)
        if runs is None:
            runs = age < (_RESTARTED_AGE_S if owner.space == _machine()[1] else STRANGE_AGE_S)
        elif not owner.is_same_machine():
            runs = runs or age < _SETTLED_S
        if not runs:
            shutil.rmtree(path, ignore_errors=True)
    elif _LOCK_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
        from mar.checkpoint.locks import remove_stale

        remove_stale(path)
    elif _OLD_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
        with path.open("rb") as file:
            header = file.read(8 + len(_OLD_HEADER))[8:]
        if header == _OLD_HEADER and time.time() - entry.stat().st_mtime > STRANGE_AGE_S:
            path.unlink()


def _last_change(folder: Path) -> float:
    """Return when something in a folder changed last, in seconds since 1970."""
    last = folder.stat().st_mtime
    for parent, _, files in os.walk(folder):
        for path in (parent, *(os.path.join(parent, file) for file in files)):
            with suppress(OSError):
                last = max(last, os.stat(path).st_mtime)
    return last


def name_of_lock(path: Path, *, is_file: bool) -> Path:
    """Return where the lock of an output is: in its folder, or beside the file."""
    return path.with_name(f"{LOCK}-{_hash(path.name)}") if is_file else path / LOCK
