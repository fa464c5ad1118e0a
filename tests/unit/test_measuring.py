"""What `quality.py` decides by itself: which settings a trial has, how it goes on, and what is kept of it."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_train_config, write_images

from mar.config import ConfigError, HeadConfig, TrainConfig
from mar.data.splits import hold_out
from mar.presets import CIFAR10, FASHION
from mar.training.log import RunLog
from mar.training.trainer import Callback, train

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)  # as Python does for a script
    return importlib.import_module("quality")


def test_trial_paper_settings_match_the_paper(quality: ModuleType) -> None:
    config = quality.settings("reference", Path("pictures"), [])
    model, own = config.model, CIFAR10.model
    assert model.head == HeadConfig(own.head.width, own.head.depth)
    assert (config.tokenizer, model.channels, model.grid, model.patch_size) == ("pixels", 3, (32, 32), 4)
    assert not model.encoder.rotary
    assert (model.encoder.width, model.decoder.depth) == (own.encoder.width, own.decoder.depth)
    assert (model.attention_dropout, model.projection_dropout, model.mask_ratio_min) == (0.1, 0.1, 0.7)
    assert (config.optimizer, config.decay, config.clip) == ("adamw", 0, 3.0)
    assert config.scaled_lr == pytest.approx(8e-4)


def test_trial_settings_change_by_path(quality: ModuleType) -> None:
    changes = ["model.patch_size=7", "sampling.solver=ddim", "ema_others=0.99", "optimizer=adamw"]
    config = quality.settings("fashion", Path("pictures"), changes)
    assert (config.model.patch_size, config.sampling.solver, config.optimizer) == (7, "ddim", "adamw")
    assert (config.ema_others, config.lr, config.data) == ((0.99,), FASHION.lr, "pictures")
    for wrong in ("model.patches=7", "patch=7", "model.encoder=3"):
        with pytest.raises(ConfigError, match=f"a recipe has no setting {wrong[:5]}"):
            quality.settings("fashion", Path("pictures"), [wrong])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pictures")


@pytest.fixture
def no_judge(quality: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn to be judged, and every distance is 1."""
    report = SimpleNamespace(distance=1.0, class_accuracy=None, worst_class_accuracy=None)
    monkeypatch.setattr(quality, "collect", lambda *_, **__: SimpleNamespace(statistics=None))
    monkeypatch.setattr(quality, "compare", lambda *_: report)


def open_trial(quality: ModuleType, data: Path, folder: Path, minutes: float = 10) -> tuple[Any, RunLog]:
    """A trial of ten steps, one of them a minute, and its log."""
    config = tiny_train_config(data)
    run = quality.open_trial(config, folder, hold_out(data))
    log = RunLog(folder, config.images, run.progress.images)
    trial = quality.Trial(run, log, None, minutes, 1, marks=(3,))
    run.callbacks.append(Callback(config.batch, lambda _: trial.at_mark(5)))
    return trial, log


@pytest.mark.usefixtures("no_judge")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trial_resumes_with_the_minutes_of_its_state(
    quality: ModuleType, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    trial, log = open_trial(quality, data, tmp_path / "trial")
    trial.clock.minutes = 3.0

    def stop(run: Any) -> None:
        if run.progress.images == 20:  # two minutes after it was judged
            trial.clock.minutes += 2.0
            os.kill(os.getpid(), number)

    trial.run.callbacks.append(Callback(4, stop))
    assert not train(trial.run, log)
    log.close()
    again, log = open_trial(quality, data, tmp_path / "trial")
    assert (again.run.progress.images, [line["images"] for line in again.lines]) == (20, [12])
    assert 3 <= again.lines[0]["minutes"] < 4
    assert 5 <= again.clock.minutes < 6
    log.close()
    for state in again.run.store.states()[1:]:  # that of the mark is left
        state.rename(tmp_path / state.name)
    earlier, log = open_trial(quality, data, tmp_path / "trial")
    assert (earlier.run.progress.images, 3 <= earlier.clock.minutes < 4) == (12, True)
    log.close()


@pytest.mark.usefixtures("no_judge")
def test_trial_evaluated_marks_are_not_repeated(quality: ModuleType, data: Path, tmp_path: Path) -> None:
    trial, log = open_trial(quality, data, tmp_path / "trial")
    assert train(trial.run, log)
    trial.evaluate_once(5)
    log.close()
    again, log = open_trial(quality, data, tmp_path / "trial")
    about = [{"images": 12, "pictures": 5}, {"images": 40, "pictures": 5}]
    for wanted in (
        {},
        {"pictures": 6},
        {"guidance_scale": 1.5},
        {"guidance_scale": 2.0},
        {"weights": "raw"},
        {"weights": "raw"},
        {"guidance_scale": 1.5},
    ):
        changes: dict[str, Any] = {"pictures": 5, **wanted}
        line = again.evaluate_once(changes.pop("pictures"), **changes)
        wanted = {"images": 40, "pictures": 5, **wanted}
        assert {name: line.get(name) for name in wanted} == wanted
        about += [] if wanted in about else [wanted]
    log.close()
    written = (tmp_path / "trial" / quality.RESULTS_FILE).read_text(encoding="utf-8").splitlines()
    names = ("images", "pictures", "guidance_scale", "weights")
    assert [{name: line[name] for name in names if name in line} for line in map(json.loads, written)] == about
    assert len(about) == 6


def fashion_files(folder: Path, brightness: int = 1) -> Path:
    """A folder of Fashion-MNIST's files, ten pictures in each part, one of a class."""
    folder.mkdir()
    for split in ("train", "t10k"):
        images = bytes(brightness * label for label in range(10) for _ in range(28 * 28))
        for name, sides, values in (("images-idx3", (10, 28, 28), images), ("labels-idx1", (10,), bytes(range(10)))):
            header = bytes([0, 0, 8, len(sides)]) + b"".join(side.to_bytes(4, "big") for side in sides)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values))
    return folder


@pytest.fixture
def command(quality: ModuleType, no_judge: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`quality.py train` of ten steps, its judge made up; called with what is given beside the usual."""

    def settings(_: str, data: Path, changes: Any) -> TrainConfig:
        return tiny_train_config(data, model=tiny_config(channels=1, grid=(28, 28), patch_size=14, classes=10))

    monkeypatch.setattr(quality, "settings", settings)
    monkeypatch.setattr(quality, "fit_to_minutes", lambda config, *_: config)
    monkeypatch.setattr(quality, "evaluation_extractor", lambda *_: None)
    fashion_files(tmp_path / "fashion")
    (tmp_path / "judge").write_bytes(b"a judge")
    usual = {"data": tmp_path / "fashion", "classifier": tmp_path / "judge", "recipe": "fashion", "minutes": 10}
    usual |= {"seed": 0, "threads": torch.get_num_threads(), "count": 5, "out": tmp_path / "trial", "marks": 60}

    def run(*others: str, **changes: Any) -> int:
        options = [
            text for name, value in {**usual, **changes}.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        monkeypatch.setattr(sys, "argv", ["quality.py", "train", *options, "--set", "lr=0.5", "ema=0.99", *others])
        code: int = quality.main()
        return code

    return run


OTHERWISE: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "recipe": ({"recipe": "reference"}, [], "recipe fashion, here reference"),
    "seed": ({"seed": 1}, [], "seed 0, here 1"),
    "minutes": ({"minutes": 20}, [], "minutes 10.0, here 20.0"),
    "threads": ({"threads": 64}, [], "threads 1, here 64"),
    "set": ({}, ["lr=0.25"], "--set lr 0.5, here 0.25"),
    "set more": ({}, ["clip=1"], "--set clip as in the recipe, here 1"),
    "data": ({"data": "others"}, [], "data fashion, here others"),
}


@pytest.mark.parametrize("which", OTHERWISE)
@pytest.mark.parametrize("older", [False, True])
def test_trial_with_other_settings_is_refused(
    quality: ModuleType,
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    older: bool,
) -> None:
    changes, others, said = OTHERWISE[which]
    note = tmp_path / "trial" / quality.TRIAL_FILE
    monkeypatch.setattr(quality, "train", lambda *_: False)  # stopped at once
    monkeypatch.setattr(quality.torch, "set_num_threads", lambda _: None)
    assert command(threads=1) == 0
    if older:
        begun = json.loads(note.read_text(encoding="utf-8"))
        names = ("recipe", "set", "minutes", "threads", "config")
        note.write_text(json.dumps({name: begun[name] for name in names}), encoding="utf-8")
    elif which == "data":
        said = f"pictures {json.loads(note.read_text(encoding='utf-8'))['pictures']}, here "
    if which == "data":
        changes = {"data": fashion_files(tmp_path / "others", brightness=2)}
    before = note.read_bytes()
    assert command(*others, **{"threads": 1, **changes}) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"quality: {tmp_path / 'trial'} was begun with other settings ({said}")
    assert error.count("\n") == 1
    assert (command(threads=1), note.read_bytes()) == (0, before)


def test_trial_other_reference_is_refused_moved_is_not(
    quality: ModuleType, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    for name in ("fashion", "judge"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    moved = {"data": tmp_path / "moved-fashion", "classifier": tmp_path / "moved-judge"}
    assert command("ema=0.99", **moved, guidance_scale=2) == 0
    written = (tmp_path / "trial" / quality.RESULTS_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("guidance_scale") for line in written] == [None, 2.0]
    capsys.readouterr()
    moved["classifier"].write_bytes(b"another judge")
    assert command(**moved, guidance_scale=3) == 2
    assert "was begun with other settings (classifier " in capsys.readouterr().err
    assert len((tmp_path / "trial" / quality.RESULTS_FILE).read_text(encoding="utf-8").splitlines()) == 2


def test_folder_digest_is_independent_of_its_path(quality: ModuleType, data: Path, tmp_path: Path) -> None:
    of = importlib.import_module("quality_data").data_fingerprint
    before = of(hold_out(data))
    moved = data.rename(tmp_path / "moved")
    assert of(hold_out(moved)) == before
    next((moved / "down").iterdir()).unlink()
    assert of(hold_out(moved)) != before


def test_trial_classes_follow_the_data(quality: ModuleType, data: Path, tmp_path: Path) -> None:
    three = tiny_train_config(data, model=tiny_config(channels=1, grid=(8, 8), patch_size=2, classes=3))
    with pytest.raises(ConfigError, match=r"the model has 3 classes, but .* has 2"):
        quality.open_trial(three, tmp_path / "trial", hold_out(data))


def test_trial_none_differs_from_unknown(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = [
        {"minutes": 1, "images": 600, "val_loss": 1.5, "distance": 90, "agreement": 0.0},
        {"minutes": 1, "images": 600, "weights": "raw", "distance": 80, "agreement": None},
        {"minutes": 1, "images": 600, "val_loss": 1.5, "broken": "step 3"},
    ]
    (tmp_path / quality.TRIAL_FILE).write_text(
        json.dumps({"config": {"sampling": {"guidance": 4.0}}}), encoding="utf-8"
    )
    (tmp_path / quality.RESULTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    quality.run_table(SimpleNamespace(folders=[tmp_path]))
    cells = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [[row[4], *row[7:]] for row in cells] == [
        ["1.5000", "90.00", "0.0%"],
        ["-", "80.00", "-"],
        ["1.5000", "-", "-"],
    ]


@pytest.mark.usefixtures("no_judge", "full_disk")
def test_trial_failed_write_keeps_earlier_marks(quality: ModuleType, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / quality.RESULTS_FILE).write_bytes(b'{"images": 0, "minutes": 0}\n')
    trial, log = open_trial(quality, data, folder)
    with pytest.raises(ValueError, match="No space left"):
        trial.evaluate(5, guidance_scale=2.0)
    log.close()
    assert (folder / quality.RESULTS_FILE).read_bytes() == b'{"images": 0, "minutes": 0}\n'


def test_trial_partial_last_line_is_ignored(quality: ModuleType, tmp_path: Path) -> None:
    (tmp_path / quality.RESULTS_FILE).write_text('{"images": 4}\n{"images": 8, "dis', encoding="utf-8")
    (tmp_path / quality.TRIAL_FILE).write_text("{}", encoding="utf-8")
    assert importlib.import_module("quality_report").read(tmp_path)[1] == [{"images": 4}]
