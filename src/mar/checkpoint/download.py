"""Fetching the official files: resumed where it stopped, checked before it counts as done.

While a file is on its way, `NAME.part` holds what came so far and `NAME.part.json` which version of the file that is
(ETag or date), so that a later attempt goes on only if the server still has the same one (If-Range, RFC 9110, 13.1.5).
A file under its own name is complete and has been checked (`mar.checkpoint.remote`).
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from mar.checkpoint.remote import (
    MIB,
    OFFICIAL,
    DownloadError,
    RemoteFile,
    alone,
    check,
    check_announcement,
    check_beginning,
)

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
    with alone(folder / f".{remote.name}.lock", f"{remote.name} is being downloaded to {folder} by another process"):
        if target.exists():
            check(target, remote, f"remove {target} and run again to fetch it anew")
            return target
        part = _Part(remote, target.with_name(f"{remote.name}.part"))
        if not part.complete():
            _persist(part, progress, attempts, wait, timeout, opener or urllib.request.build_opener())
        try:
            check(part.path, remote, "it was not kept")
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
