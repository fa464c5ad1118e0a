"""Download files: resumed where they stopped, checked before they are renamed.

`NAME.part` holds a file's bytes so far. `NAME.part.json` holds their version (ETag or date), and how many are known to
be on the disk. A later attempt goes on from there, if the server still has that version (If-Range, RFC 9110, 13.1.5).
Servers can be wrong. A file of several answers is fetched once more from the start, if it fails its checks.
One process at a time has the part, by a lock on it. Others download to a temporary file of their own, and each renames
its file when it is done.
A source that fails is followed by the next one, from the start. The Hub lists sizes and SHA-256s, which are compared if
the records have none.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import os
import queue
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from mar.checkpoint.files import flush, is_zip, new_folders
from mar.checkpoint.owners import clear_leftovers, temporary_folder
from mar.published import MIB, PUBLISHED, TOKENIZERS, PublishedFile, files_of
from mar.terminal import printable, unescaped

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

CHUNK = 2**18
TOLERANCE = 0.01
"""The largest difference from an approximate size, as a fraction."""
HEADROOM = 64 * MIB
"""Bytes that have to stay free on the disk."""
ADVANCE = MIB
"""An attempt does not count as a failure if it got so many bytes further than all before it."""
BEGINNING = 64
"""The first bytes, by which a file's format is recognized."""
SYNC_EVERY = 64 * MIB
"""Bytes between two waits for the disk: the most that a power failure costs."""
LEAST_SPEED = 1000.0
"""Bytes a second; an attempt that stays below it for as long as the server may be silent has failed."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes so far and, if the server tells, the bytes of the whole file."""


class DownloadError(ValueError):
    """A file could not be downloaded, or is not the expected one."""


class _AttemptFailed(Exception):
    """This attempt failed, but another one may succeed."""


class _DiskFailed(DownloadError):
    """The disk can't take the file, from whatever source."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the web, and what it has to be like."""

    name: str
    """Its name on the disk; `/` for one in a folder."""
    url: str
    """Its address; `hf://OWNER/NAME@REVISION/PATH` on the Hub."""
    mebibytes: float | None = None
    """Its approximate size in MiB."""
    sha256: str | None = None
    """In hexadecimal, if it is known."""
    size: int | None = None
    """In bytes, if it is known exactly."""
    others: tuple[str, ...] = ()
    """Further addresses of the same bytes, tried if the first one fails."""
    pattern: str | None = None
    """Regular expression of its name on the Hub, if its path may be another."""


def _remote(file: PublishedFile) -> RemoteFile:
    first, *others = file.sources
    return RemoteFile(
        file.name, first, file.approximate_mebibytes(), file.sha256, file.size, tuple(others), file.pattern
    )


OFFICIAL: dict[str, tuple[RemoteFile, ...]] = {
    name: tuple(map(_remote, files_of(name))) for name in (*TOKENIZERS, *PUBLISHED)
}
"""The authors' files of each tokenizer and model."""


def needed(name: str) -> list[RemoteFile]:
    """List the files of a model with its tokenizer."""
    tokenizer = [PUBLISHED[name].tokenizer] if name in PUBLISHED else []
    return [remote for each in (*tokenizer, name) for remote in OFFICIAL[each]]


def missing(name: str, folder: Path | None = None) -> list[RemoteFile]:
    """List the `needed` files that are not here.

    None is missing of a model that was converted.
    """
    folder = folder or home()
    if (folder / f"{name}.safetensors").is_file():
        return []
    return [remote for remote in needed(name) if not (folder / remote.name).is_file()]


def home() -> Path:
    """Return the default folder of downloads: the environment's MAR_HOME, else ~/.cache/mar."""
    try:
        return Path(os.environ.get("MAR_HOME") or "~/.cache/mar").expanduser()
    except RuntimeError:  # nobody's: no HOME, and a user without an entry; nothing is there, nor can be written
        return Path(os.devnull, ".cache", "mar")


def fetch(
    remote: RemoteFile,
    folder: Path | str | None = None,
    *,
    mirror: str | Path | None = None,
    progress: Progress | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    wait: Callable[[float], object] = time.sleep,
    opener: urllib.request.OpenerDirector | None = None,
) -> Path:
    """Download a file, if it is not there yet, and check it. Returns its path.

    An interrupted download, Ctrl-C included, is resumed. Raises DownloadError, or OSError if the folder can't be
    written.

    Args:
        remote: the file.
        folder: where to; None: `home()`.
        mirror: address or folder that has the file by its name; None: the environment's MAR_MIRROR, else none.
        progress: called with the bytes so far.
        attempts: the most failures in a row.
        timeout: the longest silence of the server, in seconds.
        wait: called with the seconds to wait between attempts.
        opener: opens the address; None: urllib's, with the environment's proxies.
    """
    folder = home() if folder is None else Path(folder)
    opener = opener or urllib.request.build_opener()
    target = folder / remote.name
    if target.exists():
        _check_file(target, remote, f"remove {target} and run again to fetch it anew")
        return target
    remote, copied = _from_mirror(remote, mirror or os.environ.get("MAR_MIRROR"))
    clear_leftovers(target.parent)
    with new_folders(target.parent), _open_part(remote, target.parent) as part:
        failures: list[DownloadError] = []
        for url in _sources(part):
            try:
                part.remote = _locate(remote, url, timeout, opener)
                _fetch_from(part, copied, progress, attempts, wait, timeout, opener)
                break
            except _DiskFailed:
                raise
            except DownloadError as error:
                failures.append(error)
        else:
            if len(failures) == 1:
                raise failures[0]
            raise DownloadError("; ".join(map(str, failures))) from failures[0]
        flush(part.path)
        os.replace(part.path, target)
        part.discard_note()
        flush(target.parent)
    return target


def _fetch_from(
    part: _Part,
    copied: Path | None,
    progress: Progress | None,
    attempts: int,
    wait: Callable[[float], object],
    timeout: float,
    opener: urllib.request.OpenerDirector,
) -> None:
    """Fill the part with bytes that pass the checks, from one source."""
    for again in (True, False):
        if copied is not None:
            _copy_local(part, copied, progress)
        elif not part.complete():
            _download(part, progress, attempts, wait, timeout, opener)
        try:
            return _check_file(part.path, part.remote, "it was not kept")
        except DownloadError:
            again = again and part.in_pieces
            part.discard()
            if not again:
                raise


def _sources(part: _Part) -> list[str]:
    """List a file's addresses, first the one that the part's bytes came from."""
    addresses = [part.remote.url, *part.remote.others]
    began = part.address()
    return sorted(addresses, key=lambda address: hub_url(address) != began)


# ---- the Hub

_HUB = "https://huggingface.co"
_HUB_FILE = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<path>.+)")
_LISTING_LIMIT = 4 * MIB


def _hub() -> str:
    """Return the Hub's address: the environment's HF_ENDPOINT, else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")


def hub_url(address: str, path: str | None = None) -> str:
    """Return the web address of a file of the Hub; other addresses as they are.

    `path` replaces the one in the address.
    """
    match = _HUB_FILE.fullmatch(address)
    if match is None:
        return address
    quoted = urllib.parse.quote(path or match["path"])
    return f"{_hub()}/{match['repository']}/resolve/{match['revision'] or 'main'}/{quoted}"


def _locate(remote: RemoteFile, address: str, timeout: float, opener: urllib.request.OpenerDirector) -> RemoteFile:
    """Return the file at one of its addresses; on the Hub, with the size and SHA-256 that are listed there."""
    match = _HUB_FILE.fullmatch(address)
    if match is None:
        return replace(remote, url=address)
    listed = _list_repository(match["repository"], match["revision"] or "main", timeout, opener)
    path = match["path"]
    if listed is None:
        return replace(remote, url=hub_url(address))
    if path not in listed and remote.pattern is not None:
        alike = [name for name in listed if re.fullmatch(remote.pattern, name)]
        path = alike[0] if len(alike) == 1 else path
    if path not in listed:
        some = ", ".join(sorted(listed)[:12]) or "nothing"
        raise DownloadError(
            f"{match['repository']} on the Hub has no {path}; it has {printable(some)}: "
            f"save the right file as {remote.name} in the download folder"
        )
    size, sha256 = listed[path]
    sha256 = remote.sha256 or sha256
    return replace(remote, url=hub_url(address, path), size=remote.size or size, sha256=sha256)


def _list_repository(
    repository: str, revision: str, timeout: float, opener: urllib.request.OpenerDirector
) -> dict[str, tuple[int | None, str | None]] | None:
    """List size and SHA-256 of a repository's files; None: its server does not tell."""
    url = f"{_hub()}/api/models/{repository}/tree/{revision}?recursive=true"
    try:
        with _open(opener, urllib.request.Request(url, headers={"User-Agent": "mar"}), timeout) as response:
            entries = json.loads(response.read(_LISTING_LIMIT))
        files = [entry for entry in entries if entry.get("type") == "file"]
        return {entry["path"]: (entry.get("size"), _sha256_of(entry)) for entry in files}
    except urllib.error.HTTPError as error:
        error.close()
        return None
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError):
        return None


def _from_mirror(remote: RemoteFile, mirror: str | Path | None) -> tuple[RemoteFile, Path | None]:
    """Return the file as the mirror has it, and its path where the mirror is a folder."""
    if not mirror:
        return remote, None
    parts = urllib.parse.urlsplit(str(mirror))
    if parts.scheme in ("http", "https"):
        path = f"{parts.path.rstrip('/')}/{urllib.parse.quote(remote.name)}"
        return replace(remote, url=urllib.parse.urlunsplit(parts._replace(path=path)), others=()), None
    if "://" in str(mirror) and parts.scheme != "file":
        raise DownloadError(f"mirror: got {str(mirror)!r}, expected a folder, or an address of http:// or https://")
    folder = Path(urllib.request.url2pathname(parts.path) if parts.scheme == "file" else mirror).expanduser()
    source = folder / remote.name
    if not source.is_file():
        raise DownloadError(f"the mirror {folder} has no file {remote.name}: put it there, or choose another mirror")
    return replace(remote, url=source.absolute().as_uri(), others=()), source


def _copy_local(part: _Part, source: Path, progress: Progress | None) -> None:
    """Copy a file of a folder into the part."""
    part.discard()
    total = source.stat().st_size
    _check_size(total, part.remote, "nothing was kept")
    _check_room(part, total)
    with _full_disk_explained(part), source.open("rb") as data, part.path.open("ab") as file:
        while chunk := data.read(MIB):
            file.write(chunk)
            if progress:
                progress(file.tell(), total)


@contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """Show a bar with size, speed and time left. Yields the `progress` for `fetch`."""
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    console = Console(file=unescaped(sys.stderr))
    with rich.Progress("{task.description}", rich.BarColumn(), *columns, console=console) as bars:
        task = bars.add_task(name, total=None)
        last: int | None = None

        def show(received: int, total: int | None) -> None:
            nonlocal last
            if last is None or received < last:  # resumed bytes must not count as speed
                bars.reset(task, total=total, completed=received)
            else:
                bars.update(task, total=total, completed=received)
            last = received

        yield show


def _sha256_of(entry: dict[str, Any]) -> str | None:
    """Return the SHA-256 that the Hub lists for a large file; None: it is kept in git itself."""
    sha256 = (entry.get("lfs") or {}).get("oid")
    return sha256 if isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) else None


# ---- the part that is there


class _Part:
    """The bytes of a file so far, and the note of which version they are of."""

    def __init__(self, remote: RemoteFile, path: Path, *, kept: bool = True) -> None:
        self.remote = remote
        self.path = path
        self.kept = kept
        """A later command goes on with it."""
        self.note_path = path.with_name(path.name + ".json")
        self.in_pieces = self.size() > 0
        """The bytes came by more than one answer of the server."""

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def trim(self) -> None:
        """Give up the bytes that may not have reached the disk.

        After a power failure, a part can have its length and zeros for data.
        """
        synced = self._read_note().get("synced")  # whatever address it has: a Hub's is known after its listing
        if isinstance(synced, int) and 0 <= synced < self.size():
            os.truncate(self.path, synced)

    def address(self) -> str | None:
        """Return the address that the bytes came from; None: unknown."""
        url = self._read_note().get("url")
        return url if isinstance(url, str) else None

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self.note_path.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def note(self) -> dict[str, Any]:
        """Return url, validator (for If-Range) and total of this version; empty if unknown."""
        note = self._read_note()
        if note.get("url") != self.remote.url:
            return {}
        synced, validator = note.get("synced", 0), note.get("validator")
        sound = isinstance(synced, int) and synced >= 0 and (validator is None or isinstance(validator, str))
        return note if sound else {}

    def write_note(self, note: dict[str, Any]) -> None:
        """Replace the note; a later power failure leaves the old one or the new one."""
        with temporary_folder(self.note_path.parent) as folder:
            temporary = folder / self.note_path.name
            temporary.write_text(json.dumps(note), "utf-8")
            flush(temporary)
            os.replace(temporary, self.note_path)

    def sync(self, file: IO[bytes]) -> None:
        """Wait until the bytes are on the disk, and only then note how many there are."""
        file.flush()
        os.fsync(file.fileno())
        if note := self.note():
            self.write_note(note | {"synced": self.size()})

    def complete(self) -> bool:
        return self.size() > 0 and self.note().get("total") == self.size()

    def discard(self) -> None:
        """Empty the part: removing the file would end its lock."""
        self.path.open("wb").close()
        self.discard_note()
        self.in_pieces = False

    def discard_note(self) -> None:
        for path in (self.note_path, self.note_path.with_name(self.note_path.name + ".new")):  # of earlier versions
            path.unlink(missing_ok=True)

    def headers(self) -> dict[str, str]:
        headers = {"User-Agent": "mar", "Accept-Encoding": "identity"}
        validator = self.note().get("validator")
        if validator and self.size() > 0:
            headers |= {"Range": f"bytes={self.size()}-", "If-Range": validator}
        return headers

    def begin(self, response: http.client.HTTPResponse) -> int | None:
        """Prepare for the body of `response`, at the part's end or anew. Returns the whole file's size."""
        validator = _validator(response)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            note = self.note()
            self.in_pieces = True
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            # without a note nothing was asked for but the whole file
            same = bool(note) and validator in (None, note.get("validator"))
            if same and span and int(span[1]) == self.size() and int(span[2]) == note.get("total", int(span[2])):
                return int(span[2])
            self.discard()
            raise _AttemptFailed("the server continued with something else than what was asked for")
        self.discard()
        total = _content_length(response)
        note = {"url": self.remote.url, "validator": validator, "synced": 0}
        self.write_note(note | ({} if total is None else {"total": total}))
        return total


@contextmanager
def _open_part(remote: RemoteFile, folder: Path) -> Iterator[_Part]:
    """Yield the part of earlier attempts, or a temporary one while another process has that.

    A lock ends with its process, so the part of a killed one is resumed.
    """
    name = Path(remote.name).name
    shared = _Part(remote, folder / f"{name}.part")
    with shared.path.open("ab") as file:
        if _lock(file, shared.path):
            shared.trim()
            try:
                yield shared
            finally:
                if os.fstat(file.fileno()).st_size == 0:
                    shared.discard()
                    shared.path.unlink()
            return
    with temporary_folder(folder) as temporary:
        yield _Part(remote, temporary / f"{name}.part", kept=False)


def _lock(file: IO[bytes], path: Path) -> bool:
    """Lock the open file; False if another process has it or renamed it, and without file locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


# ---- attempts


def _download(
    part: _Part,
    progress: Progress | None,
    attempts: int,
    wait: Callable[[float], object],
    timeout: float,
    opener: urllib.request.OpenerDirector,
) -> None:
    """Try until the part is complete; only failures in a row without progress count."""
    failures, furthest = 0, part.size()
    while True:
        try:
            return _attempt(part, progress, timeout, opener)
        except _AttemptFailed as failed:
            failures = 1 if part.size() >= furthest + ADVANCE else failures + 1
            furthest = max(furthest, part.size())
            if failures >= attempts:
                size = part.size() if part.kept else 0
                kept = f"; the first {size / MIB:.1f} MiB are kept, run again to go on" if size else ""
                raise DownloadError(
                    f"could not download {part.remote.name} from {_server(part.remote.url)}: {failed} ({failures} "
                    f"attempts without success{kept})"
                ) from failed
            if failures == 1:
                logger.warning(f"{part.remote.name} from {_server(part.remote.url)}: {failed}; trying again")
            wait(min(2.0 ** (failures - 1), 60.0))


def _server(url: str) -> str:
    """Return host and port of an address, without a user's password."""
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2] or url


def _attempt(part: _Part, progress: Progress | None, timeout: float, opener: urllib.request.OpenerDirector) -> None:
    with _request(part, timeout, opener) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # before the part is given up for it
            _check_headers(part.remote, response)
        with _full_disk_explained(part):
            total = part.begin(response)
        _check_room(part, total)
        _copy(part, response, total, progress, timeout)
    if total is not None and part.size() > total:
        part.discard()
        raise _AttemptFailed("the server sent more than it had announced")
    if total is not None and part.size() < total:
        raise _AttemptFailed(f"the connection ended after {part.size():,} of {total:,} bytes")


def _request(
    part: _Part, timeout: float, opener: urllib.request.OpenerDirector
) -> AbstractContextManager[http.client.HTTPResponse]:
    request = urllib.request.Request(part.remote.url, headers=part.headers())
    try:
        response = _open(opener, request, timeout)
    except urllib.error.HTTPError as error:
        with error:
            answer = f"the server answered {error.code} {error.reason}"
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.discard()  # the server's file is shorter than the part: another version
                raise _AttemptFailed(answer) from error
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _AttemptFailed(answer) from error
            raise DownloadError(f"could not download {part.remote.name}: {answer} for {part.remote.url}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptFailed(_reason(error)) from error
    return response


def _open(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float
) -> http.client.HTTPResponse:
    """Open an address. Headers that trickle in end too, which a socket's timeout does not see."""
    answers: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()
    late = threading.Event()

    def work() -> None:
        try:
            response = opener.open(request, timeout=timeout)
        except Exception as error:  # noqa: BLE001  # raised below
            answers.put(error)
            return
        answers.put(response)
        if late.is_set():
            response.close()

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=4 * timeout)
    except queue.Empty:
        late.set()
        raise TimeoutError(f"no answer within {4 * timeout:g} seconds") from None
    except BaseException:
        late.set()
        raise
    if isinstance(answer, Exception):
        raise answer
    return answer


def _copy(
    part: _Part, response: http.client.HTTPResponse, total: int | None, progress: Progress | None, timeout: float
) -> None:
    """Append the body to the part, however it ends."""
    received = synced = had = part.size()
    since = time.monotonic()
    held, unjudged = b"", received == 0  # the first bytes wait until they are enough to judge
    with _full_disk_explained(part), part.path.open("ab") as file:
        try:
            while True:
                if progress:
                    progress(received, total)
                chunk = _read_chunk(response)
                if not chunk:
                    file.write(held)
                    break
                received += len(chunk)
                if unjudged:
                    held += chunk
                    if received >= BEGINNING:
                        _check_beginning(held, part.remote, "nothing was kept")
                        file.write(held)
                        held, unjudged = b"", False
                else:
                    file.write(chunk)
                if received - synced >= SYNC_EVERY:
                    part.sync(file)
                    synced = received
                if (elapsed := time.monotonic() - since) >= timeout:
                    if received - had < LEAST_SPEED * elapsed:
                        raise _AttemptFailed(f"only {received - had:,} bytes came in {elapsed:.0f} seconds")
                    since, had = time.monotonic(), received
        finally:
            part.sync(file)


@contextmanager
def _full_disk_explained(part: _Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _DiskFailed(f"the disk of {part.path.parent} is full: free some space and run again to go on") from error


def _read_chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)  # what is there: read waits for all of it, however slowly it comes
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptFailed(_reason(error)) from error


def _content_length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    return int(length) if length and length.isdecimal() else None


def _validator(response: http.client.HTTPResponse) -> str | None:
    tag = response.headers.get("ETag")
    # A weak tag promises the same meaning, not the same bytes, and may not stand in If-Range.
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return f"{reason}" or type(error).__name__


# ---- checks


def _check_file(path: Path, remote: RemoteFile, remedy: str) -> None:
    """Check size, form and, if it is known, SHA-256 of a file."""
    _check_size(path.stat().st_size, remote, remedy)
    with path.open("rb") as file:
        _check_beginning(file.read(BEGINNING), remote, remedy)
    if _is_torch_file(remote) and not is_zip(path):
        raise DownloadError(f"{remote.name} is cut off (a zip archive without its directory): {remedy}")
    if remote.name.endswith(".safetensors") and (reason := _safetensors_fault(path)):
        raise DownloadError(f"{remote.name} is damaged ({reason}): {remedy}")
    if remote.sha256 is not None:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != remote.sha256.lower():
            raise DownloadError(f"{remote.name} has the SHA-256 {sha256}, expected {remote.sha256}: {remedy}")
    elif _is_torch_file(remote):
        try:
            _check_zip(path)
        except Exception as error:
            reason = printable(str(error).split("\n")[0]) or type(error).__name__
            raise DownloadError(f"{remote.name} is damaged ({reason}): {remedy}") from error


def _check_zip(path: Path) -> None:
    """Compare all records of a zip of torch.save with its CRC-32s."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch.save never does")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records are longer than the file")
        for record in records:
            with archive.open(record) as data:
                while data.read(MIB):  # raises BadZipFile at the end of a record with another CRC-32
                    pass
    with path.open("rb") as file:
        file.seek(-_ZIP_END, os.SEEK_END)
        if file.read(4) != b"PK\x05\x06":
            raise ValueError("something follows its end")


def _safetensors_fault(path: Path) -> str | None:
    """Compare the length of a safetensors file with its header; None: they agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return "its header is cut off, or is none"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError):
            return "its header is none of a safetensors file"
    return None if end == size else f"it has {size:,} bytes, and its header is of {end:,}"


_ZIP_END = 22
"""Bytes of the record that ends a zip without a comment."""


def _check_headers(remote: RemoteFile, response: http.client.HTTPResponse) -> None:
    """Refuse a web page, and a file of another size, before its first byte."""
    if response.headers.get_content_type() == "text/html":
        raise _web_page_error(remote)
    total = _content_length(response)
    if total is not None:
        _check_size(total, remote, "nothing was kept")


def _check_size(size: int, remote: RemoteFile, remedy: str) -> None:
    if remote.size is not None and size != remote.size:
        raise DownloadError(f"{remote.name} has {size:,} bytes, expected {remote.size:,}: {remedy}")
    expected = remote.mebibytes
    if expected is not None and abs(size / MIB - expected) > TOLERANCE * expected:
        raise DownloadError(f"{remote.name} has {size / MIB:,.1f} MiB, expected about {expected:,.0f} MiB: {remedy}")


def _check_beginning(first: bytes, remote: RemoteFile, remedy: str) -> None:
    if first.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise _web_page_error(remote)
    if _is_torch_file(remote) and not first.startswith(b"PK\x03\x04"):
        raise DownloadError(
            f"{remote.name} does not begin like a file of torch.save (a zip archive), but with {first[:8]!r}: {remedy}"
        )


def _is_torch_file(remote: RemoteFile) -> bool:
    return remote.name.endswith((".pth", ".ckpt", ".pt"))


def _web_page_error(remote: RemoteFile) -> DownloadError:
    return DownloadError(
        f"the server sent a web page instead of {remote.name}: open {remote.url} in a browser to see what it says"
    )


def _check_room(part: _Part, total: int | None) -> None:
    size = total if total is not None else part.remote.size or int((part.remote.mebibytes or 0) * MIB)
    missing, free = size - part.size(), shutil.disk_usage(part.path.parent).free
    if missing + HEADROOM > free:
        raise _DiskFailed(
            f"{part.remote.name} needs {(missing + HEADROOM) / MIB:,.0f} MiB on the disk of {part.path.parent}, "
            f"where {free / MIB:,.0f} MiB are free: make room or choose another folder"
        )
