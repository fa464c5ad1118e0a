"""Snapshot callbacks: grids of both weights, own callbacks, repeated after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import HEAD, open_tiny_run, tiny_config, tiny_pipeline, tiny_train_config, write_images

from mar.config import SamplingConfig, TrainConfig
from mar.pipeline import Pipeline
from mar.training.callbacks import Snapshot, export_and_sample, on_snapshot, sample_share, take_snapshot
from mar.training.log import Log, RunLog, open_log
from mar.training.trainer import Run, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


class Kept(Log):
    """A log that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.pictures: dict[tuple[int, str], Image.Image] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def write_image(self, images: int, name: str, image: Image.Image) -> None:
        self.pictures[images, name] = image


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_snapshot_exports_and_draws_both_weights(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(
        tiny_train_config(data, sampling=SamplingConfig(3, 4, x0_bound=1.0), images=40, lr=2.0), tmp_path
    )
    assert train(run, Log())
    log = Kept()
    assert export_and_sample(take_snapshot(run), log) == {}
    for kind, file in (("", "model.safetensors"), ("-raw", "model-raw.safetensors")):
        sheet = Image.open(tmp_path / "samples" / f"000000000040{kind}.png")
        again = Pipeline.open(tmp_path / file).sample([0, 1] * 4)
        assert sheet.size == (16, 32)
        for i, picture in enumerate(again):
            column, row = i % 2 * 8, i // 2 * 8
            assert np.array_equal(np.asarray(sheet)[row : row + 8, column : column + 8], np.asarray(picture))
        shown = log.pictures[40, f"samples{kind}"]
        assert np.array_equal(np.asarray(shown), np.asarray(sheet))
    assert not np.array_equal(*(np.asarray(shown) for shown in log.pictures.values()))
    assert [note.split("/")[-1] for note in log.notes] == ["000000000040.png", "000000000040-raw.png"]


def test_snapshot_broken_grid_is_logged_only(data: Path, tmp_path: Path) -> None:
    noise_model = tiny_config(channels=1, grid=(8, 8), patch_size=2, classes=2, head=replace(HEAD, prediction="noise"))
    run, log = open_tiny_run(tiny_train_config(data, model=noise_model), tmp_path), Kept()
    export_and_sample(take_snapshot(run), log)
    assert [note.split(" at ")[0] for note in log.notes] == [
        f"no samples of the {weights} weights yet: image 0 is broken" for weights in ("ema", "raw")
    ]
    assert log.pictures == {}
    assert (tmp_path / "model.safetensors").is_file()


def test_snapshot_grid_shares_may_be_empty() -> None:
    drawer = tiny_pipeline()
    drawer.sampling = replace(drawer.sampling, x0_bound=1.0)
    whole = drawer.sample([0, 1])
    shares = [sample_share(drawer, [0, 1], rank, 5) for rank in range(5)]
    assert [len(share) for share in shares] == [0, 0, 1, 0, 1]
    drawn = [np.asarray(picture) for share in shares for picture in share]
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(drawn, whole, strict=True))


def test_custom_callback_is_called(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(data, images=40), tmp_path)
    log, seen = open_log(run), []

    def look(snapshot: Snapshot) -> dict[str, float]:
        ema, raw = snapshot.pipeline("ema"), snapshot.pipeline("raw")
        assert torch.equal(ema.model.mask_token, run.ema.model.mask_token)
        assert torch.equal(raw.model.mask_token, run.model.mask_token)
        assert (ema.weights, raw.weights) == ("ema", "raw")
        with torch.no_grad():
            ema.model.mask_token.zero_()  # it is a copy
        seen.append((snapshot.images, snapshot.step, snapshot.folder))
        return {"brightness": float(snapshot.images)} if snapshot.images > 16 else {}

    def never(snapshot: Snapshot) -> dict[str, float]:
        raise AssertionError("0 never calls")

    on_snapshot(run, log, 16, look)
    on_snapshot(run, log, 0, never)
    assert train(run, log)
    log.close()
    assert seen == [(16, 4, tmp_path), (32, 8, tmp_path)]
    assert [(line["images"], line["brightness"]) for line in lines(tmp_path) if "brightness" in line] == [(32, 32.0)]
    assert run.ema.model.mask_token.abs().sum() > 0


class Killed(Exception):
    """As SIGKILL would end it."""


calls: list[tuple[str, int]] = []
"""Looks that were begun."""


def test_unfinished_callback_is_repeated(data: Path, tmp_path: Path) -> None:
    settings = tiny_train_config(data, images=20, save_every=8)
    whole = watched(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        watched(settings, tmp_path / "killed", killed="second")  # when the first look had its line
    assert open_tiny_run(settings, tmp_path / "killed").progress.images == 16
    assert watched(settings, tmp_path / "killed") == whole
    assert [line["images"] for line in whole if "first" in line] == [8, 16]
    # nor is one that was finished, though the state was saved before it was
    calls.clear()
    (tmp_path / "whole" / "state-000000000020").rename(tmp_path / "gone")
    (tmp_path / "whole" / "latest").write_text("state-000000000016\n")
    assert watched(settings, tmp_path / "whole") == whole
    assert calls == []
    # a run that ended as it should has nothing to make up for
    assert watched(replace(settings, images=24), tmp_path / "whole")[: len(whole)] == whole


def watched(settings: TrainConfig, folder: Path, killed: str | None = None) -> list[dict[str, Any]]:
    """What the log says of a run with two hooks, one of which may be killed after 16 images."""
    run: Run = open_tiny_run(settings, folder)
    log = open_log(run)
    assert isinstance(log, RunLog)
    for name in ("first", "second"):

        def look(snapshot: Snapshot, name: str = name) -> dict[str, float]:
            calls.append((name, snapshot.images))
            if name == killed and snapshot.images == 16:
                raise Killed
            return {name: float(snapshot.images)}

        on_snapshot(run, log, 8, look)
    try:
        train(run, log)
    finally:
        log.close()
    kept = ("images", "step", "loss", "first", "second")
    return [{name: line[name] for name in kept if name in line} for line in lines(folder)]
