"""Downloads against a server on this machine that drops connections, lies about lengths and serves garbage."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mar.checkpoint import download
from mar.checkpoint.download import OFFICIAL, DownloadError, RemoteFile, fetch, home


def archive(kib: int = 1024, seed: int = 0) -> bytes:
    """Something with the outer form of a file of torch.save."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        file.writestr("data/0", random.Random(seed).randbytes(1024 * kib))
    return memory.getvalue()


GOOD = archive()


@dataclass(frozen=True)
class Answer:
    """How the server treats one request."""

    status: int = 200
    stop: int | None = None  # close the connection after so many bytes of the body
    reset: bool = False  # and rudely so
    announce: int = 0  # added to the true Content-Length
    length: bool = True
    ranges: bool = True
    obey_if_range: bool = True
    shift: int = 0  # added to the range's true start
    kind: str = "application/octet-stream"


@dataclass
class Server:
    """What is served, and what was asked for."""

    url: str = ""
    body: bytes = GOOD
    etag: str | None = '"one"'
    modified: str | None = None
    answers: list[Answer] = field(default_factory=list)  # the last one stays
    asked: list[dict[str, str]] = field(default_factory=list)

    def remote(self, **known: Any) -> RemoteFile:
        return RemoteFile(**{"name": "model.pth", "url": self.url, "mebibytes": len(GOOD) / 2**20} | known)


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            headers = dict(self.headers)
            server.asked.append(headers)
            answers = server.answers
            answer = (answers.pop(0) if len(answers) > 1 else answers[0]) if answers else Answer()
            start = self.start(answer, headers)
            if answer.status != 200:
                return self.send_error(answer.status)
            if start >= len(server.body):
                return self.send_error(416)
            body = server.body[start:]
            self.send_response(206 if start else 200)
            if start:
                first = start + answer.shift
                self.send_header("Content-Range", f"bytes {first}-{len(server.body) - 1}/{len(server.body)}")
            if answer.length:
                self.send_header("Content-Length", str(len(body) + answer.announce))
            for name, value in (("ETag", server.etag), ("Last-Modified", server.modified)):
                if value:
                    self.send_header(name, value)
            self.send_header("Content-Type", answer.kind)
            self.end_headers()
            self.wfile.write(body[: answer.stop])
            if answer.reset:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def start(self, answer: Answer, headers: dict[str, str]) -> int:
            wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("Range", ""))
            same = headers.get("If-Range") in (server.etag, server.modified) or not answer.obey_if_range
            return int(wanted[1]) if wanted and answer.ranges and same else 0

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(server)) as listener:
        listener.handle_error = lambda *_: None  # type: ignore[method-assign]  # we hang up on it on purpose
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.005})
        thread.start()
        server.url = f"http://127.0.0.1:{listener.server_port}/model.pth"
        yield server
        listener.shutdown()
        thread.join()


class Get:
    """`fetch` without proxies and without waiting; what it would have waited is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waits: list[float] = []

    def __call__(self, remote: RemoteFile, **options: Any) -> Path:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return fetch(remote, self.folder, **{"opener": opener, "wait": self.waits.append, "timeout": 5.0} | options)

    def names(self) -> set[str]:
        found = self.folder.iterdir() if self.folder.exists() else ()
        return {path.name for path in found if not path.name.startswith(".")}

    def part(self) -> Path:
        return self.folder / "model.pth.part"


@pytest.fixture
def get(tmp_path: Path) -> Get:
    return Get(tmp_path / "models")


def test_fetch_good_file_leaves_nothing_else(server: Server, get: Get) -> None:
    seen: list[tuple[int, int | None]] = []
    path = get(server.remote(), progress=lambda received, total: seen.append((received, total)))
    assert path.read_bytes() == GOOD
    assert {path.name for path in get.folder.iterdir()} == {"model.pth"}
    assert seen[0] == (0, len(GOOD))
    assert seen[-1] == (len(GOOD), len(GOOD))
    assert [received for received, _ in seen] == sorted({received for received, _ in seen})


def test_fetch_complete_file_is_checked_not_fetched(server: Server, get: Get) -> None:
    get(server.remote())
    assert get(server.remote()).read_bytes() == GOOD
    assert len(server.asked) == 1


def test_fetch_changed_complete_file_is_an_error(server: Server, get: Get) -> None:
    remote = server.remote(sha256=hashlib.sha256(GOOD).hexdigest())
    path = get(remote)
    changed = bytearray(GOOD)
    changed[1000] ^= 1
    path.write_bytes(changed)
    with pytest.raises(DownloadError, match=r"SHA-256 .* expected .* remove .*model\.pth and run again"):
        get(remote)
    assert path.exists()


@pytest.mark.parametrize("kept", [700_000, len(GOOD) - 10])
def test_fetch_truncated_complete_file_is_an_error(server: Server, get: Get, kept: int) -> None:
    path = get(server.remote())
    path.write_bytes(GOOD[:kept])
    with pytest.raises(DownloadError, match=r"(MiB|cut off).* remove .*model\.pth and run again"):
        get(server.remote())
    assert path.exists()


def test_hashes_and_locks_of_older_versions_are_ignored(server: Server, get: Get) -> None:
    get.folder.mkdir()
    (get.folder / "hashes.json").write_text('{"model.pth": "00ff"}')
    (get.folder / ".model.pth.lock").touch()
    assert get(server.remote()).read_bytes() == GOOD
    assert (get.folder / "hashes.json").read_text() == '{"model.pth": "00ff"}'


def test_fetch_resumes_a_dropped_connection(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=700_000), Answer()]
    assert get(server.remote()).read_bytes() == GOOD
    assert server.asked[1]["Range"] == "bytes=700000-"
    assert server.asked[1]["If-Range"] == '"one"'
    assert get.waits == [1.0]


def test_fetch_survives_a_connection_reset(server: Server, get: Get) -> None:
    # How much of what was sent still arrives is the system's affair, so only the outcome is certain.
    server.answers = [Answer(stop=700_000, reset=True), Answer()]
    assert get(server.remote()).read_bytes() == GOOD
    assert len(server.asked) == 2
    assert get.waits == [1.0]


def test_resume_with_a_weak_etag_uses_the_date(server: Server, get: Get) -> None:
    server.etag, server.modified = 'W/"one"', "Mon, 03 Jun 2024 10:00:00 GMT"
    server.answers = [Answer(stop=5000), Answer()]
    assert get(server.remote()).read_bytes() == GOOD
    assert server.asked[1]["If-Range"] == server.modified


def test_resume_without_etag_or_date_starts_over(server: Server, get: Get) -> None:
    server.etag = None
    server.answers = [Answer(stop=5000), Answer()]
    assert get(server.remote()).read_bytes() == GOOD
    assert "Range" not in server.asked[1]


def test_fetch_attempts_are_bounded_and_the_part_is_kept(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=1000)]
    with pytest.raises(DownloadError, match=r"ended after 3,000 of .*3 attempts.* run again to go on"):
        get(server.remote(), attempts=3)
    assert get.waits == [1.0, 2.0]
    assert get.part().read_bytes() == GOOD[:3000]
    server.answers = []
    seen: list[int] = []
    assert get(server.remote(), progress=lambda received, _: seen.append(received)).read_bytes() == GOOD
    assert seen[0] == 3000
    assert get.names() == {"model.pth"}


def test_fetch_attempts_with_progress_do_not_count(server: Server, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ADVANCE", 1000)
    server.answers = [Answer(stop=100_000)]
    assert get(server.remote(), attempts=2).read_bytes() == GOOD
    assert len(server.asked) == len(GOOD) // 100_000 + 1


def test_resume_without_range_support_starts_over(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=5000), Answer(ranges=False)]
    assert get(server.remote()).read_bytes() == GOOD
    assert "Range" in server.asked[1]


def test_resume_of_a_changed_file_starts_over(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=5000)]
    with pytest.raises(DownloadError):
        get(server.remote(), attempts=1)
    server.body, server.etag, server.answers = archive(seed=1), '"two"', []
    assert get(server.remote()).read_bytes() == archive(seed=1)


def test_resume_with_another_version_starts_over(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=5000)]
    with pytest.raises(DownloadError):
        get(server.remote(), attempts=1)
    server.body, server.etag, server.answers = archive(seed=1), '"two"', [Answer(obey_if_range=False)]
    assert get(server.remote()).read_bytes() == archive(seed=1)
    assert ["Range" in headers for headers in server.asked] == [False, True, False]


def test_resume_at_another_offset_is_refused(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=5000), Answer(shift=-8), Answer()]
    assert get(server.remote()).read_bytes() == GOOD
    assert "Range" not in server.asked[2]


def test_resume_of_a_shorter_file_starts_over(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=500_000)]
    with pytest.raises(DownloadError):
        get(server.remote(), attempts=1)
    server.body, server.answers = archive(kib=64), [Answer(obey_if_range=False)]
    assert get(server.remote(mebibytes=None)).read_bytes() == archive(kib=64)


@pytest.mark.parametrize("mebibytes", [len(GOOD) / 2**20, None])
def test_fetch_fewer_bytes_than_announced_is_an_error(server: Server, get: Get, mebibytes: float | None) -> None:
    server.answers = [Answer(announce=1000)]
    with pytest.raises(DownloadError, match="attempts without success"):
        get(server.remote(mebibytes=mebibytes))
    assert "model.pth" not in get.names()


def test_fetch_with_too_small_a_length_is_an_error(server: Server, get: Get) -> None:
    server.answers = [Answer(announce=-1000)]
    with pytest.raises(DownloadError, match=r"model\.pth is cut off"):
        get(server.remote())
    assert get.names() == set()


def test_fetch_of_an_unexpected_size_is_refused_early(server: Server, get: Get) -> None:
    seen: list[int] = []
    with pytest.raises(DownloadError, match=r"has 1\.0 MiB, expected about 254 MiB"):
        get(server.remote(mebibytes=254), progress=lambda received, _: seen.append(received))
    assert seen == []
    assert get.names() == set()


def test_fetch_without_length_checks_the_format(server: Server, get: Get) -> None:
    server.answers = [Answer(length=False, stop=500_000), Answer(length=False)]
    with pytest.raises(DownloadError, match="cut off"):
        get(server.remote(mebibytes=None))
    seen: list[int | None] = []
    assert get(server.remote(), progress=lambda _, total: seen.append(total)).read_bytes() == GOOD
    assert set(seen) == {None}


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_fetch_of_a_web_page_is_refused_by_name(server: Server, get: Get, kind: str) -> None:
    server.body, server.answers = b"\n<!DOCTYPE html><html><body>sign in</body></html>", [Answer(kind=kind)]
    with pytest.raises(DownloadError, match=r"a web page instead of model\.pth"):
        get(server.remote(mebibytes=None))
    assert "model.pth" not in get.names()


def test_fetch_of_a_web_page_keeps_the_old_part(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=5000)]
    with pytest.raises(DownloadError):
        get(server.remote(), attempts=1)
    server.answers = [Answer(kind="text/html", ranges=False)]
    with pytest.raises(DownloadError, match="web page"):
        get(server.remote())
    assert get.part().read_bytes() == GOOD[:5000]


def test_fetch_of_garbage_is_refused_early(server: Server, get: Get) -> None:
    server.body = b"\x80\x02garbage" * 200_000
    with pytest.raises(DownloadError, match=r"does not begin like a file of torch\.save"):
        get(server.remote(mebibytes=None))
    assert get.names() == set()


def test_fetch_of_an_empty_file_is_refused(server: Server, get: Get) -> None:
    get.folder.mkdir()
    (get.folder / "model.pth").write_bytes(b"")
    with pytest.raises(DownloadError, match="does not begin"):
        get(server.remote(mebibytes=None))


def test_fetch_not_found_fails_at_once(server: Server, get: Get) -> None:
    server.answers = [Answer(status=404)]
    with pytest.raises(DownloadError, match=r"the server answered 404 .* for http://127"):
        get(server.remote())
    assert len(server.asked) == 1


def test_fetch_retries_a_busy_server(server: Server, get: Get) -> None:
    server.answers = [Answer(status=503), Answer(status=429), Answer()]
    assert get(server.remote()).read_bytes() == GOOD
    assert get.waits == [1.0, 2.0]


def test_fetch_without_a_server_fails_in_one_line(get: Get) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/model.pth"
        with pytest.raises(
            DownloadError, match=r"could not download model\.pth from 127\.0\.0\.1:\d+: .*refused.* \(2 attempts"
        ):
            get(RemoteFile("model.pth", url), attempts=2)


def test_fetch_checks_a_pinned_hash(server: Server, get: Get) -> None:
    with pytest.raises(DownloadError, match=r"expected 00ff.*: it was not kept"):
        get(server.remote(sha256="00ff" * 16))
    assert get.names() == set()
    assert get(server.remote(sha256=hashlib.sha256(GOOD).hexdigest().upper())).read_bytes() == GOOD
    assert get.names() == {"model.pth"}


def test_fetch_too_little_disk_fails_beforehand(server: Server, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(get.folder.parent)._replace(free=download.HEADROOM)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"needs 65 MiB on the disk of .* 64 MiB are free"):
        get(server.remote())
    assert "model.pth" not in get.names()


def test_fetch_disk_full_meanwhile_fails_in_one_line(server: Server, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match="is full: free some space and run again to go on"):
        get(server.remote())
    monkeypatch.undo()
    assert "model.pth" not in get.names()
    assert get(server.remote()).read_bytes() == GOOD


def test_fetch_interrupted_keeps_the_part(server: Server, get: Get) -> None:
    def interrupt(received: int, _: int | None) -> None:
        if received:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server.remote(), progress=interrupt)
    kept = get.part().stat().st_size
    assert 0 < kept < len(GOOD)
    assert get(server.remote()).read_bytes() == GOOD
    assert server.asked[1]["Range"] == f"bytes={kept}-"


def test_complete_part_needs_no_server(server: Server, get: Get) -> None:
    get(server.remote())
    (get.folder / "model.pth").rename(get.part())
    note = {"url": server.url, "validator": server.etag, "total": len(GOOD)}
    (get.folder / "model.pth.part.json").write_text(json.dumps(note))
    assert get(server.remote()).read_bytes() == GOOD
    assert len(server.asked) == 1


def test_part_of_another_url_is_not_resumed(server: Server, get: Get) -> None:
    server.answers = [Answer(stop=5000)]
    with pytest.raises(DownloadError):
        get(server.remote(), attempts=1)
    server.answers = []
    assert get(server.remote(url=server.url + "?v=2")).read_bytes() == GOOD
    assert "Range" not in server.asked[1]


def test_two_downloads_at_once_have_a_part_each(server: Server, get: Get) -> None:
    def second(received: int, _: int | None) -> None:
        if received == 0:
            assert get(server.remote()).read_bytes() == GOOD

    server.answers = [Answer(stop=5000)]
    with pytest.raises(DownloadError):
        get(server.remote(), attempts=1)
    server.answers = []
    assert get(server.remote(), progress=lambda received, total: second(received - 5000, total)).read_bytes() == GOOD
    assert ["Range" in headers for headers in server.asked] == [False, True, False]
    assert get.names() == {"model.pth"}


def test_second_of_two_downloads_leaves_nothing_on_failure(server: Server, get: Get) -> None:
    def second(received: int, _: int | None) -> None:
        if received == 0:
            server.answers = [Answer(stop=5000)]
            with pytest.raises(DownloadError):
                get(server.remote(), attempts=1)
            server.answers = []
            assert get.names() == {"model.pth.part", "model.pth.part.json"}

    assert get(server.remote(), progress=second).read_bytes() == GOOD
    assert get.names() == {"model.pth"}


def test_part_renamed_while_opened_is_not_written(server: Server, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(*_: Any) -> None:  # the other process, which had the lock until now
        get.part().rename(get.folder / "other.pth")

    monkeypatch.setattr(fcntl, "flock", finish)
    assert get(server.remote()).read_bytes() == GOOD
    assert (get.folder / "other.pth").read_bytes() == b""
    assert get.names() == {"model.pth", "other.pth"}


def test_downloads_without_locks_have_a_part_each(server: Server, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    server.answers = [Answer(stop=5000), Answer()]
    assert get(server.remote()).read_bytes() == GOOD
    assert server.asked[1]["Range"] == "bytes=5000-"


def test_part_of_a_killed_process_is_resumed(server: Server, get: Get) -> None:
    get.folder.mkdir()
    get.part().write_bytes(GOOD[:5000])
    note = {"url": server.url, "validator": server.etag, "total": len(GOOD)}
    (get.folder / "model.pth.part.json").write_text(json.dumps(note))
    holder = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, get.part()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(DownloadError, match=r"has 1\.0 MiB"):  # not resumed meanwhile
            get(server.remote(mebibytes=254))
        assert get.part().read_bytes() == GOOD[:5000]
        process.kill()
    assert get(server.remote()).read_bytes() == GOOD
    assert ["Range" in headers for headers in server.asked] == [False, True]


def test_progress_bar_shows_reported_bytes(server: Server, get: Get, capsys: pytest.CaptureFixture[str]) -> None:
    with download.progress_bar("MAR") as show:
        get(server.remote(), progress=show)
    assert "1.0/1.0 MB" in capsys.readouterr().err.replace("1.1", "1.0")


def test_download_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAR_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("MAR_HOME")
    assert home() == Path.home() / ".cache" / "mar"


def test_official_files_have_urls_and_distinct_names() -> None:
    remotes = [remote for files in OFFICIAL.values() for remote in files]
    assert len({remote.name for remote in remotes}) == len({remote.url for remote in remotes}) == len(remotes)
    for remote in remotes:
        assert remote.url.endswith("&dl=1") or remote.url.startswith("hf://")
        assert all(url.startswith(("https://", "hf://")) for url in remote.others)


def test_server_of_an_address_has_no_password() -> None:
    assert download._server("https://me:secret@example.org:8443/mar/a.pth") == "example.org:8443"
