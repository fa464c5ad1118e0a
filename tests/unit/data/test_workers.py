"""Processes that read ahead: they share batches without /dev/shm, their end is noticed, and waits for them end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from readers import Facts, Killed, Stuck, Threaded
from tiny import open_tiny_run, tiny_train_config, write_images

from mar.config import ConfigError
from mar.data import workers
from mar.data.workers import WorkerDied, _pack, check_shared_memory, has_memfd, make_dataloader
from mar.training import trainer
from mar.training.log import open_log

LIMIT_S = 100
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux's")


def numbers(data: Any, count: int = 4, **options: Any) -> Any:
    return make_dataloader(data, batches=[[i] for i in range(count)], collate=list, **options)


# ---- sharing


@linux
def test_pack_tensors_of_every_kind_come_out_the_same() -> None:
    batch = {
        "float": torch.randn(3, 5),
        "turned": torch.randn(4, 6).t(),
        "bf16": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 2, 2).half(),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "text": ("a", "b"),
    }
    parcel = _pack(batch)
    unpacked = parcel.unpack()
    assert unpacked["text"] == batch["text"]
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor):
            assert unpacked[name].dtype == tensor.dtype
            assert torch.equal(unpacked[name], tensor)
    unpacked["float"].mul_(2)  # batches may be changed in place
    assert torch.equal(unpacked["float"], 2 * batch["float"])


@linux
def test_pack_without_tensors_needs_no_memory() -> None:
    parcel = _pack(["a", 1])
    assert parcel.memory is None
    assert parcel.unpack() == ["a", 1]


@linux
def test_unpack_leaves_no_open_files() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        _pack([torch.ones(100)]).unpack()
    assert len(os.listdir("/proc/self/fd")) <= before + 5  # the sharer's own


def stat_of(free: int) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)


def test_check_shared_memory_too_small_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: stat_of(64 * 2**20))
    check_shared_memory(6 * 2**20, 4)  # 10 batches: 60 MiB
    expected = (
        r"workers: 4 processes that read ahead need 70\.0 MiB of shared memory, but /dev/shm has 64\.0 MiB free; start "
        r"the container with more \(docker run --shm-size 141m\), or take --workers 0"
    )
    with pytest.raises(ConfigError, match=expected):
        check_shared_memory(7 * 2**20, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"need 120\.0 MiB"):
        check_shared_memory(6 * 2**20, 4)


def test_check_shared_memory_absent_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/no/such/folder")
    check_shared_memory(2**40, 8)


def test_make_dataloader_without_memfd_checks_and_shares_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "has_memfd", lambda: False)
    assert [*numbers(Killed("exit"), 2, workers=1)] == [[0], [1]]
    monkeypatch.setattr(os, "statvfs", lambda path: stat_of(2**20))
    with pytest.raises(ConfigError, match="--shm-size"):
        numbers(Killed("exit"), 2, workers=1, batch_bytes=2**20)


def test_make_dataloader_of_more_workers_than_cores_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would warn of it, and warnings are errors here."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    assert [*numbers(Killed("exit"), 2, workers=2)] == [[0], [1]]


def test_make_dataloader_processes_refused_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(loader: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workers.DataLoader, "__iter__", refuse)
    with pytest.raises(ConfigError, match=r"2 processes that read ahead can't be started .*--workers 0"):
        numbers(Killed("exit"), 2, workers=2)


def can_unshare() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False).returncode == 0
    except OSError:
        return False


@linux
def test_cache_with_a_tiny_shm_is_that_of_one_process(tmp_path: Path) -> None:
    if not (can_unshare() and has_memfd()):
        pytest.skip("no user namespaces here")
    write_images(tmp_path / "data", 24)
    words = [sys.executable, "-m", "mar", "cache", str(tmp_path / "data"), "--tokenizer", "pixels"]
    words += ["--image-size", "128", "--batch", "8"]  # 24 MB in all, in /dev/shm of 64 KiB
    inside = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    for name, before in (("alone", []), ("two", ["unshare", "-rm", "sh", "-c", inside, "sh"])):
        count = "2" if before else "0"
        command = [*before, *words, "--workers", count, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "alone" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


# ---- the start of workers


@linux
def test_workers_after_threads_of_the_parent_do_not_hang() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(400, 400) @ torch.ones(400, 400)
        timer = threading.Timer(LIMIT_S, os.kill, (os.getpid(), signal.SIGINT))  # an end for a hang
        timer.start()
        (product,) = next(numbers(Threaded(), workers=1))
        timer.cancel()
        assert product[0, 0] == 400
    finally:
        torch.set_num_threads(threads)


@linux
def test_workers_block_signals_and_this_process_does_not() -> None:
    ((pid, blocked),) = next(numbers(Facts(), workers=1))
    assert pid != os.getpid()
    assert {signal.SIGINT, signal.SIGTERM} <= blocked
    assert not {signal.SIGINT, signal.SIGTERM} & set(signal.pthread_sigmask(signal.SIG_BLOCK, set()))


PARENT = """
import sys, time
from readers import Facts
from mar.data.workers import make_dataloader

if __name__ == "__main__":
    reads = make_dataloader(Facts(), workers=1, batches=[[i] for i in range(4)], collate=list)
    print(next(reads)[0][0], flush=True)
    time.sleep(600)
"""


@linux
def test_workers_end_when_their_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert Path("/proc", str(worker)).exists()
        parent.kill()
    wait_until(lambda: not alive(worker))


def alive(pid: int) -> bool:
    try:
        state = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may wait for an orphan in a container


def wait_until(true: Any) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


# ---- the end of workers


@pytest.mark.parametrize(("how", "said"), [("SIGKILL", "was ended by SIGKILL"), ("exit", "ended with exit code 3")])
def test_worker_that_ends_is_one_line(how: str, said: str) -> None:
    reads = numbers(Killed(how), workers=1)
    read: list[Any] = []
    with pytest.raises(WorkerDied, match=rf"a process that reads pictures {said}: .*fewer --workers"):
        read.extend(reads)  # a batch that was not yet sent may be lost
    assert read == [[0], [1]][: len(read)]


@linux
def test_cache_worker_killed_ends_with_one_line(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 2000)
    words = [sys.executable, "-m", "mar", "cache", str(tmp_path / "data"), "--tokenizer", "pixels", "--out"]
    words += [str(tmp_path / "c"), "--image-size", "256", "--workers", "2", "--shard", "64"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: workers_of(process.pid) or process.poll() is not None)
            os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
            begun = time.monotonic()
            _, said = process.communicate(timeout=LIMIT_S)
            seconds = time.monotonic() - begun
        finally:
            process.kill()
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "a process that reads pictures was ended by SIGKILL" in said.strip().splitlines()[-1]
    assert seconds < LIMIT_S / 2


def workers_of(pid: int) -> list[int]:
    """Return the grandchildren of a process: those of the server that forks workers."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return [child for child, parent in parents.items() if parents.get(parent) == pid]


# ---- waits


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_signal_while_pictures_do_not_come_saves_and_ends(
    tmp_path: Path, count: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "WAIT_AFTER_SIGNAL_S", 0.3)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    run = open_tiny_run(tiny_train_config(write_images(tmp_path / "data"), workers=count), tmp_path / "run")
    run.source = Stuck(8)  # two steps of 4
    log = open_log(run)
    timer = threading.Timer(6, os.kill, (os.getpid(), number))
    timer.start()
    begun = time.monotonic()
    try:
        assert not trainer.train(run, log)
    finally:
        timer.cancel()
        log.close()
    assert time.monotonic() - begun < LIMIT_S / 2
    assert 0 < run.progress.images <= 8
    assert (tmp_path / "run" / f"state-{run.progress.images:012d}").is_dir()


def test_train_signal_before_a_slow_batch_finishes_the_step(tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(write_images(tmp_path / "data")), tmp_path / "run")
    run.source = Stuck(4, seconds=0.3)
    log = open_log(run)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        assert not trainer.train(run, log)
    finally:
        timer.cancel()
        log.close()
    assert run.progress.images % 4 == 0
    assert run.progress.images > 0


@linux
def test_pinned_error_is_itself() -> None:
    """The loader pins what workers send; the reader then raises the error."""
    error = _pack(ValueError("row 3 is damaged")).pin_memory()
    assert isinstance(error, ValueError)
    assert str(error) == "row 3 is damaged"
