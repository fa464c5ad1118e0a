"""Data that is not what it should be: one clear line each, and nothing lost."""

from __future__ import annotations

import json
import logging
import os
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import tiny
from PIL import Image

from mar.checkpoint import files
from mar.cli import main
from mar.config import ConfigError
from mar.data import accounts
from mar.data.images import Transform
from mar.data.latent_cache import LatentSource
from mar.data.loader import batches
from mar.data.sources import open_source
from mar.training.log import RunLog
from mar.training.trainer import Callback, Run, train

MANY = 10_000


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1, said.err
    assert said.out == ""
    return said.err


def cached(data: Path, out: Path, *more: str) -> list[str]:
    settings = ["--tokenizer", "pixels", "--image-size", "8", "--device", "cpu"]
    return ["cache", str(data), "--out", str(out), *settings, *more]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the data had to say."""
    return [record.getMessage() for record in caplog.records if record.name == "mar.data"]


def go(run: Run) -> None:
    log = RunLog(run.folder, run.config.images, run.progress.images)
    try:
        assert train(run, log)
    finally:
        log.close()


def test_truncated_shard_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    assert main(cached(tiny.write_images(tmp_path / "pictures"), cache, "--shard", "6")) == 0
    shard = cache / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    run = tmp_path / "run"
    said = refused(capsys, "train", "fashion", "--data", str(cache), "--out", str(run), "--device", "cpu")
    assert "00001.safetensors has" in said
    assert "run the `mar cache` that made the folder again" in said
    assert not run.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_label_beyond_the_classes_is_one_line(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ValueError, match=r"down/16\.png has the label 2, but there are 2 classes$") as said:
        next(batches(Mislabeled(tiny.write_images(tmp_path)), Transform((8, 8), 1), batch=20, seed=0, workers=workers))
    assert "\n" not in str(said.value)


class Mislabeled:
    """A folder of two classes, one of whose pictures is said to be of a third."""

    classes, flips = ("across", "down"), True

    def __init__(self, folder: Path) -> None:
        self.source = open_source(folder)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        example = self.source[index]
        label = 2 if example.name.endswith("16.png") else example.label
        return type(example)(example.image, label, example.name.replace(os.sep, "/"))


def test_cache_and_training_skip_one_bad_image_of_10000(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (8, 8), 200).save(tmp_path / "picture.png")
    for number in range(MANY):
        os.link(tmp_path / "picture.png", folder / f"{number}.png")
    (folder / "4711.png").unlink()
    (folder / "4711.png").write_bytes(b"no picture")

    assert processes.run_to_end(cached(folder, tmp_path / "cache"), tmp_path / "said") == 0
    said = [line for line in (tmp_path / "said").read_text().splitlines() if "left" not in line.split()[-1:]]
    assert said[0] == f"1 pictures could not be read and are left out: {folder / '4711.png'}"
    assert said[1].startswith("9,999 pictures in")
    assert len(said) == 3
    cache = LatentSource(tmp_path / "cache")
    assert cache.index.skipped == {4711: str(folder / "4711.png")}

    with caplog.at_level(logging.WARNING, "mar.data"):
        seen = list(islice(batches(cache, Transform((8, 8), 1), batch=500, seed=0), MANY // 500))
    assert sum(len(batch.labels) for batch in seen) == MANY
    assert told(caplog) == [f"skipped a picture that can't be read: {folder / '4711.png'}"]


def test_tokenizer_statistics_say_what_they_rest_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_images(tmp_path / "pictures", 6)
    (data / "across" / "1.png").write_bytes(b"")
    measure = ["tokenizer", "stats", "pixels", "--data", str(data), "--image-size", "8"]
    assert main(measure) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "measured on 5 pictures of 6: the others can't be read"
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    assert "got no images that can be read" in refused(capsys, *measure)


@pytest.mark.parametrize("out", ["cache", "tokenizer"])
def test_data_without_a_readable_image_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    data = tiny.write_images(tmp_path / "pictures", 40)
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    arguments = cached(data, tmp_path / "out") if out == "cache" else [
        "tokenizer", "train", str(data), "--out", str(tmp_path / "out"), "--image-size", "8", "--images", "8",
        "--batch", "4", "--device", "cpu",
    ]  # fmt: skip
    assert "can be read" in refused(capsys, *arguments)


TINY = [
    "--images", "16", "--batch", "4", "--model.encoder.depth", "1", "--model.decoder.depth", "1", "--model.head.depth",
    "1", "--model.encoder.width", "32", "--model.decoder.width", "32", "--model.head.width", "32",
    "--model.encoder.heads", "2", "--model.decoder.heads", "2", "--model.classes", "2", "--sample-every", "0",
    "--hold-out", "5", "--device", "cpu", "--model.grid", "8", "8", "--model.patch-size", "2",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "cache"])
def test_train_log_has_the_account_of_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(accounts, "_logged", set())
    data, run = tiny.write_images(tmp_path / "pictures"), tmp_path / "run"
    if kind == "cache":
        assert main([*cached(data, tmp_path / "cache"), "--flip", "True"]) == 0
        capsys.readouterr()
        data = tmp_path / "cache"
    channels = ["--model.channels", "3", "--image-channels", "3"] if kind == "cache" else []
    train = ["train", "fashion", "--data", str(data), "--out", str(run), *TINY, *channels]
    assert main(train) == 0
    of = f", latents of {tmp_path / 'pictures'}" if kind == "cache" else ""
    line = f"data: {data}{of}: 20 pictures, labels of 2 classes"
    assert capsys.readouterr().err.splitlines().count(line) == 1, "in the output of a job"
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    assert [each["account"] for each in lines if "account" in each] == [[line]]
    if kind == "folder":
        (data / "across" / "notes.md").write_text("not a picture")
        assert main([*train, "--images", "32"]) == 0
        line += "; left out: other files: 1 (across/notes.md)"
        assert capsys.readouterr().err.splitlines().count(line) <= 1
        lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
        assert [each["account"] for each in lines if "account" in each][1:] == [[line]]


def test_images_deleted_in_training_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are skipped; the next session says that they have changed, and goes on with those of now."""
    data = tiny.write_images(tmp_path / "pictures")
    run = tiny.open_tiny_run(tiny.tiny_train_config(data, images=20), tmp_path / "run")

    def remove(run: Run) -> None:
        if run.progress.images == 4:
            for number in (2, 3, 4):
                (data / ("across" if number % 2 else "down") / f"{number}.png").unlink()

    run.callbacks.append(Callback(4, remove))
    go(run)
    assert run.progress.images == 20
    assert all(line.startswith("skipped a picture that can't be read: ") for line in told(caplog))
    assert 1 <= len(told(caplog)) <= 3
    caplog.clear()
    again = tiny.open_tiny_run(tiny.tiny_train_config(data, images=40), tmp_path / "run")
    assert again.data_note is not None
    assert again.data_note.startswith("warning: the data holds 17 pictures, but 20 when the run was saved")
    go(again)
    assert again.progress.images == 40
    assert tiny.open_tiny_run(tiny.tiny_train_config(data, images=40), tmp_path / "run").data_note is None


def test_resume_with_changed_classes_is_refused(tmp_path: Path) -> None:
    data = tiny.write_images(tmp_path / "pictures")
    go(tiny.open_tiny_run(tiny.tiny_train_config(data, images=8), tmp_path / "run"))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    (data / "down").rename(data / "up")
    with pytest.raises(ConfigError, match=r"other classes than when the run was saved \(down, up\); put them back"):
        tiny.open_tiny_run(tiny.tiny_train_config(data, images=16), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    (data / "up").rename(data / "down")
    assert tiny.open_tiny_run(tiny.tiny_train_config(data, images=16), tmp_path / "run").progress.images == 8


def test_resume_of_a_run_without_image_count(tmp_path: Path) -> None:
    data = tiny.write_images(tmp_path / "pictures")
    run = tiny.open_tiny_run(tiny.tiny_train_config(data, images=8), tmp_path / "run")
    go(run)
    noted = run.store.states()[-1] / "state.json"
    (noted.parent / "checksums.json").unlink()  # earlier versions wrote none
    state = json.loads(noted.read_text())
    assert state.pop("data")["pictures"] == 20
    noted.write_text(json.dumps(state))
    again = tiny.open_tiny_run(tiny.tiny_train_config(data, images=16), tmp_path / "run")
    assert (again.progress.images, again.data_note) == (8, None)


def test_cache_too_little_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_images(tmp_path / "pictures")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    said = refused(capsys, *cached(data, tmp_path / "cache"))
    assert "are needed, but only 9.8 KiB are free on its disk; make room or write somewhere else" in said
    assert not (tmp_path / "cache").exists()
