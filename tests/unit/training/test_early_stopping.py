"""Early stopping: a run ends when its validation loss stalls, the same after kills."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import open_tiny_run, tiny_train_config, write_images

from mar import zoo
from mar.config import ConfigError, TrainConfig
from mar.training.callbacks import Snapshot, on_snapshot
from mar.training.early_stopping import BEST_FILE, HISTORY_FILE, EarlyStopping, best_step, evals_since_best
from mar.training.log import Log
from mar.training.preflight import estimate
from mar.training.trainer import Run, train

LOSSES = [0.9, 0.5, 0.6, 0.4, 0.7, 0.4, 0.5, 0.3, 0.4, 0.5]
"""Of the validations after 4, 8, ... 40 images: with a patience of 3 the run ends after 28, with 1 after 12."""


class Notes(Log):
    """What is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class Look:
    """A validation whose losses are known, and the averaged weights that it saw."""

    def __init__(self, run: Run, losses: list[float]) -> None:
        self.run, self.losses = run, losses
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, snapshot: Snapshot) -> Mapping[str, float]:
        self.seen[snapshot.images] = {n: t.clone() for n, t in self.run.ema.model.state_dict().items()}
        return {"val_loss": self.losses[snapshot.images // 4 - 1], "val_loss_00": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"), 24)


def settings(data: Path, **changes: Any) -> TrainConfig:
    return tiny_train_config(data, **{"hold_out": 3, "patience": 3, "validate_every": 4, **changes})


def go(config: TrainConfig, folder: Path, losses: list[float] | None = None) -> tuple[Run, Look, list[str]]:
    """The run, to its end; its validations of this session, and what was said."""
    run, log = open_tiny_run(config, folder), Notes()
    look = Look(run, losses or LOSSES)
    on_snapshot(run, log, config.validate_every, EarlyStopping(run, log, look))
    assert train(run, log)
    return run, look, log.lines


def history(folder: Path) -> dict[int, float | None]:
    return {int(images): loss for images, loss in json.loads((folder / HISTORY_FILE).read_text())["losses"].items()}


@pytest.mark.parametrize(
    ("losses", "best", "count"),
    [
        ([], None, 0),
        ([0.5], 0, 0),
        ([0.5, 0.4], 1, 0),
        ([0.5, 0.5], 0, 1),  # as low is not lower
        ([0.3, 0.5, 0.4], 0, 2),  # lower than the one before is not enough
        ([0.3, math.nan, math.nan], 0, 2),
        ([math.nan, 0.3], 1, 0),
        ([math.nan, math.nan], None, 1),
        ([math.inf, -math.inf, 2.0, 3.0], 2, 1),
    ],
)
def test_early_stopping_counts_evaluations(losses: list[float], best: int | None, count: int) -> None:
    kept = dict(reversed(list(enumerate(losses))))  # by images, in whatever order they came
    assert (best_step(kept), evals_since_best(kept)) == (best, count)


def test_early_stopping_ends_a_run_without_progress(data: Path, tmp_path: Path) -> None:
    run, look, said = go(settings(data), tmp_path)
    assert run.progress.images == 28
    assert run.store.latest() == tmp_path / "state-000000000028"
    assert history(tmp_path) == dict(zip(range(4, 32, 4), LOSSES, strict=False))
    assert said == [
        "the loss of held-out pictures has not fallen for 3 validations, and the run ends: the lowest, 0.4000, was at "
        f"image 16, whose weights are {tmp_path / BEST_FILE}; a larger --patience goes on"
    ]
    best = zoo.load(str(tmp_path / BEST_FILE))
    assert best.notes["images"] == 16
    weights = best.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in look.seen[16].items())
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in look.seen[28].items())


def test_early_stopping_resumed_ends_and_larger_patience_continues(data: Path, tmp_path: Path) -> None:
    _, _, said = go(settings(data), tmp_path)
    run, look, again = go(settings(data), tmp_path)
    assert (run.progress.images, look.seen, again) == (28, {}, said)
    run, look, said = go(settings(data, patience=4), tmp_path)
    assert (run.progress.images, list(look.seen), said) == (40, [32, 36, 40], [])
    assert zoo.load(str(tmp_path / BEST_FILE)).notes["images"] == 32
    go(settings(data, patience=5), tmp_path / "whole")
    for name in (BEST_FILE, HISTORY_FILE):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("left", [20, 24, 28])
def test_early_stopping_killed_run_decides_the_same(data: Path, tmp_path: Path, left: int) -> None:
    """After the kill there are states up to `left`; what was measured after that is measured again, not counted twice.
    Of 28 the process was killed before it noted that it had looked."""
    config = settings(data, save_every=4, keep=9)
    whole, _, said = go(config, tmp_path)
    expected = (tmp_path / HISTORY_FILE).read_bytes(), (tmp_path / BEST_FILE).read_bytes()
    for images in range(left + 4, 32, 4):
        shutil.rmtree(tmp_path / f"state-{images:012d}")
    (tmp_path / "latest").write_text(f"state-{left:012d}\n")
    (tmp_path / "watched").write_text(f"{left - 4}\n")
    state = tmp_path / f"state-{left:012d}" / "state.json"
    (state.parent / "checksums.json").unlink()  # earlier versions wrote none
    state.write_text(state.read_text().replace(f'"watched": {left}', f'"watched": {left - 4}'))
    run, look, again = go(config, tmp_path)
    assert list(look.seen) == list(range(left, 32, 4))
    assert (run.progress.images, again) == (28, said)
    assert ((tmp_path / HISTORY_FILE).read_bytes(), (tmp_path / BEST_FILE).read_bytes()) == expected
    one, other = whole.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("content", ["", "1\0", "[]", '{"images": 8, "checksum": "0"}', "1e999"])
def test_early_stopping_damaged_note_of_callbacks_is_said(
    data: Path, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it is about is done again, and the losses stay as they were."""
    config = settings(data)
    go(config, tmp_path)
    expected = history(tmp_path)
    note = tmp_path / "watched"
    assert set(json.loads(note.read_text())) == {"images", "checksum"}
    note.write_text(content)
    go(config, tmp_path)
    assert f"{note} can't be read" in caplog.text
    assert history(tmp_path) == expected


def test_early_stopping_with_nan_losses(data: Path, tmp_path: Path) -> None:
    run, _, said = go(settings(data, patience=2), tmp_path, [math.nan] * 10)
    assert run.progress.images == 12
    assert history(tmp_path) == {4: None, 8: None, 12: None}
    assert ["it was never finite; a larger" in line for line in said] == [True]
    assert not (tmp_path / BEST_FILE).exists()
    assert open_tiny_run(settings(data, patience=2), tmp_path).progress.images == 12


def test_early_stopping_restarts_for_other_images(data: Path, tmp_path: Path) -> None:
    go(settings(data), tmp_path)
    run, look, _ = go(settings(data, validate_count=5), tmp_path)
    assert (run.progress.images, list(look.seen)) == (40, [32, 36, 40])
    assert list(history(tmp_path)) == [32, 36, 40]


def test_early_stopping_damaged_history_is_refused(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(settings(data), tmp_path)
    for text in ("{", "[]", '{"losses": {"4": "low"}}', '{"losses": {}}'):
        (tmp_path / HISTORY_FILE).write_text(text)
        with pytest.raises(ValueError, match=r"validation.json can't be read .*; remove it to wait anew"):
            EarlyStopping(run, Log(), lambda snapshot: {})


def test_early_stopping_invalid_config_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patience is 2, but validate_every 0 measures no loss"):
        settings(data, patience=2, validate_every=0)
    with pytest.raises(ConfigError, match="patience is -1, but it must not be negative"):
        settings(data, patience=-1)
    with pytest.raises(ConfigError, match=r"patience is 3, but there are no held-out pictures: .* --hold-out 10 keeps"):
        open_tiny_run(settings(data, hold_out=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # so that the command may be given again with --hold-out


def test_early_stopping_disk_space_is_estimated(data: Path) -> None:
    with_it, without = estimate(settings(data)), estimate(settings(data, patience=0))
    assert with_it.disk - without.disk == 4 * with_it.parameters
