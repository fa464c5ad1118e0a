"""Downloads from servers that damage, mix up, misname or trickle: a wrong file is never kept."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mar.checkpoint import download
from mar.checkpoint.download import OFFICIAL, DownloadError, RemoteFile, fetch
from mar.cli import main

RECORDS = 6
RECORD = 40_000


def archive(seed: int) -> bytes:
    """Records as torch.save stores them, of random bytes."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        for record in range(RECORDS):
            file.writestr(f"model/data/{record}", random.Random(f"{seed} {record}").randbytes(RECORD))
    return memory.getvalue()


def records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


GOOD, OTHER = archive(0), archive(1)
SIZE = len(GOOD)
HALF = SIZE // 2
SHA256 = hashlib.sha256(GOOD).hexdigest()


@dataclass
class Answer:
    """What the server does with one request."""

    body: bytes = GOOD
    etag: str | None = '"one"'
    modified: str | None = None
    stop: int | None = None  # hang up after so many bytes of what is left to send
    length: int | None = 0  # added to the true length; None: no length
    ranges: bool = True
    if_range: bool = True  # compare it
    span: Callable[[int, int], str] = "bytes {}-{}/{}".format
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    pause: float = 0.0  # between bytes
    header_pause: float = 0.0


class Server:
    """Answers one request after the other; the last answer stays."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[Answer] = []
        self.ranges: list[str | None] = []
        self.over = threading.Event()

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        asked = handler.headers.get("Range")
        self.ranges.append(asked)
        wanted = re.fullmatch(r"bytes=(\d+)-", asked or "")
        same = not answer.if_range or handler.headers.get("If-Range") in (answer.etag, answer.modified)
        start = int(wanted[1]) if wanted and answer.ranges and same else 0
        if start >= len(answer.body) and start:
            return handler.send_error(416)
        body = answer.body[start:]
        lines = [f"HTTP/1.0 {answer.status or (206 if start else 200)} so"]
        if start or answer.status == 206:
            span = answer.span(start, len(answer.body) - 1, len(answer.body))  # type: ignore[call-arg]
            lines.append(f"Content-Range: {span}")
        if answer.length is not None:
            lines.append(f"Content-Length: {len(body) + answer.length}")
        named = {"ETag": answer.etag, "Last-Modified": answer.modified} | answer.headers
        lines += [f"{name}: {value}" for name, value in named.items() if value is not None]
        self.send(handler, ("\r\n".join(lines) + "\r\n\r\n").encode(), answer.header_pause)
        self.send(handler, body[: answer.stop], answer.pause)

    def send(self, handler: BaseHTTPRequestHandler, data: bytes, pause: float) -> None:
        for piece in (data[at : at + 1] for at in range(len(data))) if pause else (data,):
            handler.wfile.write(piece)
            handler.wfile.flush()
            if pause and self.over.wait(pause):
                return


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            server.respond(self)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        listener.handle_error = lambda *_: None  # type: ignore[method-assign]  # we hang up on it on purpose
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.005})
        thread.start()
        server.url = f"http://127.0.0.1:{listener.server_port}/model.pth"
        yield server
        server.over.set()
        listener.shutdown()
        thread.join()


def get(server: Server, folder: Path, **options: Any) -> Path:
    sha256 = options.pop("sha256", None)
    mebibytes = options.pop("mebibytes", SIZE / 2**20)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    remote = RemoteFile("model.pth", server.url, mebibytes, sha256)
    defaults: dict[str, Any] = {"opener": opener, "wait": lambda _: None, "timeout": 5.0, "attempts": 3}
    return fetch(remote, folder, **defaults | options)


def flipped(at: int) -> bytes:
    data = bytearray(GOOD)
    data[at] ^= 1
    return bytes(data)


def first_half(**changes: Any) -> Answer:
    return Answer(stop=HALF, **changes)


MIXED = OTHER[:HALF] + GOOD[HALF:]
DAMAGED: dict[str, bytes] = (
    {f"flip in record {i}": flipped(i * (RECORD + 42) + 20_000) for i in range(RECORDS)}
    | {f"flip {at} bytes before the end": flipped(SIZE - at) for at in (1, 2, 4, 6, 10, 14, 18, 22, 60, 100)}
    | {f"flip in byte {at} of the first header": flipped(at) for at in (0, 3, 8, 26, 30, 35)}
    | {f"1 KiB zeroed at {at}": GOOD[:at] + bytes(1024) + GOOD[at + 1024 :] for at in (4000, HALF, SIZE - 1024)}
    | {f"1 KiB lost at {at}": GOOD[:at] + GOOD[at + 1024 :] for at in (4000, HALF, SIZE - 1024)}
    | {f"1 KiB twice at {at}": GOOD[: at + 1024] + GOOD[at:] for at in (4000, HALF)}
    | {
        "half of another file": MIXED,
        "halves exchanged": GOOD[HALF:] + GOOD[:HALF],
        "a long end": GOOD + bytes(1000),
        "a page at its end": GOOD + b"<html>sign in</html>",
        "a byte before it": b"\n" + GOOD,
        "cut": GOOD[:-30],
        "zeros": bytes(SIZE),
        "a page": b"<!doctype html>" + bytes(SIZE - 15),
        "gzip": gzip.compress(GOOD),
        "line ends of another system": GOOD.replace(b"\n", b"\r\n"),
        "empty": b"",
    }
)
"""Bodies that are not the file."""

LIARS: dict[str, list[Answer]] = {
    "one ETag for two files": [first_half(body=OTHER), Answer()],
    "one date for two files": [
        first_half(body=OTHER, etag=None, modified="Mon, 03 Jun 2024 10:00:00 GMT"),
        Answer(etag=None, modified="Mon, 03 Jun 2024 10:00:00 GMT"),
    ],
    "no ETag on the second answer": [first_half(body=OTHER), Answer(etag=None, if_range=False)],
    "If-Range ignored, ETag changed": [first_half(body=OTHER, etag='"two"'), Answer(if_range=False)],
    "no ETag at all": [first_half(body=OTHER, etag=None), Answer(etag=None)],
    "weak ETag": [first_half(body=OTHER, etag='W/"one"'), Answer(etag='W/"one"')],
    "empty ETag": [first_half(body=OTHER, etag='""'), Answer(etag='""')],
    "another start": [first_half(), Answer(span=lambda a, b, n: f"bytes {a - 8}-{b}/{n}"), Answer()],
    "another total": [first_half(), Answer(span=lambda a, b, n: f"bytes {a}-{b}/{n + 1}"), Answer()],
    "no total": [first_half(), Answer(span=lambda a, b, _: f"bytes {a}-{b}/*"), Answer()],
    "nonsense for a range": [first_half(), Answer(span=lambda *_: "bytes"), Answer()],
    "206 for the whole from its start": [first_half(), Answer(status=206, ranges=False), Answer()],
    "206 where nothing was asked for": [Answer(status=206), Answer()],
    "damaged half, then sound": [first_half(body=flipped(20_000)), Answer()],
    "sound half, then damaged": [first_half(), Answer(body=flipped(SIZE - 20_000)), Answer()],
    "too short a length": [first_half(length=-HALF), Answer()],
    "ranges refused": [first_half(), Answer(ranges=False)],
    "three pieces": [Answer(stop=90_000), Answer(stop=90_000), Answer()],
    "busy between": [first_half(), Answer(status=503, body=b"busy", ranges=False), Answer()],
    "no length, cut": [first_half(length=None), Answer(length=None)],
}
"""Answers in a row that could be put together to a wrong file."""

HEADERS: dict[str, dict[str, Any]] = {"told": {}, "no length": {"length": None}, "no ETag": {"etag": None}}
BEHAVIORS: dict[str, list[Answer]] = {
    f"{body}, {headers}": [Answer(body=DAMAGED[body], **HEADERS[headers])]
    for body, headers in itertools.product(DAMAGED, HEADERS)
} | LIARS


def test_behaviors_table_has_all_82_that_were_measured() -> None:
    assert len(BEHAVIORS) >= 82
    assert all(body != GOOD for body in DAMAGED.values())


@pytest.mark.parametrize("known", [True, False], ids=["hash", "no hash"])
@pytest.mark.parametrize("name", list(BEHAVIORS))
def test_fetch_from_a_hostile_server_keeps_no_wrong_file(
    server: Server, tmp_path: Path, name: str, known: bool
) -> None:
    server.answers = [*BEHAVIORS[name]]
    with contextlib.suppress(DownloadError):
        get(server, tmp_path, sha256=SHA256 if known else None)
    path = tmp_path / "model.pth"
    if path.exists():
        data = path.read_bytes()
        assert data == GOOD if known else records(data) == records(GOOD)
        assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    "name", [name for name in LIARS if name not in ("too short a length", "no length, cut", "no total")]
)
def test_fetch_after_a_mixed_up_answer_ends_with_the_file(server: Server, tmp_path: Path, name: str) -> None:
    server.answers = [*LIARS[name]]
    assert get(server, tmp_path).read_bytes() == GOOD


def test_fetch_of_pieces_that_never_fit_ends(server: Server, tmp_path: Path) -> None:
    server.answers = [answer for _ in range(10) for answer in (first_half(body=OTHER), Answer())]
    with pytest.raises(DownloadError, match=r"model\.pth is damaged .*: it was not kept"):
        get(server, tmp_path)
    assert len(server.ranges) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("body", ["flip in record 3", f"1 KiB zeroed at {HALF}"])
def test_fetch_finds_damage_of_an_old_file(server: Server, tmp_path: Path, body: str) -> None:
    (tmp_path / "model.pth").write_bytes(DAMAGED[body])
    server.answers = [Answer()]
    with pytest.raises(DownloadError, match=r"is damaged \(.*\): remove .*model\.pth and run again"):
        get(server, tmp_path)
    assert server.ranges == []


@pytest.mark.parametrize("where", ["pause", "header_pause"])
def test_fetch_of_a_trickle_ends(server: Server, tmp_path: Path, where: str) -> None:
    server.answers = [Answer(**{where: 0.05})]
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"(only \d+ bytes came in|no answer within)"):
        get(server, tmp_path, timeout=0.2, attempts=2)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "model.pth").exists()


def test_fetch_after_a_trickle_goes_on(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(pause=0.002), Answer()]
    assert get(server, tmp_path, timeout=0.5).read_bytes() == GOOD
    assert re.fullmatch(r"bytes=\d+-", server.ranges[1] or "")


def test_part_is_trusted_as_far_as_it_reached_the_disk(server: Server, tmp_path: Path) -> None:
    server.answers = [first_half()]
    with pytest.raises(DownloadError):
        get(server, tmp_path, attempts=1)
    part = tmp_path / "model.pth.part"
    assert json.loads((tmp_path / "model.pth.part.json").read_text())["synced"] == HALF
    part.write_bytes(part.read_bytes() + bytes(1000))  # as after a power failure: the length is there, the data not
    server.answers = [Answer()]
    assert get(server, tmp_path).read_bytes() == GOOD
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_bytes_are_noted_only_after_they_are_on_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SYNC_EVERY", 1)
    part, note = tmp_path / "model.pth.part", tmp_path / "model.pth.part.json"
    on_disk, fsync = 0, os.fsync

    def watch(handle: int) -> None:
        nonlocal on_disk
        fsync(handle)
        if part.exists() and os.path.samestat(os.fstat(handle), part.stat()):
            on_disk = part.stat().st_size

    noted: list[int] = []

    def look(*_: Any) -> None:
        if note.exists():
            noted.append(json.loads(note.read_text())["synced"])
            assert noted[-1] <= on_disk

    monkeypatch.setattr(os, "fsync", watch)
    server.answers = [Answer()]
    assert get(server, tmp_path, progress=look).read_bytes() == GOOD
    assert noted[-1] > 0


@pytest.mark.parametrize(
    "note", ["[]", '{"url": 1}', "{", '{"url": "URL", "validator": 3}', '{"url": "URL", "synced": -5}']
)
def test_part_with_a_damaged_note_starts_over(server: Server, tmp_path: Path, note: str) -> None:
    (tmp_path / "model.pth.part").write_bytes(OTHER[:HALF])
    (tmp_path / "model.pth.part.json").write_text(note.replace("URL", server.url))
    server.answers = [Answer()]
    assert get(server, tmp_path).read_bytes() == GOOD
    assert server.ranges == [None]


# ---- mirrors


def test_mirror_of_an_address_has_the_file_by_its_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = server.url.removesuffix("model.pth")
    remote = RemoteFile("model.pth", "http://127.0.0.1:9/elsewhere", SIZE / 2**20)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    server.answers = [Answer()]
    assert fetch(remote, tmp_path / "a", mirror=base, opener=opener).read_bytes() == GOOD
    monkeypatch.setenv("MAR_MIRROR", base)
    assert fetch(remote, tmp_path / "b", opener=opener).read_bytes() == GOOD


@pytest.mark.parametrize("form", ["path", "address"])
def test_mirror_of_a_folder_is_copied_and_checked(tmp_path: Path, form: str) -> None:
    shelf = tmp_path / "a shelf"
    shelf.mkdir()
    (shelf / "model.pth").write_bytes(GOOD)
    mirror = str(shelf) if form == "path" else shelf.as_uri()
    remote = RemoteFile("model.pth", "http://127.0.0.1:9/elsewhere", SIZE / 2**20)
    seen: list[tuple[int, int | None]] = []
    path = fetch(remote, tmp_path / "to", mirror=mirror, progress=lambda *now: seen.append(now))
    assert path.read_bytes() == GOOD
    assert seen[-1] == (SIZE, SIZE)
    path.unlink()
    (shelf / "model.pth").write_bytes(DAMAGED["flip in record 3"])
    with pytest.raises(DownloadError, match="is damaged"):
        fetch(remote, tmp_path / "to", mirror=mirror)
    assert list((tmp_path / "to").iterdir()) == []


def test_mirror_without_a_file_that_is_here_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(GOOD)
    remote = RemoteFile("model.pth", "http://127.0.0.1:9/elsewhere", SIZE / 2**20)
    assert fetch(remote, tmp_path, mirror=tmp_path / "shelf").read_bytes() == GOOD


def test_mirror_that_cannot_serve_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = RemoteFile("model.pth", "http://127.0.0.1:9/elsewhere")
    with pytest.raises(DownloadError, match=r"the mirror .* has no file model\.pth: put it there"):
        fetch(remote, tmp_path / "to", mirror=tmp_path)
    with pytest.raises(DownloadError, match="got 'ftp://host/', expected a folder, or an address"):
        fetch(remote, tmp_path / "to", mirror="ftp://host/")
    assert main(["download", "kl16", "--to", str(tmp_path / "to"), "--mirror", str(tmp_path)]) == 2
    assert f"the mirror {tmp_path} has no file {OFFICIAL['kl16'][0].name}" in capsys.readouterr().err


def test_part_is_cut_whatever_address_its_note_has(tmp_path: Path) -> None:
    """A Hub's file has the address of its listing first, and its note the resolved one."""
    path = tmp_path / "model.pth.part"
    path.write_bytes(bytes(100))
    note = {"url": "https://mirror/resolve/model.pth", "validator": "x", "total": 200, "synced": 60}
    path.with_name("model.pth.part.json").write_text(json.dumps(note))
    download._Part(RemoteFile("hf://owner/name/model.pth", "model.pth"), path).trim()
    assert path.stat().st_size == 60


def test_part_of_another_process_promises_nothing(tmp_path: Path) -> None:
    """What a lost connection leaves in a folder of its own is removed."""
    remote = RemoteFile("https://mirror/model.pth", "model.pth")
    for kept in (True, False):
        path = tmp_path / f"{kept}.part"
        path.write_bytes(bytes(2**20))

        def lost(part: object, *arguments: object) -> None:
            raise download._AttemptFailed("the connection was lost")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(download, "_attempt", lost)
            with pytest.raises(DownloadError) as failed:
                download._download(
                    download._Part(remote, path, kept=kept), None, 1, lambda seconds: None, 1.0,
                    urllib.request.build_opener(),
                )  # fmt: skip
        assert ("the first 1.0 MiB are kept" in str(failed.value)) == kept
