"""Kills, failing writes and pairs of commands: nothing is left after the next command, and nothing is lost."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import processes
import pytest
import tiny
import torch
from PIL import Image

from mar.checkpoint import files, official
from mar.checkpoint.download import RemoteFile, fetch
from mar.checkpoint.run_state import RunState
from mar.checkpoint.tokenizers import load_tokenizer, save_tokenizer
from mar.cli import main
from mar.config import ModelConfig, TrunkConfig
from mar.data.latent_cache import INDEX, MANIFEST, LatentSource
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer
from mar.tokenizer.pca import PCATokenizer

KILLS = int(os.environ.get("MAR_KILLS", "2"))
"""Of each kind of writing."""
WRITES = ("model", "official", "state", "tokenizer", "download", "cache")
FULL = OSError(errno.ENOSPC, "No space left on device")


def write_for_ever(kind: str, out: Path) -> None:
    """Write files of some MB again and again; `up` is there once all have been written."""
    trunk = TrunkConfig(width=256, depth=2, num_heads=2)
    model = MAR(ModelConfig(channels=1, grid=(4, 4), encoder=trunk, decoder=trunk, buffer_size=2, classes=3))
    pipeline = Pipeline(model, PixelTokenizer(1, mean=0.0, std=1.0), classes=("a", "b", "c"))
    tokenizer = PCATokenizer(3, 16, 768)
    state = {"w": [torch.ones(10**6), torch.ones(10**6)]}
    (out.parent / "mirror").mkdir()
    (out.parent / "mirror" / "file.bin").write_bytes(bytes(10**7))
    (out.parent / "pictures").mkdir()
    for i in range(16):
        Image.fromarray(np.full((256, 256, 3), i, dtype=np.uint8)).save(out.parent / "pictures" / f"{i}.png")
    number = 0
    while True:
        number += 1
        if kind == "model":
            pipeline.save(out / "model.safetensors")
        elif kind == "official":
            official.write_mar(out / "model.pth", model.config, model.state_dict(), model.state_dict())
        elif kind == "state":
            RunState(out).save(number, state)
        elif kind == "tokenizer":
            save_tokenizer(tokenizer, out)
        elif kind == "cache":
            if out.exists():
                out.rename(out.parent / f"old{number}")
            assert main(cache_command(out)) == 0
        else:
            (out / "file.bin").unlink(missing_ok=True)
            fetch(RemoteFile("file.bin", "https://none.invalid"), out, mirror=out.parent / "mirror")
        (out.parent / "up").touch()


def cache_command(out: Path) -> list[str]:
    settings = ["--tokenizer", "pixels", "--image-size", "256", "--shard", "4", "--device", "cpu"]
    return ["cache", str(out.parent / "pictures"), "--out", str(out), *settings]


def next_command(kind: str, out: Path) -> None:
    """What a person may do next: open what was written, or have it fetched."""
    if kind == "download":
        fetch(RemoteFile("file.bin", "https://none.invalid"), out, mirror=out.parent / "mirror")
    elif kind == "cache":
        assert main(cache_command(out)) == 0
    elif kind == "model":
        assert main(["info", str(out / "model.safetensors")]) == 0
    else:
        main(["info", str(out / "model.pth" if kind == "official" else out)])  # which may say that it can't read it


def expected_files(kind: str, out: Path) -> set[Path]:
    """What is to be there."""
    if kind == "state":
        states = RunState(out).states()
        assert 1 <= len(states) <= 4
        assert all(main(["verify", str(out)]) == 0 for _ in states[:1])
        return {out / "latest", *(path for state in states for path in state.iterdir())}
    if kind == "cache":
        LatentSource(out)
        return {out / name for name in (MANIFEST, INDEX, *(f"{shard:05}.safetensors" for shard in range(4)))}
    names = {"tokenizer": ["config.json", "tokenizer.safetensors"], "download": ["file.bin"]}
    return {out / name for name in names.get(kind, ["model.safetensors" if kind == "model" else "model.pth"])}


@pytest.mark.parametrize("kind", WRITES)
def test_writing_killed_anywhere_leaves_nothing_after_the_next_command(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws, during = random.Random(kind), 0
    for number in range(KILLS):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        process = processes.start_work(write_for_ever, kind, out)
        while not (out.parent / "up").exists():
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(draws.uniform(0.0, 0.3))
        process.kill()
        process.join()
        during += any(".mar-tmp-" in str(path) for path in out.rglob("*"))
        next_command(kind, out)
        assert {path for path in out.rglob("*") if path.is_file()} == expected_files(kind, out)
        assert not [path for path in out.rglob(".*") if path.is_dir()]
        if kind == "tokenizer":
            load_tokenizer(out)  # both files are of one time
        shutil.rmtree(out.parent)
    capsys.readouterr()
    print(f"{kind}: {during} of {KILLS} kills left a temporary, 0 bytes are left after the next command")


# ---- verbs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.tiny_pipeline().save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def commands(model: Path, pictures: Path, out: Path) -> dict[str, list[str]]:
    """Every verb that writes, with its output `out`."""
    small = [f"--model.{part}.{name}" for part in ("encoder", "decoder") for name in ("width", "num-heads", "depth")]
    sizes = [word for name, size in zip(small, ("16", "2", "1") * 2, strict=True) for word in (name, size)]
    sizes += ["--model.head.width", "16", "--model.head.depth", "1", "--model.grid", "8", "8", "--model.classes", "2"]
    run = ["--images", "16", "--batch", "4", "--device", "cpu", "--sample-every", "0"]
    extractor = ["--features", f"{extractors.__file__}:tiny", "--device", "cpu"]
    return {
        "sample": ["sample", str(model), "--out", f"{out}", "--allow-broken", "--device", "cpu"],
        "demo": ["demo", "--out", f"{out}", "--device", "cpu"],
        "generate": ["generate", str(model), "--out", f"{out}", "--count", "4", "--allow-broken", "--device", "cpu"],
        "npz": ["generate", str(model), "--out", f"{out}.npz", "--count", "4", "--allow-broken", "--device", "cpu"],
        "evaluate": ["evaluate", str(pictures), "--reference", str(pictures), *extractor, "--out", f"{out}.json"],
        "stats": ["stats", str(pictures), "--out", f"{out}.npz", *extractor],
        "cache": ["cache", str(pictures), "--tokenizer", "pixels", "--image-size", "8", "--out", f"{out}"],
        "convert": ["convert", str(model), f"{out}.safetensors"],
        "train": ["train", "fashion", "--data", str(pictures), "--out", f"{out}", *sizes, *run],
        "tokenizer": ["tokenizer", "train", str(pictures), "--out", f"{out}", "--kind", "residual", "--width", "8",
                      "--image-size", "8", "--stride", "2", "--channels", "4", "--images", "8", "--batch", "4",
                      "--device", "cpu", "--perceptual", "0"],
    }  # fmt: skip


VERBS = [*commands(Path(), Path(), Path())]
WORK = (
    "mar.zoo.load", "mar.pipeline.Pipeline.sample", "mar.pipeline.Pipeline.stream", "mar.evaluation.evaluate.collect",
    "mar.data.cache_writer.write_shards", "mar.pipeline.Pipeline.save", "mar.training.trainer.train",
    "mar.training.run.open_run", "mar.training.tokenizer.open_tokenizer_run", "mar.evaluation.features.open_extractor",
)  # fmt: skip
"""What takes time. `mar generate` opens the model to know if its output is finished."""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def leftovers(folder: Path) -> list[Path]:
    """Temporaries and locks, ours and those of safetensors."""
    return [path for path in folder.rglob(".*") if path.name.startswith((".mar-", ".tmp"))]


def forbidden(*arguments: Any, **options: Any) -> None:
    raise AssertionError("it worked before it tried its output")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", ["file/out", "new/" + "n" * 300])
def test_verb_tries_its_output_before_the_work(
    verb: str, place: str, model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("a file")
    before = tree(tmp_path)
    for work in WORK:
        if not (work == "mar.zoo.load" and verb in ("generate", "npz")):
            monkeypatch.setattr(work, forbidden)
    assert main(commands(model, pictures, tmp_path / place)[verb]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mar: ")
    assert place[:20] in error or "no folder" in error
    assert tree(tmp_path) == before


@contextmanager
def disk_full_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the n-th wait for the disk on, there is no room."""
    flush, seen = files.flush, 0

    def full(path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen >= moment:
            raise FULL
        flush(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "flush", full)
        yield


@pytest.mark.parametrize("moment", [1, 3])
@pytest.mark.parametrize("verb", VERBS)
def test_verb_on_a_full_disk_says_the_path_and_goes_on_later(
    verb: str, moment: int, model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = commands(model, pictures, tmp_path / "out")[verb]
    with disk_full_at(moment, monkeypatch):
        code = main(command)
    if moment == 1 or verb not in ("evaluate", "stats", "convert", "demo"):  # which write one or two files
        error = capsys.readouterr().err.splitlines()[-1]
        assert (code, error[:18]) == (2, f"mar: can't write {tmp_path}"[:18])
        assert "No space left on device" in error
    assert not leftovers(tmp_path)
    assert main(command) == 0
    assert not leftovers(tmp_path)


def test_tokenizer_whose_files_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    """By a real limit of the size of files, which the writer in Rust meets."""
    save_tokenizer(PCATokenizer(1, 2, 4), tmp_path)
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(files.CheckpointError, match=f"can't write {tmp_path}.*: .*(too large|code: 27)"):
            save_tokenizer(PCATokenizer(3, 16, 768), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, limit)
    assert tree(tmp_path) == before
    load_tokenizer(tmp_path)


# ---- what no run needs


def test_run_goes_on_where_pictures_and_page_cannot_be_written(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = files.write_atomically

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.suffix in (".png", ".html"):
            raise files.write_error(path, 0, FULL)
        usual(path, *arguments, **options)

    for module in ("log", "page"):
        monkeypatch.setattr(
            f"mar.training.{module}.write_text", lambda path, text, **o: refuse(path, lambda t: t.write_text(text), **o)
        )
    monkeypatch.setattr("mar.training.log.write_atomically", refuse)
    command = commands(model, pictures, tmp_path / "out")["train"]
    assert main([*command[:-1], "8"]) == 0
    errors = capsys.readouterr().err
    assert f"can't write {tmp_path}/out/samples/000000000008.png: No space left on device" in errors
    assert errors.count("the page is not renewed") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_run_goes_on_where_tensorboard_cannot_be_written(model: Path, pictures: Path, tmp_path: Path) -> None:
    """On a disk of 8 KiB, in a namespace where one may be mounted."""
    board = tmp_path / "out" / "tensorboard"
    board.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size=8k tmpfs {board}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = [*commands(model, pictures, tmp_path / "out")["train"], "--images", "400", "--log-every", "1"]
    script = f'{mount} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-m", "mar", *command],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{board} is not written any more: No space left on device") == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- pairs


def test_pair_of_commands_one_makes_the_cache_the_other_says_who_does(pictures: Path, tmp_path: Path) -> None:
    pairs = int(os.environ.get("MAR_PAIRS", "2"))
    for number in range(pairs):
        out = tmp_path / f"cache{number}"
        command = ["cache", str(pictures), "--tokenizer", "pixels", "--image-size", "8", "--out", str(out)]
        said = [tmp_path / f"said{number}.{i}" for i in range(2)]
        pair = [processes.start_process([*command, "--shard", "1"], path) for path in said]
        for process in pair:
            process.join(120)
        texts = [path.read_text() for path in said]
        codes = sorted(process.exitcode or 0 for process in pair)
        assert codes in ([0, 2], [0, 0]), texts
        if codes == [0, 2]:
            assert any(f"mar: {out} is in use by process" in text for text in texts), texts
        else:
            assert any("nothing to do" in text for text in texts), texts  # the second came later
        assert len(LatentSource(out)) == 24
        assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("verb", ["train", "tokenizer", "generate", "npz", "cache"])
def test_verb_whose_output_is_in_use_ends_with_one_line(
    verb: str, model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("out.npz" if verb == "npz" else "out")
    process = processes.start_work(hold, out, verb == "npz", tmp_path / "up")
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    before = tree(tmp_path)
    assert main(commands(model, pictures, tmp_path / "out")[verb]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"mar: {out} is in use by process {process.pid} on ")
    assert tree(tmp_path) == before
    process.kill()
    process.join()
    assert main(commands(model, pictures, tmp_path / "out")[verb]) == 0
    assert not leftovers(tmp_path)


def hold(out: Path, is_file: bool, up: Path) -> None:
    from mar.checkpoint.locks import exclusive

    with exclusive(out, is_file=is_file):
        up.touch()
        time.sleep(60)


# ---- names


LETTERS: list[Callable[[int], str]] = [
    lambda i: "\U00020000" * 79 + chr(0x20001 + i),  # 320 bytes; they differ in the last letter
    lambda i: "\u6f22" * 79 + chr(0x6F23 + i),
]


@pytest.mark.parametrize("letters", LETTERS, ids=["astral", "chinese"])
def test_class_names_of_many_bytes_have_files_of_their_own(letters: Callable[[int], str], tmp_path: Path) -> None:
    pipeline = tiny.tiny_pipeline()
    pipeline.classes = tuple(map(letters, range(3)))
    pipeline.save(tmp_path / "m.safetensors")
    plain = [str(tmp_path / "m.safetensors"), "--allow-broken", "--device", "cpu", "--seed", str(2**32 - 9)]
    assert main(["generate", *plain, "--out", str(tmp_path / "many"), "--per-class", "1"]) == 0
    folders = [path for path in (tmp_path / "many").iterdir() if path.is_dir()]
    assert len(folders) == 3
    assert all(len(path.name.encode()) <= 255 for path in folders)
    assert main(["sample", *plain, "--out", str(tmp_path / "few")]) == 0
    assert len(list((tmp_path / "few").glob("*.png"))) == 4
