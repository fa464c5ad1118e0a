"""Nothing waits for ever: pipes, narrow terminals. Each command has a hard limit."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import write_images

from mar.checkpoint import files
from mar.checkpoint.files import CheckpointError, check_regular, read_file_or_pipe
from mar.cli import VERBS
from mar.sampling.plan import read_prompts

LIMIT_S = 100
"""Hard limit of a command on a busy machine; a hang would take it all."""


def run_mar(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mar", *map(str, arguments)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, env=environ, stdin=subprocess.DEVNULL)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mar: ")
    assert all(part in last for part in parts), last


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    return path


# ---- narrow terminals


@pytest.mark.parametrize("columns", ["1", "5", "0", "-5", "10", "1000000", "many", ""])
def test_help_any_columns_ends(columns: str) -> None:
    done = run_mar("sample", "--help", COLUMNS=columns)
    assert done.returncode == 0, done.stderr
    assert "--guidance-scale" in done.stdout
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 1000


@pytest.mark.parametrize("verb", [*VERBS, "train folder", "tokenizer train"])
def test_help_of_every_verb_in_one_column_ends(verb: str) -> None:
    done = run_mar(*verb.split(), "--help", COLUMNS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def test_unknown_option_in_one_column_is_refused() -> None:
    assert_refused(run_mar("info", "--no-such", COLUMNS="1"), "--no-such")


# ---- what is no regular file


def test_check_regular_takes_files_links_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link", "absent", "."):
        check_regular(tmp_path / name)


def test_check_regular_special_files_are_named(tmp_path: Path, fifo: Path) -> None:
    (tmp_path / "link.png").symlink_to(fifo)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "s"))
        for path, kind in ((fifo, "a pipe"), (tmp_path / "link.png", "a pipe"), (tmp_path / "s", "a socket")):
            with pytest.raises(CheckpointError, match=rf"{path.name} is {kind}, expected a regular file"):
                check_regular(path)
    with pytest.raises(CheckpointError, match="/dev/zero is a device"):
        check_regular("/dev/zero")


PIPES = {
    "info": ("info", "PIPE"),
    "verify": ("verify", "PIPE"),
    "sample": ("sample", "PIPE", "--out", "o"),
    "generate": ("generate", "PIPE", "--count", "1", "--out", "o"),
    "convert": ("convert", "PIPE", "o.safetensors"),
    "evaluate": ("evaluate", "PIPE", "--reference", "fashion", "--features", "efficientnet-lite0"),
    "reference": ("evaluate", "fashion", "--reference", "PIPE", "--features", "efficientnet-lite0"),
    "features": ("evaluate", "fashion", "--reference", "fashion", "--features", "PIPE:f"),
    "weights": ("stats", "fashion", "--out", "o.npz", "--features", "efficientnet-lite0", "--weights", "PIPE"),
    "stats": ("stats", "PIPE", "--out", "o.npz", "--features", "efficientnet-lite0"),
    "cache": ("cache", "PIPE", "--tokenizer", "pixels", "--image-size", "8", "--out", "c"),
    "tokenizer": ("cache", "fashion", "--tokenizer", "PIPE", "--image-size", "8", "--out", "c"),
    "data": ("train", "fashion", "--data", "PIPE", "--out", "r"),
    "stream": ("train", "fashion", "--data", "stream:PIPE", "--out", "r"),
    "folder": ("train", "folder", "--data", "PIPE", "--out", "r"),
    "init": ("train", "fashion", "--init", "PIPE", "--out", "r"),
    "official": ("train", "fashion", "--resume-official", "PIPE", "--out", "r"),
    "known": ("sample", "fashion", "--known", "PIPE", "--mask", "PIPE", "--out", "o"),
    "tokenizer-train": ("tokenizer", "train", "PIPE", "--out", "t", "--image-size", "8"),
    "prompts": ("sample", "emoji", "--prompts", "PIPE", "--out", "o"),
    "labels": ("generate", "fashion", "--labels-file", "PIPE", "--out", "o"),
}


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("suffix", ["", ".pth", ".tar", ".safetensors", ".npz"])
def test_command_pipe_given_directly_is_refused(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mar.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "PIPE_PATIENCE_S", 0.1)
    path = tmp_path / f"p{suffix}"
    if name == "features" and suffix:
        pytest.skip("a module's file has one ending")
    path = path.with_suffix(".py") if name == "features" else path
    os.mkfifo(path)
    release = threading.Timer(LIMIT_S / 5, _release, [path])  # a hang becomes an end of file, and a failure
    release.start()
    code = main([word.replace("PIPE", str(path)) for word in PIPES[name]])
    hung = not release.is_alive()
    release.cancel()
    said = capsys.readouterr().err.strip().splitlines()
    assert not hung
    assert code == 2, said
    assert said[-1].startswith("mar: ")
    assert f"{path} is a pipe" in said[-1], said


def _release(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def test_sample_mask_from_a_device_is_refused(tmp_path: Path) -> None:
    done = run_mar("sample", "fashion", "--known", "/dev/zero", "--mask", "/dev/zero", "--out", tmp_path / "o")
    assert_refused(done, "/dev/zero is a device")


def test_cache_folder_with_pipes_accounts_for_them(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 4)
    os.mkfifo(tmp_path / "data" / "x.png")
    os.mkfifo(tmp_path / "data" / "down" / "0.txt")
    done = run_mar("cache", tmp_path / "data", "--tokenizer", "pixels", "--image-size", "8", "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert "left out: pipes, sockets and devices: 2" in done.stderr


def test_train_run_folder_with_pipes_ends(tmp_path: Path) -> None:
    for name in ("log.jsonl", "latest"):
        folder = tmp_path / name
        folder.mkdir()
        os.mkfifo(folder / name)
        os.mkfifo(folder / "config.json")
        tiny = ["--model.encoder.depth", "1", "--model.decoder.depth", "1", "--model.head.depth", "1"]
        done = run_mar("train", "fashion", "--out", folder, "--images", "16", "--batch", "16", *tiny)
        assert done.returncode in (0, 2), done.stderr
        assert "Traceback" not in done.stderr
        if name == "log.jsonl":
            assert_refused(done, "log.jsonl is a pipe")


# ---- lists of text may come from a pipe


def test_read_prompts_pipe_with_a_writer_is_read(tmp_path: Path, fifo: Path) -> None:
    writer = threading.Thread(target=fifo.write_text, args=("a cat\n" * 20_000,))  # more than a pipe holds
    writer.start()
    assert read_prompts(fifo) == ["a cat"] * 20_000
    writer.join(LIMIT_S)


def test_read_file_or_pipe_without_a_writer_is_refused(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIPE_PATIENCE_S", 0.05)
    with pytest.raises(CheckpointError, match=r"pipe.png is a pipe that nothing was written to in 0.05 seconds"):
        read_file_or_pipe(fifo)


def test_read_file_or_pipe_slow_writer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "PIPE_PATIENCE_S", 0.05)
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            threading.Event().wait(0.5)
            file.write(b"a dog\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert read_file_or_pipe(f"/dev/fd/{reading}") == b"a dog\n"
    finally:
        writer.join(LIMIT_S)
        os.close(reading)
    assert capsys.readouterr().err == f"mar: waiting for the end of the pipe /dev/fd/{reading}\n"


def test_read_file_or_pipe_endless_writer_is_refused(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_PIPED_BYTES", 2**18)
    writer = subprocess.Popen(["sh", "-c", f"yes > '{fifo}'"], stderr=subprocess.DEVNULL)
    try:
        with pytest.raises(CheckpointError, match=r"gave more than 256\.0 KiB, expected a list of lines"):
            read_file_or_pipe(fifo)
    finally:
        writer.wait(LIMIT_S)


def test_read_file_or_pipe_several_ranks_are_refused(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="only one process can read"):
        read_file_or_pipe(fifo)


@pytest.mark.skipif(shutil.which("bash") is None, reason="process substitution is bash's")
def test_generate_labels_of_a_process_substitution_are_read(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mar generate fashion --labels-file <(echo dress; echo bag) --out {tmp_path / 'o'}"
    command += " --preset fast --steps 2 --diffusion-steps 2 --allow-broken"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "o").rglob("*.png")]) == 2
