"""One command at a time writes an output; the locks of ended ones are taken over."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mar.checkpoint import locks, owners
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.locks import InUse, exclusive
from mar.checkpoint.owners import LOCK, Owner, clear_leftovers, this_process

HOLDER = """
import os, sys, time
from pathlib import Path
from mar.checkpoint.locks import exclusive
with exclusive(Path(sys.argv[1])):
    if len(sys.argv) > 2 and not os.fork():
        time.sleep(20)
        os._exit(0)
    print("up", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(out: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the lock of an output."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out), *more], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()
        process.stdout.close()


def left_by(out: Path, owner: Owner, host: str = "far") -> Path:
    """The lock of some process."""
    out.mkdir(exist_ok=True)
    path = out / LOCK
    note = {**asdict(owner), "host": host, "since": "2026-01-02 03:04:05+00:00", "command": "mar train"}
    path.write_text(json.dumps(note, indent=1))
    return path


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "flock", lambda handle: None)


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("without", [(), ("no_flock",), ("no_links",), ("no_flock", "no_links")])
def test_lock_of_a_living_process_is_respected_of_a_killed_one_taken_over(
    without: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for name in without:  # here: the other process has both
        request.getfixturevalue(name)
    out = tmp_path / "out"
    with holder(out) as process:
        with pytest.raises(InUse, match=rf"out is in use by process {process.pid} on .* since 20\d\d-") as caught:
            exclusive(out).__enter__()
        assert str(caught.value).endswith("; wait for its end, or take another --out")
        assert "\n" not in str(caught.value)
        clear_leftovers(out)
        assert (out / LOCK).exists()
        process.kill()
        process.wait()
        with exclusive(out):
            assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()
        assert list(out.iterdir()) == []


def test_lock_of_a_killed_process_is_cleared_by_any_command(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lock_ends_with_its_process_not_with_its_children(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as process:
        process.kill()
        process.wait()
        assert not owners.is_flocked(tmp_path / LOCK)
        with exclusive(tmp_path):
            pass


def test_lock_within_a_lock_is_the_same_but_not_for_other_threads(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            exclusive(tmp_path).__enter__()
        except InUse as error:
            refused.append(error)

    with exclusive(tmp_path), exclusive(tmp_path):
        clear_leftovers(tmp_path)
        assert (tmp_path / LOCK).exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_relative_path_is_not_taken_for_a_stale_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with exclusive(Path("out")):
        for path in (Path("out"), tmp_path / "link"):
            clear_leftovers(path)
            assert (tmp_path / "out" / LOCK).exists()


@pytest.mark.parametrize("renewed", [True, False])
def test_lock_of_another_machine_is_watched(
    renewed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "WATCH_S", 0.5)
    path = left_by(tmp_path, Owner("00000000", "00000000", 12, 1))
    clear_leftovers(tmp_path)
    assert path.exists()
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.02):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=renew)
    if renewed:
        thread.start()
    try:
        if renewed:
            with pytest.raises(InUse, match=rf"process 12 on far since .*; if that has ended .* remove {path}; wait"):
                exclusive(tmp_path).__enter__()
        else:
            with exclusive(tmp_path):
                assert json.loads(path.read_text())["pid"] == os.getpid()
            assert "process 12 on far since 2026-01-02 03:04:05+00:00 (mar train) has ended" in caplog.text
    finally:
        ended.set()
        if renewed:
            thread.join()


def test_lock_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    with exclusive(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
@pytest.mark.parametrize("locked", [True, False])
def test_lock_of_another_container_is_known_by_its_flock(locked: bool, tmp_path: Path) -> None:
    path = left_by(tmp_path, replace(this_process(), space="00000000"))
    handle = os.open(path, os.O_RDWR)
    if locked:
        assert owners.flock(handle)
        with pytest.raises(InUse, match="on far since"):
            exclusive(tmp_path).__enter__()
    else:
        with exclusive(tmp_path):
            pass
    owners.close(handle)


def test_lock_of_this_process_before_it_became_another_program_is_taken_over(tmp_path: Path) -> None:
    left_by(tmp_path, this_process())
    with exclusive(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_cut_short_is_taken_over_a_persons_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    for text in ("", '{\n "kernel": "01', "mine"):
        path.write_text(text)
        os.utime(path, (0, 0))
        if text == "mine":
            with pytest.raises(InUse, match=f"{path} is there, but is no lock of mar's; move it away"):
                exclusive(tmp_path).__enter__()
        else:
            with exclusive(tmp_path):
                pass
    assert path.read_text() == "mine"


def test_lock_of_a_command_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_file_is_beside_it(tmp_path: Path) -> None:
    out = tmp_path / ("n" * 250 + ".npz")
    with exclusive(out, is_file=True):
        [lock] = tmp_path.iterdir()
        assert owners.is_ours(lock.name)
        with exclusive(tmp_path / "other.npz", is_file=True):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_lock_of_a_folder_that_cannot_be_written_is_not_needed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with exclusive(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_lock_on_a_full_disk_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=f"can't write {tmp_path}: No space left on device"):
        exclusive(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
