"""Runs on streams: resuming, messages about repeated images, refused uses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import png_bytes, write_tar_shards
from tiny import open_tiny_run, tiny_train_config

from mar.checkpoint import run_state
from mar.cli import main
from mar.config import ConfigError, TrainConfig
from mar.data.stream import StreamSource
from mar.tokenizer.base import measure_latents
from mar.training.log import Log, RunLog
from mar.training.run import resume_official
from mar.training.trainer import Run, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar_shards(tmp_path_factory.mktemp("shards"), (6, 3, 8, 6), classes=2)


def settings(data: Path, **changes: Any) -> TrainConfig:
    return tiny_train_config(Path(f"stream:{data}"), **{"images": 32, **changes})


def go(config: TrainConfig, folder: Path, images: int | None = None) -> Run:
    """The run, to its end or to an earlier one."""
    torch.set_num_threads(1)
    run = open_tiny_run(config if images is None else TrainConfig(**{**vars(config), "images": images}), folder)
    log = RunLog(folder, run.config.images, run.progress.images)
    try:
        assert train(run, log)
    finally:
        log.close()
    return run


def test_stream_run_resume_is_bitwise(data: Path, tmp_path: Path) -> None:
    whole = go(settings(data), tmp_path / "whole")
    go(settings(data), tmp_path / "parts", 12)
    run = go(settings(data, workers=2), tmp_path / "parts")
    assert run.data_note is not None
    assert "0 pictures are repeated" in run.data_note
    (tree, one), (other_tree, other) = (run_state.flatten(r.state_dict()) for r in (whole, run))
    assert tree["data"] == other_tree["data"]
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    losses = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (whole.folder, run.folder)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_stream_run_measures_statistics_on_a_subset(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(settings(data), tmp_path)
    every = torch.stack([torch.full((1, 8, 8), 5 * i / 127.5 - 1) for i in range(23)])
    expected = measure_latents(type(run.tokenizer)(1), [every])
    assert run.tokenizer.mean.item() == pytest.approx(expected.mean[0], abs=1e-6)
    assert run.tokenizer.std.item() == pytest.approx(expected.std[0], abs=1e-6)
    assert isinstance(run.source, StreamSource)
    assert run.source.cursors == {}
    with pytest.raises(ConfigError, match="can't be counted in pictures of a stream"):
        official(run, tmp_path)


def official(run: Run, folder: Path) -> None:
    class Read:
        optimizer = raw = ema = epoch = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mar.checkpoint.official.read_mar", lambda path: Read())
        resume_official(run, folder / "checkpoint-last.pth")


def test_stream_run_of_a_grown_folder_warns(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png_bytes(number))
    model = {**vars(tiny_train_config(folder).model), "classes": 0}
    config = tiny_train_config(folder, images=8)
    config = TrainConfig(**{**vars(config), "model": type(config.model)(**model)})
    go(config, tmp_path / "run")
    assert go(TrainConfig(**{**vars(config), "images": 12}), tmp_path / "run").data_note is None
    (folder / "6.png").write_bytes(png_bytes(6))
    run = open_tiny_run(TrainConfig(**{**vars(config), "images": 16}), tmp_path / "run")
    assert run.data_note is not None
    assert run.data_note.startswith("warning: the data holds 6 pictures, but 5 when the run was saved")
    train(run, Log())
    run.save()
    assert open_tiny_run(TrainConfig(**{**vars(config), "images": 16}), tmp_path / "run").data_note is None


def test_stream_run_reports_repeated_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    tiny = "--model.grid 8 8 --model.patch-size 4 --model.encoder.width 16 --model.encoder.depth 1"
    tiny += " --model.encoder.num-heads 2 --model.decoder.width 16 --model.decoder.depth 1 --model.decoder.num-heads 2"
    tiny += " --model.head.width 16 --model.head.depth 1 --model.buffer-size 2 --batch 4 --sample-every 0"
    tiny += " --device cpu --model.classes"
    command = ["train", "fashion", "--data", f"stream:{data}", "--out", str(out), *tiny.split()]
    assert main([*command, "2", "--images", "8"]) == 0
    with caplog.at_level(logging.WARNING):
        assert main([*command, "2", "--images", "12"]) == 0
    assert "the stream goes on where it was: 0 pictures are repeated" in capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["0 pictures are repeated" in line["data"] for line in lines if "data" in line] == [True]
    for wrong, words in {
        ("train", "fashion", *command[2:4], "--out", str(tmp_path / "b"), *tiny.split(), "1", "--images", "40"):
            "has the label 1, but there are 1 classes",
        ("cache", f"stream:{data}", "--tokenizer", "pixels", "--image-size", "8", "--out", str(tmp_path / "c")):
            "is a stream, from which only `mar train` reads; leave stream: out",
        ("tokenizer", "train", f"stream:{data}", "--out", str(tmp_path / "d")): "is a stream",
    }.items():  # fmt: skip
        capsys.readouterr()
        assert main(list(wrong)) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert words in said[-1]
    assert not (tmp_path / "c").exists()
