"""Validation loss: held-out images only, by timestep, with constant random numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import open_tiny_run, randomize, tiny_config, tiny_train_config, write_images

from mar.config import ConfigError
from mar.data.splits import Subset
from mar.model.mar import MAR
from mar.tokenizer import PixelTokenizer
from mar.training import callbacks
from mar.training.callbacks import BINS, VALIDATION_SEED, Snapshot, Validation, mean_by_bin, on_snapshot, take_snapshot
from mar.training.log import Log, open_log
from mar.training.loss import DiffusionLoss, sample_randomness
from mar.training.run import open_run
from mar.training.trainer import Run, to_latents, train

NAMES = ["val_loss", *(f"val_loss_{k:02d}" for k in range(10))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"), 24)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "GROUP_SIZE", 3)


def opened(data: Path, folder: Path, **changes: Any) -> Run:
    """An untrained run whose weights are awake; of 24 pictures, eight are held out."""
    run = open_tiny_run(tiny_train_config(data, **{"hold_out": 3, **changes}), folder)
    randomize(run.ema.model)
    return run


def measured(run: Run) -> dict[str, float]:
    return dict(Validation(run, Log())(take_snapshot(run)))


def test_validation_loss_matches_training_loss_by_timestep(data: Path, tmp_path: Path) -> None:
    """Computed once more, group by group, by the training loss itself."""
    run = opened(data, tmp_path)
    found = measured(run)
    assert list(found) == NAMES
    plain = replace(run.config.model, label_drop=0.0)
    loss = DiffusionLoss(run.ema.model).eval()
    total, rows, every = 0.0, 0, []
    validator = Validation(run, Log())
    for group in validator._encode_groups():
        draws = sample_randomness(plain, VALIDATION_SEED, group.number, group.positions.tolist())
        mean = float(loss(group.latents, group.condition, draws))
        total, rows = total + mean * draws.timestep.numel(), rows + draws.timestep.numel()
        every.append(loss.per_token_loss(group.latents, group.condition, draws)[draws.timestep.flatten() >= 900])
    assert found["val_loss"] == pytest.approx(total / rows, rel=1e-6)
    assert found["val_loss_09"] == pytest.approx(float(torch.cat(every).mean()), rel=1e-5)
    assert len(set(found.values())) == len(found)


def test_validation_loss_depends_on_weights_only(data: Path, tmp_path: Path) -> None:
    run = opened(data, tmp_path / "a")
    assert run.config.model.attention_dropout > 0
    once = Validation(run, Log())
    first = dict(once(take_snapshot(run)))
    assert dict(once(take_snapshot(run))) == first
    torch.rand(5)
    assert measured(opened(data, tmp_path / "b", seed=11, batch=2)) == first
    randomize(run.ema.model, seed=1)
    assert dict(once(take_snapshot(run))) != first
    with torch.no_grad():
        run.model.mask_token.add_(1.0)  # the raw weights are not asked
    assert dict(once(take_snapshot(run))) == measured(run)


def test_validation_leaves_rng_and_run_unchanged(data: Path, tmp_path: Path) -> None:
    run = opened(data, tmp_path)
    before = {name: tensor.clone() for name, tensor in run.state_dict()["ema"].items()}
    made = take_snapshot(run).pipeline("ema")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    Validation(run, Log())(Snapshot(0, 0, tmp_path, ("ema",), [], lambda weights: made))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.state_dict()["ema"].items())
    assert run.model.training


def test_validation_groups_are_weighted_by_count() -> None:
    one = ([1.0] * BINS, [2] * BINS)
    other = ([0.0] * (BINS - 1) + [5.0], [0] * (BINS - 1) + [1])
    found = mean_by_bin([one, other])
    assert found["val_loss_00"] == 0.5
    assert found["val_loss_09"] == 2.0
    assert found["val_loss"] == pytest.approx(15 / 21)
    empty = mean_by_bin([([0.0] * BINS, [0] * BINS)])
    assert all(math.isnan(value) for value in empty.values())


def test_validation_images_are_not_trained_on(data: Path, tmp_path: Path) -> None:
    run = opened(data, tmp_path, batch=4)
    assert isinstance(run.source, Subset)
    assert isinstance(run.held_out, Subset)
    assert (len(run.source), len(run.held_out)) == (16, 8)
    batches = run.batches()
    learned = [next(batches) for _ in range(4)]
    seen = [image for batch in learned for image in batch.images]  # type: ignore[attr-defined]
    kept = _batch(run, torch.arange(8)).images
    assert len({tuple(image.flatten().tolist()) for image in kept}) == 8
    for image in kept:
        assert not any(torch.equal(image, other) or torch.equal(image, other.flip(-1)) for other in seen)
    whole = open_tiny_run(tiny_train_config(data), tmp_path / "whole")
    assert whole.held_out is None  # it has no test part
    with pytest.raises(ConfigError, match="hold_out 3 -> 0"):
        open_tiny_run(tiny_train_config(data), tmp_path)
    open_tiny_run(tiny_train_config(data, hold_out=3, validate_every=7, validate_count=2), tmp_path)


def test_validation_unreadable_image_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_images(tmp_path / "pictures", 24)
    run = opened(data, tmp_path / "run")
    assert isinstance(run.held_out, Subset)
    Path(run.held_out[4].name).write_bytes(b"no picture")
    look = Validation(run, Log())
    assert look(take_snapshot(run))["val_loss"] > 0
    assert look.groups is not None
    assert [group.positions.tolist() for group in look.groups] == [[0, 1, 2], [3, 5], [6, 7]]
    assert "skipped a picture that can't be read" in caplog.text


@pytest.mark.parametrize("classes", [0, 2])
def test_validation_of_given_images(data: Path, tmp_path: Path, classes: int) -> None:
    others = write_images(tmp_path / "others", 6)
    model = tiny_config(channels=1, grid=(8, 8), patch_size=2, classes=classes)
    run = opened(data, tmp_path / "run", model=model, validate_on=str(others))
    assert run.held_out is not None
    assert (len(run.source), len(run.held_out)) == (16, 6)
    assert measured(run)["val_loss"] > 0
    for i in range(2):
        (others / "up").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(others / "up" / f"{i}.png")
    if classes:
        with pytest.raises(
            ConfigError, match=r"others has 3 classes that are not the 2 of .*; validate on pictures with"
        ):
            opened(data, tmp_path / "other", model=model, validate_on=str(others))
    else:
        opened(data, tmp_path / "other", model=model, validate_on=str(others))


def test_validation_test_split_of_other_classes_is_not_used(tmp_path: Path) -> None:
    for name, count in (("train", 8), ("test", 4)):
        write_images(tmp_path / "data" / name, count)
    assert opened(tmp_path / "data", tmp_path / "run", hold_out=0).held_out is not None
    for file in (tmp_path / "data" / "test" / "across").iterdir():
        file.unlink()
    assert opened(tmp_path / "data", tmp_path / "other", hold_out=0).held_out is None


def test_validation_latents_are_sampled_once(data: Path, tmp_path: Path) -> None:
    """From a tokenizer's posterior, with noise keyed by the picture."""

    class Vague(PixelTokenizer):
        deterministic = False

        def encode(self, images: torch.Tensor) -> Any:
            found = super().encode(images)
            return type(found)(found.mean, torch.ones_like(found.mean))

    settings = tiny_train_config(data, hold_out=3, tokenizer="some-vae")
    cpu = torch.device("cpu")
    run = open_run(settings, tmp_path, device=cpu, load_tokenizer=lambda name: Vague(1, 0.0, 1.0), load_model=Any)
    one, again = (Validation(run, Log())._encode_groups() for _ in range(2))
    assert torch.equal(one[1].latents, again[1].latents)
    plain = to_latents(PixelTokenizer(1, 0.0, 1.0), _batch(run, one[1].positions), VALIDATION_SEED, cpu)
    assert 0.8 < float((one[1].latents - plain).std()) < 1.2


def _batch(run: Run, positions: torch.Tensor) -> Any:
    from mar.data.images import Transform
    from mar.data.loader import load_batch

    assert run.held_out is not None
    return load_batch(run.held_out, Transform((8, 8), 1), positions.tolist())


def test_validation_loss_falls_in_training(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(data, images=240, log_every=20, warmup=40, lr=0.4, hold_out=3), tmp_path)
    assert isinstance(run.model, MAR)
    log = open_log(run)
    on_snapshot(run, log, 60, Validation(run, log))
    assert train(run, log)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if "val_loss" in line]
    assert [line["images"] for line in found] == [60, 120, 180, 240]
    assert all(set(line) == {"images", *NAMES} for line in found)
    losses = [line["val_loss"] for line in found]
    assert losses[-1] == min(losses)
    assert losses[-1] < 0.9 * losses[0]
