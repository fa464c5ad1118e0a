"""The official files, and how to tell that a file is the one it should be.

The SHA-256 of a file that has none pinned is recorded in `hashes.json` beside it on first use, and later ones have to
agree with that.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


def check(path: Path, remote: RemoteFile, remedy: str) -> None:
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
    with alone(path.with_name(f".{path.name}.lock")):
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
def alone(path: Path, busy: str | None = None) -> Iterator[None]:
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
