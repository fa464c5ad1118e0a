"""Workers draw the random numbers of steps: the same ones, and not in the step."""

from __future__ import annotations

import os
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import write_tar_shards
from tiny import open_tiny_run, tiny_config, tiny_train_config, write_images
from torch import Tensor

from mar.data.loader import ImageBatch
from mar.training import trainer
from mar.training.loss import StepRandomness, sample_randomness
from mar.training.trainer import POSTERIOR_NOISE, DrawAhead, posterior_noise

MODEL = tiny_config(grid=(4, 4), label_drop=0.5)


@pytest.fixture(params=["folder", "stream"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        return write_images(tmp_path)
    return Path(f"stream:{write_tar_shards(tmp_path, (6, 3, 8, 6), classes=2)}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_draw_what_steps_would(
    data: Path, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_steps, here = [0], os.getpid()

    def counted(*arguments: Any) -> StepRandomness:
        in_steps[0] += os.getpid() == here  # workers have a count of their own
        return sample_randomness(*arguments)

    monkeypatch.setattr(trainer, "sample_randomness", counted)
    torch.set_num_threads(1)
    results = []
    for workers in (0, 2):
        config = tiny_train_config(data, workers=workers, accumulate=accumulate)
        run = open_tiny_run(config, tmp_path / f"run-{workers}")
        in_steps[0] = 0
        losses = [run.step(batch).loss for batch in islice(run.batches(), 4)]
        assert in_steps[0] == (0 if workers else 4 * accumulate)
        results.append((losses, [p.detach() for p in run.model.parameters()]))
    (losses, weights), (other_losses, others) = results
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_draws_of_another_step_are_not_used(tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(write_images(tmp_path), workers=1), tmp_path / "run")
    batch = next(run.batches())
    rows = slice(0, 4)
    assert torch.equal(run._draws(batch, rows).noise, sample_randomness(run.model.config, 5, 0, range(4)).noise)
    run.progress.step = 7
    assert torch.equal(run._draws(batch, rows).noise, sample_randomness(run.model.config, 5, 7, range(4)).noise)


def test_draw_ahead_is_keyed_by_step_and_position() -> None:
    draw = pickle.loads(pickle.dumps(DrawAhead(MODEL, seed=3, batch=8, step=10, images=83, posterior=True)))
    positions = [99, 100, 102]  # of the third batch from image 83 on
    rows = draw(positions)
    expected = sample_randomness(MODEL, 3, 12, positions)
    drawn = StepRandomness.from_rows(rows)
    assert drawn.masked == expected.masked
    for name in ("order", "drop_label", "timestep", "noise"):
        assert torch.equal(getattr(drawn, name), getattr(expected, name))
        assert getattr(drawn, name).is_contiguous()
    assert rows["step"].tolist() == [12, 12, 12]
    noise = posterior_noise(torch.zeros(3, 2, 4, 4), 3, torch.tensor(positions))
    assert torch.equal(rows[POSTERIOR_NOISE], noise)
    assert POSTERIOR_NOISE not in DrawAhead(MODEL, 3, 8, 10, 83, posterior=False)(positions)


def test_pinned_batch_copies_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor + 0

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    draws = {"order": torch.arange(2)}
    batch = ImageBatch(torch.arange(2), torch.arange(2), ("a",), images=torch.ones(2, 1, 4, 4), draws=draws)
    copy = batch.pin_memory()
    assert isinstance(copy, ImageBatch)
    assert copy.skipped == ("a",)
    assert {id(tensor) for tensor in pinned} == {
        id(t) for t in (batch.labels, batch.positions, batch.images, *draws.values())
    }
    assert copy.draws["order"] is not draws["order"]
    assert torch.equal(copy.images, batch.images)
