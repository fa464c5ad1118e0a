"""Temporaries of living processes stay, those of dead ones go, and files of people stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mar.checkpoint import owners
from mar.checkpoint.owners import Owner, clear_leftovers, temporary_folder, this_process

WRITER = """
import sys, time
from pathlib import Path
from mar.checkpoint.owners import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(bytes(1000))
    print("up", flush=True)
    time.sleep(60)
"""
needs_flock = pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")


@contextmanager
def writer(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is writing to a temporary."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def leave(folder: Path, owner: Owner, age: float = 0.0) -> Path:
    """A temporary of some process, of which nothing has changed for `age` seconds."""
    left = folder / f".mar-tmp-{owner.kernel}-{owner.space}-{owner.pid}-{owner.start}-0123abcd"
    left.mkdir()
    (left / "half").write_bytes(bytes(10))
    for path in (left / "half", left):
        os.utime(path, (time.time() - age,) * 2)
    return left


def test_temporary_of_a_living_process_stays_of_a_killed_one_goes(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        clear_leftovers(tmp_path)
        assert [path.name for path in tmp_path.glob("*/half")] == ["half"]
        process.kill()
        while owners._runs(process.pid, 0):  # until only its exit code is left: nobody has asked for it
            time.sleep(0.01)
        clear_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_temporary_is_in_the_way_of_no_other_and_ends_with_its_block(tmp_path: Path) -> None:
    def interrupted() -> None:
        with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
            assert first != second
            assert owners.is_ours(first.name)
            clear_leftovers(tmp_path)
            assert first.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_temporary_of_a_process_whose_number_another_has_goes(tmp_path: Path) -> None:
    ours = this_process()
    assert ours.start > 0
    leave(tmp_path, replace(ours, start=ours.start - 1))
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age", "stays"), [(3600.0, True), (25 * 3600.0, False)])
def test_temporary_of_another_machine_goes_after_a_day(age: float, stays: bool, tmp_path: Path) -> None:
    left = leave(tmp_path, Owner("00000000", "00000000", 1, 1), age)
    clear_leftovers(tmp_path)
    assert left.exists() == stays


@pytest.mark.parametrize(("age", "stays"), [(300.0, True), (700.0, False)])
def test_temporary_of_this_machine_before_its_last_start_goes_soon(age: float, stays: bool, tmp_path: Path) -> None:
    left = leave(tmp_path, replace(this_process(), kernel="00000000"), age)
    clear_leftovers(tmp_path)
    assert left.exists() == stays


@needs_flock
@pytest.mark.parametrize(("locked", "age", "stays"), [(True, 99.0, True), (False, 99.0, False), (False, 9.0, True)])
def test_temporary_of_another_container_is_known_by_its_lock(
    locked: bool, age: float, stays: bool, tmp_path: Path
) -> None:
    left = leave(tmp_path, replace(this_process(), space="00000000"), age)
    handle = os.open(left, os.O_RDONLY)
    if locked:
        assert owners.flock(handle)
    clear_leftovers(tmp_path)
    owners.close(handle)
    assert left.exists() == stays


def test_clear_leftovers_looks_into_a_runs_folders(tmp_path: Path) -> None:
    dead = replace(this_process(), start=1)
    for name in owners.SUBFOLDERS:
        (tmp_path / name).mkdir()
        leave(tmp_path / name, dead)
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {*owners.SUBFOLDERS}


def test_clear_leftovers_keeps_files_of_people(tmp_path: Path) -> None:
    name = leave(tmp_path, replace(this_process(), start=1)).name
    clear_leftovers(tmp_path)
    (tmp_path / name).write_text("a file of that name")
    (tmp_path / "target").mkdir()
    (tmp_path / name.replace("0123abcd", "0123abce")).symlink_to(tmp_path / "target")
    (tmp_path / ".mar-tmp-notes").mkdir()
    (tmp_path / ".mar-lock").write_text("mine")
    (tmp_path / ".tmpabcdef").write_bytes(b"mine")
    (tmp_path / ".model.safetensors.abcdefgh").write_bytes(b"mine")
    old = time.time() - 48 * 3600
    for path in tmp_path.iterdir():
        os.utime(path, (old, old), follow_symlinks=False)
    before = {*tmp_path.iterdir()}
    clear_leftovers(tmp_path)
    assert {*tmp_path.iterdir()} == before


def test_clear_leftovers_removes_old_temporaries_of_weights_only(tmp_path: Path) -> None:
    header = (40).to_bytes(8, "little") + b'{"__metadata__":{"mar":"{}"}'
    paths = [tmp_path / name for name in (".tmpAAAAAA", ".tmpBBBBBB", ".tmpCCCCCC")]
    for path, content in zip(paths, (header, header, header.replace(b"mar", b"rum")), strict=True):
        path.write_bytes(content)
    old = time.time() - 48 * 3600
    for path in (paths[0], paths[2]):
        os.utime(path, (old, old))
    clear_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == paths[1:]  # the second may be a living process's


def test_clear_leftovers_of_a_folder_that_is_none_does_nothing(tmp_path: Path) -> None:
    clear_leftovers(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    clear_leftovers(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
