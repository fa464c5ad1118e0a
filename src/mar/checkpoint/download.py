"""The official files, and how to tell that a file is the one it should be.

The SHA-256 of a file that has none pinned is recorded in `hashes.json` beside it on first use, and later ones have to
agree with that.

Fetching the official files: resumed where it stopped, checked before it counts as done.

While a file is on its way, `NAME.part` holds what came so far and `NAME.part.json` which version of the file that is
(ETag or date), so that a later attempt goes on only if the server still has the same one (If-Range, RFC 9110, 13.1.5).
A file under its own name is complete and has been checked (`mar.checkpoint.download`).
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

MIB = 2**20
TOLERANCE = 0.01
"""How far a size may lie from the approximate one, as a fraction."""
HASHES = "hashes.json"


class DownloadError(ValueError):
    """A file that could not be had, or is not the one expected. The message is one line for people."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the web and what is known of it."""

    name: str
    """What it is called on disk."""
    url: str
    mebibytes: float | None = None
    """Its approximate size in MiB."""
    sha256: str | None = None
    """In hexadecimal, where it is known beforehand."""


_SHARE = "https://www.dropbox.com/scl/fi"
# dl=1 asks for the file itself: with the dl=0 of the published links a browser gets a page around it.
OFFICIAL: dict[str, RemoteFile] = {
    "kl16": RemoteFile(
        "kl16.ckpt", f"{_SHARE}/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1", 254
    ),
    "mar-base": RemoteFile(
        "mar-base.pth", f"{_SHARE}/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1", 1587
    ),
    "mar-large": RemoteFile(
        "mar-large.pth",
        f"{_SHARE}/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1",
        3650,
    ),
    "mar-huge": RemoteFile(
        "mar-huge.pth", f"{_SHARE}/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1", 7191
    ),
}
"""The authors' files: the KL-16 tokenizer and the three models, as they published them."""


def check_announcement(remote: RemoteFile, kind: str, total: int | None) -> None:
    """Before the first byte: neither a page nor another size than the file's."""
    if kind == "text/html":
        raise _page(remote)
    if total is not None:
        _check_size(total, remote, "nothing was kept")


def _check_size(size: int, remote: RemoteFile, remedy: str) -> None:
    expected = remote.mebibytes
    if expected is not None and abs(size / MIB - expected) > TOLERANCE * expected:
        raise DownloadError(f"{remote.name} has {size / MIB:,.1f} MiB, expected about {expected:,.0f} MiB: {remedy}")


def check_beginning(first: bytes, remote: RemoteFile, remedy: str) -> None:
    if first.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise _page(remote)
    if _is_torch(remote) and not first.startswith(b"PK\x03\x04"):
        raise DownloadError(
            f"{remote.name} does not begin like a file of torch.save (a zip archive), but with {first[:8]!r}: {remedy}"
        )


def _is_torch(remote: RemoteFile) -> bool:
    return remote.name.endswith((".pth", ".ckpt", ".pt"))


def _page(remote: RemoteFile) -> DownloadError:
    return DownloadError(
        f"the server sent a web page instead of {remote.name}: open {remote.url} in a browser to see what it says"
    )


def check_file(path: Path, remote: RemoteFile, remedy: str) -> None:
    """Whether `path` holds `remote`: by size, form and SHA-256, which is recorded if nobody knows it yet."""
    _check_size(path.stat().st_size, remote, remedy)
    with path.open("rb") as file:
        check_beginning(file.read(64), remote, remedy)
    if _is_torch(remote) and not zipfile.is_zipfile(path):
        raise DownloadError(f"{remote.name} is cut off (a zip archive without its directory): {remedy}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if remote.sha256 is not None:
        if found != remote.sha256.lower():
            raise DownloadError(f"{remote.name} has the SHA-256 {found}, expected {remote.sha256}: {remedy}")
        return
    recorded = _record(path.parent / HASHES, remote.name, found)
    if found != recorded:
        raise DownloadError(
            f"{remote.name} has the SHA-256 {found}, but {path.parent / HASHES} recorded {recorded} when it was first "
            f"here: {remedy}; if the new file is the right one, remove its line there"
        )


def _record(path: Path, name: str, sha256: str) -> str:
    """The hash that `path` knows for `name`, which is `sha256` if it knew none."""
    with file_lock(path.with_name(f".{path.name}.lock")):
        try:
            hashes = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except ValueError as error:
            raise DownloadError(f"{path} is not JSON any more: mend or remove it") from error
        if not isinstance(hashes, dict):
            raise DownloadError(
                f"{path} holds a {type(hashes).__name__} instead of names and hashes: mend or remove it"
            )
        if name not in hashes:
            hashes[name] = sha256
            aside = path.with_name(f"{path.name}.new")
            aside.write_text(json.dumps(hashes, indent=2, sort_keys=True) + "\n", "utf-8")
            os.replace(aside, path)
        return str(hashes[name])


@contextmanager
def file_lock(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`; if another process has it, raise DownloadError(busy), or wait without `busy`."""
    with path.open("ab") as lock:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError as error:
                raise DownloadError(busy) from error
            except OSError:
                pass  # some network file systems know no locks: then two at once are the user's affair
        yield


__all__ = ["OFFICIAL", "DownloadError", "Progress", "RemoteFile", "fetch", "home", "progress_bar"]

CHUNK = 2**18
HEADROOM = 64 * MIB
"""What has to stay free on the disk, in bytes."""
ADVANCE = MIB
"""An attempt that got this many bytes further than all before it is no failure, even if the connection dropped."""
Progress = Callable[[int, int | None], None]
"""Called with the bytes there so far and, where the server tells, the bytes there will be."""


class _Dropped(Exception):
    """This attempt failed, but another one may do better."""


def home() -> Path:
    """Where downloads go by default: the environment's MAR_HOME, else ~/.cache/mar."""
    return Path(os.environ.get("MAR_HOME") or "~/.cache/mar").expanduser()


def fetch(
    remote: RemoteFile,
    folder: Path | str | None = None,
    *,
    progress: Progress | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    wait: Callable[[float], object] = time.sleep,
    opener: urllib.request.OpenerDirector | None = None,
) -> Path:
    """Have `remote` in `folder` (default: `home()`), complete and checked, and say where it is.

    A file that is there already is checked and returned. An interrupted download, Ctrl-C included, is continued.
    `attempts` bounds the failures in a row, `timeout` is the longest silence of the server in seconds, `wait` is
    called with the seconds to wait between attempts, and `opener` opens the address (default: urllib's, with the
    environment's proxies). Raises DownloadError, or OSError where the folder cannot be written.
    """
    folder = home() if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / remote.name
    with file_lock(
        folder / f".{remote.name}.lock", f"{remote.name} is being downloaded to {folder} by another process"
    ):
        if target.exists():
            check_file(target, remote, f"remove {target} and run again to fetch it anew")
            return target
        part = _Part(remote, target.with_name(f"{remote.name}.part"))
        if not part.complete():
            _persist(part, progress, attempts, wait, timeout, opener or urllib.request.build_opener())
        try:
            check_file(part.path, remote, "it was not kept")
        except DownloadError:
            part.discard()
            raise
        os.replace(part.path, target)
        part.discard()
    return target


@contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """A bar in the terminal with size, speed and time left, to be given to `fetch` as its `progress`."""
    from rich import progress as rich

    columns = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    with rich.Progress("{task.description}", rich.BarColumn(), *columns) as bars:
        task = bars.add_task(name, total=None)
        last: int | None = None

        def show(received: int, total: int | None) -> None:
            nonlocal last
            if last is None or received < last:  # what was there before must not count as speed
                bars.reset(task, total=total, completed=received)
            else:
                bars.update(task, total=total, completed=received)
            last = received

        yield show


class _Part:
    """What is there of a file so far, and the note about which version of it that is."""

    def __init__(self, remote: RemoteFile, path: Path) -> None:
        self.remote = remote
        self.path = path
        self.note_path = path.with_name(path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def note(self) -> dict[str, Any]:
        """url, validator (for If-Range) and total of the version here; empty if that is not known."""
        try:
            note = json.loads(self.note_path.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("url") == self.remote.url else {}

    def complete(self) -> bool:
        return self.size() > 0 and self.note().get("total") == self.size()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)

    def headers(self) -> dict[str, str]:
        headers = {"User-Agent": "mar", "Accept-Encoding": "identity"}
        validator = self.note().get("validator")
        if validator and self.size() > 0:
            headers |= {"Range": f"bytes={self.size()}-", "If-Range": validator}
        return headers

    def begin(self, response: http.client.HTTPResponse) -> int | None:
        """Make ready for the body of `response`, at the part's end or anew, and return the whole file's size."""
        validator = _validator(response)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            note = self.note()
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            same = validator in (None, note.get("validator"))
            if same and span and int(span[1]) == self.size() and int(span[2]) == note.get("total", int(span[2])):
                return int(span[2])
            self.discard()
            raise _Dropped("the server continued with something else than what was asked for")
        self.discard()
        total = _length(response)
        note = {"url": self.remote.url, "validator": validator} | ({} if total is None else {"total": total})
        self.note_path.write_text(json.dumps(note), "utf-8")
        return total


def _length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    return int(length) if length and length.isdecimal() else None


def _validator(response: http.client.HTTPResponse) -> str | None:
    tag = response.headers.get("ETag")
    # A weak tag promises the same meaning, not the same bytes, and may not stand in If-Range.
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _persist(
    part: _Part,
    progress: Progress | None,
    attempts: int,
    wait: Callable[[float], object],
    timeout: float,
    opener: urllib.request.OpenerDirector,
) -> None:
    """Try until everything is there; only failures that bring it no further count."""
    failures, furthest = 0, part.size()
    while True:
        try:
            return _attempt(part, progress, timeout, opener)
        except _Dropped as dropped:
            failures = 1 if part.size() >= furthest + ADVANCE else failures + 1
            furthest = max(furthest, part.size())
            if failures >= attempts:
                kept = f"; the first {part.size() / MIB:.1f} MiB are kept, run again to go on" if part.size() else ""
                raise DownloadError(
                    f"could not download {part.remote.name}: {dropped} ({failures} attempts without success{kept})"
                ) from dropped
            wait(min(2.0 ** (failures - 1), 60.0))


def _attempt(part: _Part, progress: Progress | None, timeout: float, opener: urllib.request.OpenerDirector) -> None:
    with _open(part, timeout, opener) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # before what is there is given up for it
            check_announcement(part.remote, response.headers.get_content_type(), _length(response))
        total = part.begin(response)
        _check_room(part, total)
        _copy(part, response, total, progress)
    if total is not None and part.size() > total:
        part.discard()
        raise _Dropped("the server sent more than it had announced")
    if total is not None and part.size() < total:
        raise _Dropped(f"the connection ended after {part.size():,} of {total:,} bytes")


def _open(
    part: _Part, timeout: float, opener: urllib.request.OpenerDirector
) -> AbstractContextManager[http.client.HTTPResponse]:
    request = urllib.request.Request(part.remote.url, headers=part.headers())
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            answer = f"the server answered {error.code} {error.reason}"
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.discard()  # the file there is shorter than what we have: not the same one
                raise _Dropped(answer) from error
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _Dropped(answer) from error
            raise DownloadError(f"could not download {part.remote.name}: {answer} for {part.remote.url}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(_reason(error)) from error
    return response


def _copy(part: _Part, response: http.client.HTTPResponse, total: int | None, progress: Progress | None) -> None:
    received = part.size()
    try:
        with part.path.open("ab") as file:
            while True:
                if progress:
                    progress(received, total)
                chunk = _read(response)
                if not chunk:
                    break
                if received == 0:
                    check_beginning(chunk, part.remote, "nothing was kept")
                file.write(chunk)
                received += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DownloadError(
            f"the disk of {part.path.parent} is full: free some space and run again to go on"
        ) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(_reason(error)) from error


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return f"{reason}" or type(error).__name__


def _check_room(part: _Part, total: int | None) -> None:
    whole = total if total is not None else int((part.remote.mebibytes or 0) * MIB)
    missing, free = whole - part.size(), shutil.disk_usage(part.path.parent).free
    if missing + HEADROOM > free:
        raise DownloadError(
            f"{part.remote.name} needs {(missing + HEADROOM) / MIB:,.0f} MiB on the disk of {part.path.parent}, "
            f"where {free / MIB:,.0f} MiB are free: make room or choose another folder"
        )
