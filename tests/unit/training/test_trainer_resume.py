"""A resumed run equals one never stopped, bit for bit, with dropout and data workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import open_tiny_run, tiny_config, tiny_model, tiny_train_config, write_images
from torch import Tensor

from mar.checkpoint import run_state
from mar.config import ConfigError, TrainConfig, TrunkConfig
from mar.data.splits import HELD_OUT
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer
from mar.training.log import RunLog
from mar.training.run import open_run
from mar.training.trainer import Callback, Run, train

EVERY_STEP = list(range(4, 41, 4))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are bitwise the same for one number of threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interrupting(RunLog):
    """A log that sends this process a signal once a number of images has been seen."""

    def __init__(self, run: Run, at: int | None = None, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(run.folder, run.config.images, run.progress.images)
        self.at, self.number = at, number

    def advance(self, images: int, loss: float) -> None:
        super().advance(images, loss)
        if images == self.at:
            os.kill(os.getpid(), self.number)


def go(run: Run, at: int | None = None, number: signal.Signals = signal.SIGINT) -> bool:
    log = Interrupting(run, at, number)
    try:
        return train(run, log)
    finally:
        log.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def tensors(run: Run) -> dict[str, Tensor]:
    tree, all_tensors = run_state.flatten(run.state_dict())
    assert tree["progress"]["images"] == run.progress.images
    return {name: tensor.clone() for name, tensor in all_tensors.items()}


def differing(a: Run, b: Run) -> list[str]:
    one, other = tensors(a), tensors(b)
    assert set(one) == set(other)
    assert {name.split("/")[0] for name in one} == {"model", "ema", "optimizer", "tokenizer"}
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run without workers, pauses or anything else between its steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = open_tiny_run(tiny_train_config(data), tmp_path_factory.mktemp("whole"))
    assert go(run)
    torch.set_num_threads(threads)
    return run


def resumed(settings: TrainConfig, folder: Path, at: list[int], number: signal.Signals) -> Run:
    """The run stopped by a signal after each image count of `at`, and always opened anew."""
    for images in at:
        run = open_tiny_run(settings, folder)
        assert not go(run, images, number)
        assert run.progress.images == images  # the step at hand was finished, and no other begun
    run = open_tiny_run(settings, folder)
    torch.rand(7)  # whatever else happened in between
    assert go(run)
    return run


@pytest.mark.parametrize(("number", "at", "workers"), [(signal.SIGINT, [16], 2), (signal.SIGTERM, [4, 28], 0)])
def test_run_resume_is_bitwise(
    uninterrupted: Run, data: Path, tmp_path: Path, number: signal.Signals, at: list[int], workers: int
) -> None:
    model = uninterrupted.config.model
    assert model.attention_dropout > 0
    assert model.projection_dropout > 0
    assert uninterrupted.source.flips
    run = resumed(tiny_train_config(data, workers=workers), tmp_path, at, number)
    assert differing(run, uninterrupted) == []
    whole = lines(uninterrupted.folder)
    assert [line["images"] for line in lines(tmp_path)] == [line["images"] for line in whole] == EVERY_STEP
    for name in ("step", "loss", "gradient_norm", "lr", "skipped_steps"):
        assert [line[name] for line in lines(tmp_path)] == [line[name] for line in whole]


@pytest.mark.parametrize("modern", [False, True])
def test_run_with_muon_resume_is_bitwise(modern: bool, data: Path, tmp_path: Path) -> None:
    settings = tiny_train_config(data, optimizer="muon", lr=0.05)
    if modern:
        trunk = TrunkConfig(16, 1, 2, rotary=True)
        settings = replace(settings, model=replace(settings.model, encoder=trunk, decoder=trunk))
    whole = open_tiny_run(settings, tmp_path / "whole")
    assert go(whole)
    again = resumed(settings, tmp_path / "cut", [12], signal.SIGINT)
    assert any("momentum" in name for name in tensors(again))
    assert differing(again, whole) == []


def test_resume_test_run_has_learned(uninterrupted: Run, data: Path, tmp_path: Path) -> None:
    fresh = open_tiny_run(tiny_train_config(data), tmp_path)
    assert {name.split("/")[0] for name in differing(uninterrupted, fresh)} == {"model", "ema", "optimizer"}
    whole = lines(uninterrupted.folder)
    assert sum(line["loss"] for line in whole[-3:]) < sum(line["loss"] for line in whole[:3])


def test_run_with_another_seed_differs(uninterrupted: Run, data: Path, tmp_path: Path) -> None:
    other = open_tiny_run(tiny_train_config(data, seed=6, images=4), tmp_path)
    assert go(other)
    assert lines(tmp_path)[0]["loss"] != lines(uninterrupted.folder)[0]["loss"]


def test_callbacks_between_steps_change_nothing(uninterrupted: Run, data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(data, sample_every=4, save_every=12), tmp_path)
    called: list[int] = []

    def snapshot(run: Run) -> None:
        called.append(run.progress.images)
        torch.rand(1000)

    run.callbacks.append(Callback(4, snapshot))
    torch.manual_seed(99)
    assert go(run)
    assert called == EVERY_STEP
    assert differing(run, uninterrupted) == []


class Killed(Exception):
    pass


def test_killed_run_drops_unsaved_log_lines(uninterrupted: Run, data: Path, tmp_path: Path) -> None:
    settings = tiny_train_config(data, save_every=16, keep=1, sample_every=4)
    run = open_tiny_run(settings, tmp_path)

    def die(run: Run) -> None:
        if run.progress.images == 28:
            raise Killed

    run.callbacks.append(Callback(4, die))
    with pytest.raises(Killed):
        go(run)
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"images": 32, "los')  # the line that it was writing
    run = open_tiny_run(settings, tmp_path)
    assert run.progress.images == 16
    assert go(run)
    assert differing(run, uninterrupted) == []
    assert [line["images"] for line in lines(tmp_path)] == EVERY_STEP
    assert [state.name for state in run.store.states()] == ["state-000000000040"]


def test_finished_run_stays_unchanged(uninterrupted: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted.folder, folder)
    run = open_tiny_run(tiny_train_config(data), folder)
    assert go(run)
    assert differing(run, uninterrupted) == []
    assert lines(folder) == lines(uninterrupted.folder)


def test_longer_run_continues_a_shorter_one(data: Path, tmp_path: Path) -> None:
    assert go(open_tiny_run(tiny_train_config(data, images=8), tmp_path))
    run = open_tiny_run(tiny_train_config(data, images=12), tmp_path)
    assert (run.progress.images, run.progress.step) == (8, 2)
    assert go(run)
    assert [line["images"] for line in lines(tmp_path)] == [4, 8, 12]


def names(part: Any) -> list[str]:
    return [part[i].name for i in range(len(part))]


def test_resumed_run_keeps_its_held_out_images(tmp_path: Path) -> None:
    data, folder = write_images(tmp_path / "pictures"), tmp_path / "run"
    settings = tiny_train_config(data, hold_out=4)
    run = open_tiny_run(settings, folder)
    assert not go(run, at=8)
    learned, kept = names(run.source), names(run.held_out)
    write_images(data, 40)
    grown = open_tiny_run(settings, folder)
    assert (names(grown.held_out), len(grown.source)) == (kept, 35)
    assert set(learned) < set(names(grown.source))
    assert grown.data_note is not None
    assert grown.data_note.startswith("warning: the data holds 35 pictures, but 15 when the run was saved")


def test_resumed_run_without_recorded_split(tmp_path: Path) -> None:
    data, folder = write_images(tmp_path / "pictures"), tmp_path / "run"
    settings = tiny_train_config(data, hold_out=4)
    run = open_tiny_run(settings, folder)
    assert not go(run, at=8)
    (folder / HELD_OUT).unlink()  # as an older version left it
    write_images(data, 21)
    with pytest.raises(
        ConfigError, match="16 pictures to learn from, but 15 when the run was saved by an older version"
    ):
        open_tiny_run(settings, folder)
    assert not (folder / HELD_OUT).exists()
    (data / "down" / "20.png").unlink()
    again = open_tiny_run(settings, folder)
    assert (names(again.source), names(again.held_out)) == (names(run.source), names(run.held_out))
    assert (folder / HELD_OUT).is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.01}, "lr 0.5 -> 0.01"),
        ({"batch": 2}, "batch 4 -> 2"),
        ({"seed": 6}, "seed 5 -> 6"),
        ({"model": tiny_config(channels=1, grid=(8, 8), patch_size=4, classes=2)}, r"model\.patch_size 2 -> 4"),
    ],
)
def test_resume_with_another_config_is_refused(data: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    open_tiny_run(tiny_train_config(data), tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=words):
        open_tiny_run(tiny_train_config(data, **change), tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before


def test_run_without_state_starts_from_init(data: Path, tmp_path: Path) -> None:
    start = tiny_model(seed=4, channels=1, grid=(8, 8), patch_size=2, classes=2)
    settings, loaded = tiny_train_config(data, init="some-weights"), []

    def load(name: str) -> Pipeline:
        loaded.append(name)
        return Pipeline(start, PixelTokenizer(1, 0.0, 1.0))

    for _ in range(2):  # the second time the folder has run.json, but no state
        run = open_tiny_run(settings, tmp_path, load)
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), start.parameters(), strict=True))
        assert run.tokenizer.has_stats
    assert loaded == ["some-weights"] * 2
    assert not go(run, at=4)
    again = open_tiny_run(settings, tmp_path)  # which loads nothing
    assert differing(again, run) == []
    assert again.tokenizer.has_stats


def test_open_run_without_loaders_loads_weights_by_name(data: Path, tmp_path: Path) -> None:
    start, file = tiny_model(seed=4, channels=1, grid=(8, 8), patch_size=2, classes=2), tmp_path / "start.safetensors"
    Pipeline(start, PixelTokenizer(1, 0.0, 1.0)).save(file)
    run = open_run(tiny_train_config(data, init=str(file)), tmp_path / "run", device=torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), start.parameters(), strict=True))


def test_run_of_skipped_steps_can_be_resumed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny_run(tiny_train_config(data), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run.model.head, "loss", lambda *_: run.model.mask_token.sum() * torch.full((3,), torch.nan))
        assert not go(run, at=8)
    again = open_tiny_run(tiny_train_config(data), tmp_path)
    assert (again.progress.skipped_steps, again.progress.skipped_in_a_row) == (2, 2)
    assert differing(again, run) == []
    assert go(again)
